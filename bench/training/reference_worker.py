"""The reference package's training on the rows of a finished run (runs in the package's own environment).

Its loop, its gradients inside the loop and its evaluation of the validation rows, one after the other; the entries that
take part are those of the run's selection. Prints a line of JSON and writes the encoder to a file.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from gradiend.trainer.core.arguments import TrainingArguments  # type: ignore[import-not-found]
from gradiend.trainer.core.callbacks import TrainingCallback  # type: ignore[import-not-found]
from gradiend.trainer.core.pruning import PrePruneConfig  # type: ignore[import-not-found]
from gradiend.trainer.core.training import train  # type: ignore[import-not-found]
from gradiend.trainer.text.prediction.model_with_gradiend import (  # type: ignore[import-not-found]
    TextPredictionModelWithGradiend,
)
from gradiend.trainer.text.prediction.trainer import TextPredictionTrainer  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar


class Clock(TrainingCallback):
    """The processor time at which every step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, step: int, loss: float, model: Any, config: dict[str, Any], **kwargs: Any) -> None:
        """Note the time."""
        self.times.append(time.process_time())


def main() -> None:
    """Load, train some steps, evaluate once; times are seconds of processor time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--rows", required=True, type=Path, help="training.parquet as JSON records")
    parser.add_argument("--classes", required=True, nargs=2)
    parser.add_argument("--kept", required=True, type=Path, help="flat positions of the kept entries, by parameter")
    parser.add_argument("--steps", required=True, type=int)
    parser.add_argument("--batch-size", required=True, type=int)
    parser.add_argument("--learning-rate", required=True, type=float)
    parser.add_argument("--encoder", required=True, type=Path, help="where the encoder goes")
    arguments = parser.parse_args()
    start = time.process_time()
    trainer, model = _load(arguments)
    data = trainer.create_training_data(model, batch_size=arguments.batch_size)
    gradients = trainer.create_gradient_training_dataset(data, model, source="alternative", target="diff")
    rows = trainer.create_eval_data(model, split="validation", source="alternative")
    loaded = time.process_time()
    evaluation = trainer.evaluator.evaluate_encoder(eval_data=rows, use_cache=False)
    clock = Clock()
    clock.times.append(time.process_time())
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=f"{folder}/model",
            learning_rate=arguments.learning_rate,
            max_steps=arguments.steps,
            num_train_epochs=arguments.steps,
            do_eval=False,
            save_only_best=False,
            seed=0,
        )
        train(model, DataLoader(gradients, batch_size=1, shuffle=False), training_args=settings, callbacks=[clock])
    encoder = model.gradiend.encoder[0].linear
    save_file({"weight": encoder.weight.detach().cpu(), "bias": encoder.bias.detach().cpu()}, arguments.encoder)
    found = {
        "imports": start,
        "load": loaded - start,
        "evaluation": clock.times[0] - loaded,
        "evaluation_rows": len(rows),
        "correlation_untrained": evaluation.get("correlation"),
        "steps": [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)],
    }
    print(json.dumps(found))


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    frame = pd.read_json(arguments.rows, orient="records", dtype=False)
    inside = frame["factual_class"].isin(arguments.classes) & frame["alternative_class"].isin(arguments.classes)
    frame = frame[inside].rename(columns={"factual": "label", "factual_class": "label_class"})
    trainer = TextPredictionTrainer(
        model=arguments.base_model,
        data=frame[["masked", "split", "label_class", "label", "alternative_class", "alternative"]],
        target_classes=list(arguments.classes),
        alternative_col="alternative",
        alternative_class_col="alternative_class",
        args=TrainingArguments(train_batch_size=arguments.batch_size, seed=0),
    )
    _pad_to(trainer, int(AutoConfig.from_pretrained(arguments.base_model).max_position_embeddings))
    torch.manual_seed(0)
    # With a pre-prune configuration the package makes the weights of its own model after pruning only.
    model = TextPredictionModelWithGradiend.from_pretrained(
        arguments.base_model, source="alternative", target="diff", pre_prune_config=PrePruneConfig(topk=0.1)
    )
    kept, offset, positions = load_file(arguments.kept), 0, []
    for name, spec in model.gradiend.param_map.items():
        if name in kept:
            positions.append(kept[name].long() + offset)
        offset += int(torch.Size(spec["shape"]).numel())
    model.prune_gradiend(keep_idx=torch.cat(positions))
    model.gradiend._ensure_built()
    trainer._model_instance = model  # as the trainer does before it trains, for its evaluator
    return trainer, model


def _pad_to(trainer: Any, length: int) -> None:
    """The package pads every row to 256 tokens; a smaller model has no positions for so many."""
    original = trainer.create_training_data

    def padded(*positional: Any, **named: Any) -> Any:
        data = original(*positional, **named)
        data.max_length = min(data.max_length, length)
        return data

    trainer.create_training_data = padded


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    main()
