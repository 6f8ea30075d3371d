"""Train one GRADIEND on stored gradients (semantics, section 6; departures: BUG-03, BUG-05, BUG-06)."""

import copy
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradiend_core.config.train import Train
from gradiend_core.devices import pick_device
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.progress import track
from gradiend_core.statistics import pearson
from gradiend_core.training.batches import batches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowSet:
    """Source and target gradients [N, n] of some rows, the label of each source gradient, and position counts."""

    source: Tensor
    target: Tensor
    labels: np.ndarray  # +1: gradient of the first target class, -1: of the second, 0: neutral
    weights: Tensor  # masked positions per row: the share of a row in its batch's mean loss

    @classmethod
    def load(cls, store: GradientStore, params: Train, positions: Tensor, device: torch.device) -> "RowSet":
        """Rows of a store; the label is negated for source alternative (semantics 2.5)."""
        index = store.index.iloc[positions.numpy()]
        sign = -1.0 if params.source == "alternative" else 1.0
        return cls(
            store.rows(params.source, positions).to(device),
            store.rows(params.target, positions).to(device),
            sign * index["label"].to_numpy(dtype=np.float64) + 0.0,
            torch.tensor(index["n_positions"].to_numpy(), dtype=torch.float32, device=device),
        )

    def batch_mean(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Source and target gradient [n] of the mean loss over all masked positions of some rows."""
        rows = torch.from_numpy(positions).to(self.source.device)
        share = self.weights[rows] / self.weights[rows].sum()
        return share @ self.source[rows], share @ self.target[rows]


@dataclass(frozen=True)
class Trained:
    """The best model of a run, oriented, and the history of its evaluations (one line per evaluation)."""

    model: GradiendModel
    history: pd.DataFrame
    best_step: int


def train(store: GradientStore, params: Train, seed: int) -> Trained:
    """Train on the train split, evaluate on the validation split, and keep the model of the best evaluation.

    Best is the largest |correlation| of encodings with labels; step 0 takes part. The model is turned once, at the
    end, so that the first target class is encoded as positive, and the history with it.
    """
    index = store.index
    device = pick_device()
    training = RowSet.load(store, params, store.positions(split="train", kind=TRAINING), device)
    validation = RowSet.load(store, params, store.positions(split="validation", kind=TRAINING), device)
    # Neutral rows have no difference to encode: their factual gradient is, whatever the source (semantics 7.1).
    neutral = store.rows("factual", torch.from_numpy((index["type"] != TRAINING).to_numpy().nonzero()[0])).to(device)
    model = _new_model(store, params, training, seed).to(device)
    transitions = index.loc[(index["split"] == "train") & (index["type"] == TRAINING), "transition"].to_numpy()
    groups = {name: np.flatnonzero(transitions == name) for name in np.unique(transitions)}
    order = batches(groups, params.train_batch_size, seed)
    optimizer = build_optimizer(model, params)
    history = [{"step": 0, "loss": math.nan} | evaluate(model, validation, neutral)]
    best_step, best = 0, copy.deepcopy(model)
    losses: list[float] = []
    for step in track(range(1, params.max_steps + 1), f"seed {seed}"):
        rows = [training.batch_mean(next(order)) for _ in range(params.gradiend_batch_size)]
        source, target = (torch.stack(part) for part in zip(*rows, strict=True))
        losses.append(training_step(model, optimizer, source, target, params.scaling))
        if step % params.eval_steps == 0 or step == params.max_steps:
            history.append({"step": step, "loss": float(np.mean(losses))} | evaluate(model, validation, neutral))
            losses.clear()
            if abs(history[-1]["correlation"]) > max(abs(line["correlation"]) for line in history[:-1]):
                best_step, best = step, copy.deepcopy(model)
    return _orient(Trained(best.cpu(), pd.DataFrame(history), best_step))


def training_step(
    model: GradiendModel, optimizer: torch.optim.Optimizer, source: Tensor, target: Tensor, scaling: str
) -> float:
    """One optimiser step on gradient rows [B, n] in true units; returns the loss before it.

    Under scale_free the squared error of normalised gradients is summed over entries (mean over rows), so that it
    does not shrink with n and Adam's epsilon never matters; under reference it is the mean over all B·n elements.
    """
    error = (model(source) - target) / model.target_scale
    squared = error.square()
    loss = squared.mean() if scaling == "reference" else squared.sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def build_optimizer(model: GradiendModel, params: Train) -> torch.optim.Optimizer:
    """AdamW or Adam; under scale_free the encoder's rate is divided by √n, the unit of its initial weights."""
    unit = 1 / math.sqrt(model.selection.n) if params.scaling == "scale_free" else 1.0
    groups = [
        {"params": list(model.encoder.parameters()), "lr": params.learning_rate * unit},
        {"params": list(model.decoder.parameters()), "lr": params.learning_rate},
    ]
    kind = torch.optim.AdamW if params.optim == "adamw" else torch.optim.Adam
    return kind(groups, weight_decay=params.weight_decay, eps=params.adam_epsilon)


def evaluate(model: GradiendModel, validation: RowSet, neutral: Tensor) -> dict[str, float]:
    """Correlation, R² of the reconstruction, mean encodings of the classes and of neutral gradients [rows, n]."""
    with torch.no_grad():
        encoded = model.encode(validation.source)
        r2 = r_squared(validation.target, model.decode(encoded))
        encodings = encoded[:, 0].double().cpu().numpy()
        neutral_encodings = model.encode(neutral)[:, 0].double().cpu().numpy()
    return {
        "correlation": pearson(encodings, validation.labels),
        "r2": r2,
        "mean_positive": float(encodings[validation.labels > 0].mean()),
        "mean_negative": float(encodings[validation.labels < 0].mean()),
        "mean_neutral": float(neutral_encodings.mean()) if len(neutral_encodings) else math.nan,
    }


def r_squared(target: Tensor, reconstruction: Tensor) -> float:
    """1 - Σ(y - ŷ)² / Σ(y - ȳ)² over all rows and entries, with ȳ the mean of each entry over the rows given."""
    residual = (target - reconstruction).double().square().sum()
    total = (target - target.mean(0)).double().square().sum()
    return float(1 - residual / total)


def _new_model(store: GradientStore, params: Train, training: RowSet, seed: int) -> GradiendModel:
    scale_free = params.scaling == "scale_free"
    provenance: dict[str, Any] = {key: store.metadata[key]["path"] for key in ("base_model", "dataset")}
    model = GradiendModel(
        store.selection,
        target_classes=tuple(store.metadata["target_classes"]),
        source=params.source,
        target=params.target,
        latent_dim=params.latent_dim,
        activation_encoder=params.activation_encoder,
        activation_decoder=params.activation_decoder,
        bias_decoder=params.bias_decoder,
        source_scale=_root_mean_square(training.source) if scale_free else 1.0,
        target_scale=_root_mean_square(training.target) if scale_free else 1.0,
        metadata=provenance | {"seed": seed},
    )
    model.reset_parameters(seed, zero_decoder_bias=scale_free)
    return model


def _root_mean_square(rows: Tensor) -> float:
    return float(rows.double().square().mean().sqrt()) or 1.0


def _orient(trained: Trained) -> Trained:
    line = trained.history.loc[trained.history["step"] == trained.best_step].iloc[0]
    if line["mean_positive"] >= line["mean_negative"]:
        return trained
    trained.model.flip()
    signed = ["correlation", "mean_positive", "mean_negative", "mean_neutral"]
    return Trained(trained.model, trained.history.assign(**-trained.history[signed]), trained.best_step)
