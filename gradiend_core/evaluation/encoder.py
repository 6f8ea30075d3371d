"""Encodings of every stored row, and what they say about the encoder (semantics, section 7)."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from gradiend_core.config.evaluate_encoder import EvaluateEncoder
from gradiend_core.corpus.texts import SPLITS
from gradiend_core.evaluation.tables import ENCODINGS
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.statistics import Array, bootstrap_interval, pearson
from gradiend_core.training.evaluation import r_squared

_SOURCE_ID = {"factual": "factual_class", "alternative": "alternative_class", "diff": "transition"}


def encode_store(model: GradiendModel, store: GradientStore) -> pd.DataFrame:
    """The encodings table (`ENCODINGS`): one line per stored row.

    Neutral rows are encoded from their factual gradient whatever the model's source (semantics 7.1).
    """
    index = store.index
    neutral = torch.tensor((index["type"] != TRAINING).to_numpy())
    encoded = torch.empty(len(index))
    with torch.no_grad():
        for rows, quantity in ((~neutral, model.source), (neutral, "factual")):
            positions = rows.nonzero()[:, 0]
            encoded[positions] = model.encode(store.rows(quantity, positions, model.selection))[:, 0]
    sign = -1.0 if model.source == "alternative" else 1.0
    table = index.assign(
        source_id=index[_SOURCE_ID[model.source]],
        label=sign * index["label"] + 0.0,
        encoded=encoded.double().numpy(),
    )
    return table[list(ENCODINGS)]


def encoder_metrics(encodings: pd.DataFrame) -> dict[str, Any]:
    """Correlations, accuracies and distributions of one split (semantics 7.2).

    Correlations are Pearson between `encoded` and `label`. Accuracy cuts at ±0.5 into -1, 0, +1; for
    `target_classes_only` at 0 (0 counts as +1).
    """
    training = encodings[encodings["type"] == TRAINING]
    targets = training[training["label"] != 0]
    return {
        "all_data": _agreement(encodings, three_way=True),
        "training_only": _agreement(training, three_way=True),
        "target_classes_only": _agreement(targets, three_way=False),
        "by_label": {f"{label:+g}": _describe(rows) for label, rows in training.groupby("label")},
        "by_feature_class": {name: _describe(rows) for name, rows in training.groupby("source_id")},
        "by_type": {name: _describe(rows) for name, rows in encodings.groupby("type")},
    }


def all_metrics(
    encodings: pd.DataFrame, store: GradientStore, model: GradiendModel, params: EvaluateEncoder
) -> dict[str, dict[str, Any]]:
    """Per split the `encoder_metrics`, the correlation's bootstrap interval and the reconstruction R²."""
    metrics: dict[str, Any] = {}
    for split in SPLITS:
        chosen = encodings[encodings["split"] == split]
        rows = chosen[chosen["type"] == TRAINING]
        encoded, labels = rows["encoded"].to_numpy(), rows["label"].to_numpy()
        low, high = bootstrap_interval(
            partial(_correlation, encoded, labels),
            len(rows),
            samples=params.bootstrap_samples,
            confidence=params.confidence,
            seed=params.seed,
        )
        interval = {"correlation": pearson(encoded, labels), "correlation_low": low, "correlation_high": high}
        r2 = _reconstruction_r2(model, store, split)
        metrics[split] = interval | {"r2": r2} | encoder_metrics(chosen)
    return metrics


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of one split that one looks at first."""
    means = {f"mean_{name}": found["mean"] for name, found in metrics["by_feature_class"].items()}
    neutral = {f"mean_{kind}": found["mean"] for kind, found in metrics["by_type"].items() if kind != TRAINING}
    numbers = {name: metrics[name] for name in ("correlation", "correlation_low", "correlation_high", "r2")}
    return numbers | {"accuracy": metrics["training_only"]["accuracy"]} | means | neutral


def _reconstruction_r2(model: GradiendModel, store: GradientStore, split: str) -> float:
    positions = store.positions(split=split, kind=TRAINING)
    with torch.no_grad():
        reconstruction = model(store.rows(model.source, positions, model.selection))
    return r_squared(store.rows(model.target, positions, model.selection), reconstruction)


def _correlation(encoded: Array, labels: Array, rows: NDArray[np.int64]) -> float:
    return pearson(encoded[rows], labels[rows])


def _agreement(rows: pd.DataFrame, *, three_way: bool) -> dict[str, float]:
    encoded, labels = rows["encoded"].to_numpy(), rows["label"].to_numpy()
    if three_way:
        predicted = np.where(encoded >= 0.5, 1.0, np.where(encoded <= -0.5, -1.0, 0.0))
    else:
        predicted = np.where(encoded >= 0, 1.0, -1.0)
    return {
        "correlation": pearson(encoded, labels),
        "accuracy": float((predicted == labels).mean()),
        "n": len(rows),
    }


def _describe(rows: pd.DataFrame) -> dict[str, float]:
    """Mean, extremes, quartiles, standard deviation (ddof 1; 0 for a single row) and count of the encodings."""
    encoded = rows["encoded"]
    return {
        "mean": float(encoded.mean()),
        "min": float(encoded.min()),
        "max": float(encoded.max()),
        "q1": float(encoded.quantile(0.25)),
        "q3": float(encoded.quantile(0.75)),
        "std": float(encoded.std(ddof=1)) if len(encoded) > 1 else 0.0,
        "n": len(encoded),
    }
