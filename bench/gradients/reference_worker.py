"""The reference package's gradients of a batch of rows, as its trainer computes them (runs in its own environment)."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from gradiend.trainer.core.arguments import TrainingArguments  # type: ignore[import-not-found]
from gradiend.trainer.core.pruning import PrePruneConfig  # type: ignore[import-not-found]
from gradiend.trainer.text.prediction.model_with_gradiend import (  # type: ignore[import-not-found]
    TextPredictionModelWithGradiend,
)
from gradiend.trainer.text.prediction.trainer import TextPredictionTrainer  # type: ignore[import-not-found]
from transformers.utils.logging import disable_progress_bar

from bench.gradients import texts
from bench.gradients.child import serve

loaded: dict[str, tuple[Any, int]] = {}


def answer(folder: str, rows: list[texts.Row], share: float, batch: int, max_length: int | None) -> dict[str, Any]:
    """Seconds per row for a batch of the package's own gradient dataset, its templates and some of its values.

    `rows` are two batches, one of each class. `max_length` None leaves the padding at the package's own length.
    """
    data, own_length = _dataset(folder, rows, share)
    data.training_data.max_length = max_length or own_length
    start = time.perf_counter()
    found = data[batch]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds / len(found["template"]),
        "templates": found["template"],
        "padded": max_length or own_length,
        "values": [texts.some(found[kind].tolist()) for kind in ("source", "target")],
    }


def _dataset(folder: str, rows: list[texts.Row], share: float) -> tuple[Any, int]:
    if folder not in loaded:
        arguments = TrainingArguments(train_batch_size=len(rows) // 2, seed=0)
        trainer = TextPredictionTrainer(
            model=folder,
            data=pd.DataFrame(rows),
            target_classes=list(texts.WORDS),
            alternative_col="alternative",
            alternative_class_col="alternative_class",
            args=arguments,
        )
        # With a pre-prune configuration the package makes the weights of its own model after pruning only.
        model = TextPredictionModelWithGradiend.from_pretrained(
            folder, source="alternative", target="diff", pre_prune_config=PrePruneConfig(topk=share)
        )
        # The same entries as `models.random_coordinates` takes.
        kept = torch.rand(model.gradiend.input_dim, generator=torch.Generator().manual_seed(0)) < share
        model.prune_gradiend(keep_idx=kept.nonzero()[:, 0])
        data = trainer.create_training_data(model, batch_size=len(rows) // 2)
        gradients = trainer.create_gradient_training_dataset(data, model, source="alternative", target="diff")
        loaded[folder] = gradients, data.max_length
    return loaded[folder]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    os.chdir(Path(os.environ["BENCH_FOLDER"]))  # the package writes files beside itself
    serve(answer)
