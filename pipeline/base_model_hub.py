"""Download a model of the Hugging Face hub at a fixed revision."""

from pathlib import Path

from gradiend_core.config.base_models import HubBaseModel
from gradiend_core.config.section import read_section
from gradiend_core.lm.folder import MODEL_FILES, load_masked_lm, save_masked_lm
from pipeline.stage import Outputs, stage_parser


def main(argv: list[str]) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    parser = stage_parser("base_model_hub", __doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder of the base model")
    arguments = parser.parse_args(argv)
    params = read_section(HubBaseModel, arguments.params)
    with Outputs("base_model_hub", arguments.manifest, params.model_dump(), []) as outputs:
        model, tokenizer = load_masked_lm(params.repo_id, revision=params.revision)
        save_masked_lm(outputs.folder(arguments.output, MODEL_FILES), model, tokenizer)
