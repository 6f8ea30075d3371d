"""Decide which seeds converged and which one is kept."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradiend_core.config.section import read_section, read_value
from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.errors import GradiendError
from gradiend_core.files import read_json, write_json
from gradiend_core.gradients.selection import top_k
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from gradiend_core.training.convergence import non_convergence, seed_report
from gradiend_core.training.stability import topk_stability
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
    folders = {seed: arguments.seed_runs / str(seed) for seed in read_value(arguments.seeds)[: params.max_seeds]}
    names = [METRICS_FILE] if params.seed_stability_topk is None else [METRICS_FILE, WEIGHTS_FILE, CONFIG_FILE]
    inputs = [folder / name for folder in folders.values() for name in names]
    with Outputs("select_seed", arguments.manifest, params.model_dump(), inputs) as outputs:
        try:
            report = seed_report({seed: read_json(folder / METRICS_FILE) for seed, folder in folders.items()}, params)
        except GradiendError as error:
            raise GradiendError(f"{arguments.params}: {error}") from None
        _log(report)
        shortage = non_convergence(report)
        if shortage and params.fail_on_non_convergence:
            raise GradiendError(f"{arguments.params}.fail_on_non_convergence: {shortage}")
        if shortage:
            logger.warning(shortage)
        if params.seed_stability_topk is not None:
            report["topk_stability"] = _stability(params, {seed: folders[seed] for seed in report["convergent_seeds"]})
        write_json(outputs.path(arguments.output), report)


def _log(report: Mapping[str, Any]) -> None:
    for run in report["runs"]:
        logger.info("seed %d: %s", run["seed"], "; ".join(run["reasons"]) or "converged")
        if run["converged"]:
            for name, advice in run["diagnoses"].items():
                logger.warning("seed %d: %s: %s", run["seed"], name, advice)
    counts = (report["convergent_count"], len(report["runs"]), report["best_seed"])
    logger.info("%d of %d seeds converged; seed %d is kept", *counts)


def _stability(params: SelectSeed, folders: Mapping[int, Path]) -> dict[str, Any]:
    """The report on the entries that the seeds in the given folders find important."""
    topk, part = params.seed_stability_topk, params.seed_stability_part
    entries, n = {}, 0
    for seed, folder in folders.items():
        model = GradiendModel.from_pretrained(folder)
        entries[seed], n = top_k(model.importance(part), topk).numpy(), model.selection.n
    stability = topk_stability(entries, n) | {"topk": topk, "part": part}
    if stability["computed"]:
        overlap, chance = stability["mean_pairwise_overlap_fraction"], stability["chance_overlap_fraction"]
        logger.info(
            "the seeds share %.0f %% of their %s entries (by chance %.0f %%)", 100 * overlap, topk, 100 * chance
        )
    return stability
