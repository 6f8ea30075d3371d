"""Take the selected seed's GRADIEND and keep its most important entries."""

import logging
from pathlib import Path

from gradiend_core.config.post_prune import PostPrune
from gradiend_core.config.section import read_section
from gradiend_core.files import read_json
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from pipeline.stage import Outputs, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write model.safetensors and config.json."""
    parser = stage_parser("post_prune", __doc__)
    parser.add_argument("--seed-report", required=True, type=Path, help="the report that names the seed")
    parser.add_argument("--seed-runs", required=True, type=Path, help="folder with one folder per seed")
    parser.add_argument("--output", required=True, type=Path, help="folder of the model")
    arguments = parser.parse_args(argv)
    params = read_section(PostPrune, arguments.params)
    seed_run = arguments.seed_runs / str(read_json(arguments.seed_report)["best_seed"])
    inputs = [arguments.seed_report, seed_run / WEIGHTS_FILE, seed_run / CONFIG_FILE]
    with Outputs("post_prune", arguments.manifest, params.model_dump(), inputs) as outputs:
        model = GradiendModel.from_pretrained(seed_run)
        if params.topk is not None:
            before, model = model.selection.n, model.prune(params.topk, params.part)
            logger.info("kept %d of %d entries", model.selection.n, before)
        model.save(outputs.path(arguments.output / WEIGHTS_FILE), outputs.path(arguments.output / CONFIG_FILE))
