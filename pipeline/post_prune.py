"""Take the selected seed's GRADIEND and keep its most important entries."""

import logging
from pathlib import Path

from torch import Tensor

from gradiend_core.config.post_prune import Mask, PostPrune
from gradiend_core.config.section import read_section
from gradiend_core.errors import GradiendError
from gradiend_core.evaluation.pruning import pruning_scores
from gradiend_core.evaluation.tables import METRICS_FILE
from gradiend_core.files import read_json, sha256_file, write_json
from gradiend_core.gradients.store import GradientStore
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from gradiend_core.tensors import load_tensors
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
    inputs += [Path(params.mask.path)] if params.mask else []
    with Outputs("post_prune", arguments.manifest, params.model_dump(), inputs) as outputs:
        model = GradiendModel.from_pretrained(seed_run)
        try:
            mask = _read_mask(params.mask) if params.mask else None
            pruned = model.prune(params.topk, params.part, threshold=params.threshold, mask=mask)
        except GradiendError as error:
            raise GradiendError(f"{arguments.params}: {error}") from None
        scores = pruning_scores(model, pruned, GradientStore.open(arguments.gradients))
        logger.info("kept %d of %d entries by %s", pruned.selection.n, model.selection.n, params.part)
        logger.info(
            "validation correlation %.3f, before %.3f", scores["correlation_after"], scores["correlation_before"]
        )
        pruned.save(outputs.path(arguments.output / WEIGHTS_FILE), outputs.path(arguments.output / CONFIG_FILE))
        write_json(outputs.path(arguments.output / METRICS_FILE), scores)


def _read_mask(mask: Mask) -> Tensor:
    """The mask of a file, which neither engine watches: its hash in params.yaml is what stands for its content."""
    path = Path(mask.path)
    if (found := sha256_file(path)) != mask.sha256:
        raise GradiendError(
            f"mask: {path} has the SHA-256 {found}, not {mask.sha256}."
            " If it is the mask you want, write the former into mask.sha256."
        )
    tensors = load_tensors(path)
    if "mask" not in tensors:
        raise GradiendError(f"mask: {path} holds {', '.join(tensors) or 'nothing'}, but no tensor of the name mask")
    return tensors["mask"]
