"""How well a model does on validation rows, at the cost of reading them once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gradiend_core.config.train import Objective, Train
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.statistics import Array, bootstrap_interval, pearson
from gradiend_core.training.rows import RowSet

# Entries that are reconstructed at a time where a decoder is not linear.
_CHUNK: Final = 2**24


@dataclass(frozen=True)
class Validation:
    """Validation rows, and what no model changes about them: Σ y [n], Σ‖y‖² and Σ‖y - ȳ‖²."""

    rows: RowSet
    target_sum: Tensor
    squares: float
    variation: float

    @classmethod
    def of(cls, rows: RowSet) -> "Validation":
        target = rows.target
        mean = target.mean(0)
        squares, variation = (
            math.fsum(float((row - centre).double().square().sum()) for row in target) for centre in (0.0, mean)
        )
        return cls(rows, target.double().sum(0), squares, variation)


@torch.no_grad()
def evaluate(
    model: GradiendModel, validation: Validation, neutral: Tensor, scaling: str, objective: Objective
) -> dict[str, float]:
    """Correlation of encodings and labels, loss and R² of the reconstruction, encodings of classes and neutral rows.

    The loss is that of training (see `losses`), over all rows. Encodings are those of the first latent.
    """
    labels = validation.rows.labels
    encoded = model.encode(validation.rows.source)
    known = torch.from_numpy(labels).to(encoded.device, torch.float32)[:, None]
    encodings = encoded[:, 0].double().cpu().numpy()
    residual = squared_error(model, known if objective == "decoder" else encoded, validation)
    per_row = residual / model.target_scale**2 / len(labels)
    loss = per_row / model.selection.n if scaling == "reference" else per_row
    neutral_encodings = model.encode(neutral)[:, 0].double().cpu().numpy()
    positive, negative = encodings[labels > 0], encodings[labels < 0]
    return {
        "eval_loss": float(np.mean((encodings - labels) ** 2)) if objective == "encoder" else loss,
        "correlation": pearson(encodings, labels),
        "r2": 1 - residual / validation.variation if validation.variation else math.nan,
        "mean_positive": _statistic(np.mean, positive),
        "mean_negative": _statistic(np.mean, negative),
        "mean_neutral": _statistic(np.mean, neutral_encodings),
        "std_positive": _statistic(np.std, positive),
        "std_negative": _statistic(np.std, negative),
    }


@torch.no_grad()
def squared_error(model: GradiendModel, encoded: Tensor, validation: Validation) -> float:
    """Σ‖y - ŷ‖² over the rows, for encodings [N, latent_dim].

    A linear decoder's error is expanded, with c the scale: Σ‖y‖² - 2c Σ (h·W_dᵀy + b_d·y) + c² Σ‖W_d h + b_d‖², so that
    no reconstruction is made.
    """
    rows, scale = validation.rows, model.target_scale
    if model.activation_decoder != "id":
        size = max(1, _CHUNK // model.selection.n)
        parts = zip(torch.split(encoded, size), torch.split(rows.target, size), strict=True)
        return math.fsum(float((y - model.decode(h)).double().square().sum()) for h, y in parts)
    decoder, projected = model.decoder.weight.double(), (rows.target @ model.decoder.weight).double()
    bias = torch.zeros_like(decoder[:, 0]) if model.decoder.bias is None else model.decoder.bias.double()
    h = encoded.double()
    cross = (h * projected).sum() + validation.target_sum @ bias
    own = ((h @ (decoder.T @ decoder)) * h).sum() + 2 * (h @ (decoder.T @ bias)).sum() + len(h) * (bias @ bias)
    return float(validation.squares - 2 * scale * cross + scale**2 * own)


def r_squared(target: Tensor, reconstruction: Tensor) -> float:
    """1 - Σ(y - ŷ)² / Σ(y - ȳ)² over all rows and entries, with ȳ the mean of each entry over the rows given."""
    residual = (target - reconstruction).double().square().sum()
    total = (target - target.mean(0)).double().square().sum()
    return float(1 - residual / total)


def score(line: Mapping[str, float], params: Train) -> float:
    """How good an evaluation is by `metric_for_best_model`: more is better, and -inf where it is undefined."""
    metric = params.metric_for_best_model
    greater = metric != "loss" if params.greater_is_better is None else params.greater_is_better
    value = abs(line["correlation"]) if metric == "correlation" else line["eval_loss" if metric == "loss" else metric]
    return -math.inf if math.isnan(value) else value if greater else -value


@torch.no_grad()
def correlation_interval(model: GradiendModel, rows: RowSet, seed: int) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval, over rows, of the correlation of encodings (first latent) and labels.

    None when it is undefined, for encodings or labels are all the same.
    """
    encodings = model.encode(rows.source)[:, 0].double().cpu().numpy()
    if not all(len(np.unique(values)) > 1 for values in (encodings, rows.labels)):
        return None
    return bootstrap_interval(
        lambda drawn: pearson(encodings[drawn], rows.labels[drawn]),
        len(encodings),
        samples=1000,
        confidence=0.95,
        seed=seed,
    )


def _statistic(function: Callable[[Array], np.floating], values: Array) -> float:
    return float(function(values)) if len(values) else math.nan
