"""Train a small BERT and its tokenizer on a corpus, as an ordinary masked language model."""

import logging
from pathlib import Path
from typing import Any

import torch

from gradiend_core.config.base_models import TrainedBaseModel
from gradiend_core.config.section import read_section
from gradiend_core.corpus.texts import SPLITS, TEXTS, TEXTS_FILE
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.files import write_json
from gradiend_core.lm.folder import METRICS_FILE, MODEL_FILES, save_masked_lm
from gradiend_core.lm.pretrain import masked_token_accuracy, masked_word_accuracy, train_masked_lm, train_tokenizer
from gradiend_core.lm.trainer_checkpoints import TrainerCheckpoints
from gradiend_core.tables import read_table
from pipeline.stage import Outputs, code_digest, environment, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write config.json, model.safetensors, tokenizer.json, tokenizer_config.json and metrics.json."""
    parser = stage_parser("base_model_trained", __doc__)
    parser.add_argument("--corpus", required=True, type=Path, help="folder of the corpus")
    parser.add_argument("--output", required=True, type=Path, help="folder of the base model")
    arguments = parser.parse_args(argv)
    params = read_section(TrainedBaseModel, arguments.params)
    use_deterministic_algorithms()
    # Sums depend on how they are split over threads, and a model this small is not faster with more.
    torch.set_num_threads(1)
    corpus = arguments.corpus / TEXTS_FILE
    with Outputs("base_model_trained", arguments.manifest, params.model_dump(), [corpus]) as outputs:
        texts = read_table(corpus, TEXTS)
        train, validation, test = (list(texts.loc[texts["split"] == split, "text"]) for split in SPLITS)
        tokenizer = train_tokenizer(train, vocab_size=params.vocab_size)
        identity = _identity(params, outputs)
        checkpoints = outputs.hold(TrainerCheckpoints(arguments.output / ".partial-resume-checkpoints", identity))
        trained = train_masked_lm(
            train,
            tokenizer,
            model_config=params.model.model_dump(),
            training=params.training,
            validation=validation,
            checkpoints=checkpoints,
            events=Path("logs/tensorboard", arguments.params),
        )
        model = trained.model
        words = masked_word_accuracy(model, tokenizer, test, params.probe_words)
        tokens = masked_token_accuracy(model, tokenizer, test, seed=params.training.seed)
        logger.info("masked-token accuracy on the test split: %.3f; probe words: %s", tokens, words)
        save_masked_lm(outputs.folder(arguments.output, MODEL_FILES), model, tokenizer)
        metrics = {"masked_token_accuracy": tokens, "probe_words": words}
        if trained.validation:
            metrics["validation"] = trained.validation
        write_json(outputs.path(arguments.output / METRICS_FILE), metrics)
        outputs.record(device=describe_device(pick_device()), seed=params.training.seed)


def _identity(params: TrainedBaseModel, outputs: Outputs) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "params": params.model_dump(),
        "corpus": dict(outputs.inputs),
        "device": describe_device(pick_device()),
        "code": code_digest(),
    } | environment()
