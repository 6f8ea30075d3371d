"""Decide which seeds converged and which one is kept."""

import logging
from pathlib import Path

from gradiend_core.config.section import read_section, read_value
from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.files import read_json, write_json
from gradiend_core.training.convergence import seed_report
from gradiend_core.training.tables import METRICS_FILE
from pipeline.stage import Outputs, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write seed_report.json."""
    parser = stage_parser("select_seed", __doc__)
    parser.add_argument("--seeds", required=True, metavar="KEY", help="key of params.yaml that lists the seeds")
    parser.add_argument("--seed-runs", required=True, type=Path, help="folder with one folder per seed")
    parser.add_argument("--output", required=True, type=Path, help="the report file")
    arguments = parser.parse_args(argv)
    params = read_section(SelectSeed, arguments.params)
    files = {seed: arguments.seed_runs / str(seed) / METRICS_FILE for seed in read_value(arguments.seeds)}
    with Outputs("select_seed", arguments.manifest, params.model_dump(), list(files.values())) as outputs:
        report = seed_report({seed: read_json(file) for seed, file in files.items()}, params)
        for run in report["runs"]:
            logger.info("seed %d: %s", run["seed"], "; ".join(run["reasons"]) or "converged")
        converged, tried = report["convergent_count"], report["seeds_tried"]
        logger.info("%d of %d seeds converged; seed %d is kept", converged, tried, report["best_seed"])
        write_json(outputs.path(arguments.output), report)
