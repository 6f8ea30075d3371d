"""Importance of every entry before training: one number per entry, from one mean gradient (semantics 5.1)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradiend_core.gradients.losses import example_losses
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.selection import Selection

Source = Literal["factual", "alternative", "diff"]


def class_label(rows: pd.DataFrame, target_classes: Sequence[str], source: Source) -> np.ndarray:
    """+1 or -1 for the class whose gradient `source` stands for, 0 for others (semantics 2.5).

    +1 when the factual class is the first target class, -1 when it is the second; negated for source alternative.
    """
    signs = {target_classes[0]: 1.0, target_classes[1]: -1.0}
    labels = rows["factual_class"].map(signs).fillna(0.0).to_numpy(dtype=np.float64)
    return -labels + 0.0 if source == "alternative" else labels


def stratified_sample(transitions: pd.Series, n_samples: int, seed: int) -> list[int]:
    """Positions of `n_samples` rows, the same number from each transition (remainder to the first ones).

    The positions are those of the table given, so classes come out as asked (BUG-04); the sample of a larger
    `n_samples` contains the smaller one. Fewer rows come back when a transition has too few.
    """
    random = np.random.default_rng(seed)
    names = sorted(transitions.unique())
    shares = {name: n_samples // len(names) + (k < n_samples % len(names)) for k, name in enumerate(names)}
    shuffled = {name: random.permutation(np.flatnonzero(transitions == name)) for name in names}
    return sorted(int(position) for name in names for position in shuffled[name][: shares[name]])


def mean_gradient(
    model: PreTrainedModel,
    parameters: dict[str, torch.nn.Parameter],
    factual: Sequence[Example],
    alternative: Sequence[Example],
    weights: np.ndarray,
    *,
    source: Source,
    batch_size: int,
) -> Tensor:
    """Mean over examples of weight times gradient of `source`, for all entries of `parameters` [n].

    One backward pass of a weighted sum of losses: per-example gradients are never formed.
    """
    model.requires_grad_(False)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    for start in range(0, len(factual), batch_size):
        chunk = slice(start, start + batch_size)
        share = torch.tensor(weights[chunk] / len(factual), dtype=torch.float32, device=model.device)
        loss = torch.zeros((), device=model.device)
        if source != "alternative":
            loss = loss + (share * example_losses(model, factual[chunk])).sum()
        if source != "factual":
            sign = 1.0 if source == "alternative" else -1.0
            loss = loss + sign * (share * example_losses(model, alternative[chunk])).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient
    model.requires_grad_(False)
    return Selection.everything(parameters).gather(total).detach().cpu()
