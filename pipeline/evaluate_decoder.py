"""Try decoded updates on the base model and choose one per target class."""

import logging
from pathlib import Path

from gradiend_core.config.evaluate_decoder import EvaluateDecoder
from gradiend_core.config.section import read_section
from gradiend_core.data.tables import NEUTRAL, NEUTRAL_FILE, TRAINING, TRAINING_FILE
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.evaluation.decoder import evaluate_grid, select_candidates
from gradiend_core.evaluation.tables import GRID, GRID_FILE, METRICS_FILE
from gradiend_core.files import write_json
from gradiend_core.lm.folder import MODEL_FILES, load_masked_lm
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from gradiend_core.tables import read_table, write_table
from pipeline.stage import Outputs, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write grid.parquet and metrics.json."""
    parser = stage_parser("evaluate_decoder", __doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the GRADIEND model")
    parser.add_argument("--base-model", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--dataset", required=True, type=Path, help="folder of the dataset")
    parser.add_argument("--output", required=True, type=Path, help="folder of the results")
    arguments = parser.parse_args(argv)
    params = read_section(EvaluateDecoder, arguments.params)
    use_deterministic_algorithms()
    training_file, neutral_file = arguments.dataset / TRAINING_FILE, arguments.dataset / NEUTRAL_FILE
    model_files = [arguments.model / WEIGHTS_FILE, arguments.model / CONFIG_FILE]
    base_files = [arguments.base_model / name for name in MODEL_FILES]
    inputs = [*model_files, *base_files, training_file, neutral_file]
    with Outputs("evaluate_decoder", arguments.manifest, params.model_dump(), inputs) as outputs:
        gradiend = GradiendModel.from_pretrained(arguments.model)
        base_model, tokenizer = load_masked_lm(arguments.base_model, device=pick_device())
        training, neutral = read_table(training_file, TRAINING), read_table(neutral_file, NEUTRAL)
        grid = evaluate_grid(gradiend, base_model, tokenizer, training, neutral, params)
        classes = select_candidates(grid, gradiend, params.lms_ratio)
        for target, chosen in classes.items():
            logger.info("%s: %.4f -> %.4f at %s", target, chosen["base_value"], chosen["value"], chosen["id"])
        write_table(outputs.path(arguments.output / GRID_FILE), grid, GRID)
        write_json(outputs.path(arguments.output / METRICS_FILE), {"classes": classes, "lms_ratio": params.lms_ratio})
        outputs.record(device=describe_device(pick_device()), seed=params.seed)
