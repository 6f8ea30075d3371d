"""Gradient stores in memory, of a trained base model and a dataset of a finished run (artifacts/)."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradiend_core.data.tables import NEUTRAL, NEUTRAL_FILE, TRAINING_FILE
from gradiend_core.data.tables import TRAINING as TRAINING_TABLE
from gradiend_core.gradients.collector import GradientCollector
from gradiend_core.gradients.importance import aligned_weights, mean_gradient, stratified_sample
from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k
from gradiend_core.gradients.store import TRAINING, GradientStore, Quantity, Stored
from gradiend_core.gradients.tasks import store_index, usable_neutral
from gradiend_core.lm.folder import load_masked_lm, max_tokens
from gradiend_core.tables import read_table

# The classes of the demo's features, +1 first.
CLASSES = {"pronoun_number": ["3SG", "3PL"], "pronoun_gender": ["masculine", "feminine"]}
STORED: Final[tuple[Stored, ...]] = ("alternative", "diff")
SAMPLE = 64  # rows of the importance, as in the demo
BATCH = 32
NEUTRAL_ROWS = 20  # neutral rows take no part in convergence
ENTRIES = 5e8  # of one matrix (2 GB): wide stores get fewer rows


def entries(artifacts: Path, model: str) -> int:
    """Entries of a model's backbone."""
    base, _ = load_masked_lm(artifacts / "base_models" / model)
    return Selection.everything(backbone_parameters(base)).n


def build_store(artifacts: Path, model: str, feature: str, n: int) -> GradientStore:
    """The rows of a feature at the n entries of the backbone of the largest aligned mean."""
    base, tokenizer = load_masked_lm(artifacts / "base_models" / model)
    folder = artifacts / "datasets" / feature
    length = max_tokens(base, tokenizer)
    neutral = usable_neutral(read_table(folder / NEUTRAL_FILE, NEUTRAL), tokenizer, length)[:NEUTRAL_ROWS]
    index = store_index(read_table(folder / TRAINING_FILE, TRAINING_TABLE), neutral, CLASSES[feature])
    parameters = backbone_parameters(base)
    everything = Selection.everything(parameters)

    def examples(rows: pd.DataFrame) -> tuple[list[Example], list[Example]]:
        factual, alternative = (
            encode(tokenizer, list(rows["masked"]), list(rows[kind]), max_length=length)
            for kind in ("factual", "alternative")
        )
        return factual, alternative

    train = index[(index["type"] == TRAINING) & (index["split"] == "train")].reset_index(drop=True)
    sample = train.iloc[stratified_sample(train["transition"], SAMPLE, 0)]
    weights = aligned_weights(sample["label"].to_numpy())
    importance = mean_gradient(base, parameters, *examples(sample), weights, source="alternative", batch_size=BATCH)
    selection = everything if n >= everything.n else everything.prune(top_k(importance.abs(), n))
    index = index.iloc[_fewer(index, int(ENTRIES / selection.n))].reset_index(drop=True)
    factual, alternative = examples(index)
    index = index.assign(n_positions=[len(example.positions) for example in factual])
    collector = GradientCollector(base, selection)
    matrices: dict[str, Tensor] = {name: torch.empty(len(index), selection.n) for name in STORED}
    for start in range(0, len(index), BATCH):
        part = slice(start, start + BATCH)
        rows = collector.rows(factual[part], alternative[part])
        matrices["alternative"][part], matrices["diff"][part] = rows.alternative, rows.diff
    pins: dict[str, Any] = {name: {"path": name} for name in ("base_model", "dataset")}
    return GradientStore(index, selection, {"target_classes": CLASSES[feature], **pins}, (matrices,))


def scaled(store: GradientStore, factor: float) -> GradientStore:
    """The same rows times a number."""
    matrices: dict[str, Tensor] = {name: store.matrix(name) * factor for name in STORED}
    return GradientStore(store.index, store.selection, store.metadata, (matrices,))


def mean_norm(store: GradientStore, quantity: Quantity) -> float:
    """Mean Euclidean norm of the gradient rows of the train split."""
    rows: Tensor = store.rows(quantity, store.positions(split="train", kind=TRAINING))
    return float(rows.norm(dim=1).mean())


def _fewer(index: pd.DataFrame, limit: int) -> NDArray[np.int64]:
    """Positions of about `limit` rows: the first of every type, split and transition, in proportion."""
    groups = index.groupby(["type", "split", "transition"], dropna=False)
    share = min(1.0, limit / len(index))
    kept = groups.cumcount() < np.maximum(2, np.round(groups["row"].transform("size") * share))
    return np.flatnonzero(kept)
