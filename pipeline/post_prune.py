"""Take the selected seed's GRADIEND and keep its most important entries."""

import logging
from pathlib import Path

from gradiend_core.config.post_prune import PostPrune
from gradiend_core.config.section import read_section
from gradiend_core.errors import GradiendError
from gradiend_core.evaluation.pruning import pruning_scores
from gradiend_core.evaluation.tables import METRICS_FILE
from gradiend_core.files import read_json, write_json
from gradiend_core.gradients.store import GradientStore
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from pipeline.stage import Outputs, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write model.safetensors, config.json and metrics.json (scores before and after)."""
    parser = stage_parser("post_prune", __doc__)
    parser.add_argument("--seed-report", required=True, type=Path, help="the report that names the seed")
    parser.add_argument("--seed-runs", required=True, type=Path, help="folder with one folder per seed")
    parser.add_argument("--gradients", required=True, type=Path, help="folder of the gradient store")
    parser.add_argument("--output", required=True, type=Path, help="folder of the model")
    arguments = parser.parse_args(argv)
    params = read_section(PostPrune, arguments.params)
    seed_run = arguments.seed_runs / str(read_json(arguments.seed_report)["best_seed"])
    inputs = [arguments.seed_report, seed_run / WEIGHTS_FILE, seed_run / CONFIG_FILE, arguments.gradients]
    with Outputs("post_prune", arguments.manifest, params.model_dump(), inputs) as outputs:
        model = GradiendModel.from_pretrained(seed_run)
        try:
            pruned = model.prune(params.topk, params.part, threshold=params.threshold)
        except GradiendError as error:
            raise GradiendError(f"{arguments.params}: {error}") from None
        scores = pruning_scores(model, pruned, GradientStore.open(arguments.gradients))
        logger.info("kept %d of %d entries by %s", pruned.selection.n, model.selection.n, params.part)
        logger.info(
            "validation correlation %.3f, before %.3f", scores["correlation_after"], scores["correlation_before"]
        )
        pruned.save(outputs.path(arguments.output / WEIGHTS_FILE), outputs.path(arguments.output / CONFIG_FILE))
        write_json(outputs.path(arguments.output / METRICS_FILE), scores)
