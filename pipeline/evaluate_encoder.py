"""Encode every stored gradient with the final model and score the encoder; no language model is loaded."""

import logging
from pathlib import Path

from gradiend_core.config.evaluate_encoder import EvaluateEncoder
from gradiend_core.config.section import read_section
from gradiend_core.evaluation.encoder import all_metrics, encode_store, headline
from gradiend_core.evaluation.tables import DETAILS_FILE, ENCODINGS, ENCODINGS_FILE, METRICS_FILE
from gradiend_core.files import write_json
from gradiend_core.gradients.store import GradientStore
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from gradiend_core.tables import write_table
from pipeline.stage import Outputs, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write encodings.parquet, metrics.json (headline numbers of the test split) and details.json (everything)."""
    parser = stage_parser("evaluate_encoder", __doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the GRADIEND model")
    parser.add_argument("--gradients", required=True, type=Path, help="folder of the gradient store")
    parser.add_argument("--output", required=True, type=Path, help="folder of the results")
    arguments = parser.parse_args(argv)
    params = read_section(EvaluateEncoder, arguments.params)
    inputs = [arguments.model / WEIGHTS_FILE, arguments.model / CONFIG_FILE, arguments.gradients]
    with Outputs("evaluate_encoder", arguments.manifest, params.model_dump(), inputs) as outputs:
        model = GradiendModel.from_pretrained(arguments.model)
        store = GradientStore.open(arguments.gradients)
        encodings = encode_store(model, store)
        metrics = all_metrics(encodings, store, model, params)
        test = metrics["test"]
        interval = f"{test['correlation_low']:.3f} to {test['correlation_high']:.3f}"
        logger.info("test correlation %.3f (%s), R² %.3f", test["correlation"], interval, test["r2"])
        write_table(outputs.path(arguments.output / ENCODINGS_FILE), encodings, ENCODINGS)
        write_json(outputs.path(arguments.output / METRICS_FILE), headline(test))
        write_json(outputs.path(arguments.output / DETAILS_FILE), metrics)
        outputs.record(seed=params.seed)
