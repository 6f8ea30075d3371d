"""Write one changed base model per target class: a normal transformers folder with a model card."""

from pathlib import Path

from gradiend_core.config.section import check_name
from gradiend_core.evaluation.tables import METRICS_FILE
from gradiend_core.files import read_json
from gradiend_core.lm.folder import MODEL_FILES, load_masked_lm, save_masked_lm
from gradiend_core.model.card import model_card
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from gradiend_core.model.rewriting import rewritten
from pipeline.stage import Outputs, stage_parser

CARD_FILE = "README.md"


def main(argv: list[str]) -> None:
    """Write a folder per target class."""
    parser = stage_parser("rewrite_model", __doc__, params=False)
    parser.add_argument("--model", required=True, type=Path, help="folder of the GRADIEND model")
    parser.add_argument("--base-model", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--decoder", required=True, type=Path, help="folder of the decoder evaluation")
    parser.add_argument("--output", required=True, type=Path, help="folder of the rewritten models")
    arguments = parser.parse_args(argv)
    model_files = [arguments.model / WEIGHTS_FILE, arguments.model / CONFIG_FILE]
    base_files = [arguments.base_model / name for name in MODEL_FILES]
    inputs = [*model_files, *base_files, arguments.decoder / METRICS_FILE]
    with Outputs("rewrite_model", arguments.manifest, {}, inputs) as outputs:
        gradiend = GradiendModel.from_pretrained(arguments.model)
        base_model, tokenizer = load_masked_lm(arguments.base_model)
        classes = read_json(arguments.decoder / METRICS_FILE)["classes"]
        for target in gradiend.target_classes:
            check_name(target, f"{arguments.model / CONFIG_FILE}: target_classes")
            chosen = classes[target]
            folder = outputs.folder(arguments.output / target, (*MODEL_FILES, CARD_FILE))
            rate, factor = chosen["learning_rate"], chosen["feature_factor"]
            with rewritten(base_model, gradiend, learning_rate=rate, feature_factor=factor):
                save_masked_lm(folder, base_model, tokenizer)
            (folder / CARD_FILE).write_text(model_card(gradiend, target, chosen), "utf-8")
