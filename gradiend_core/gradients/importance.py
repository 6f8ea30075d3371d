"""Importance of every entry of a base model before training: one number per entry, from a few rows (semantics 5.1).

Three statistics of the gradients g of N rows with labels l (+1 or -1):

- aligned_mean: |mean of g over the rows with l = +1 - mean of g over those with l = -1| / 2. When both classes have
  the same number of rows that is |mean of l g|; otherwise what the classes share would not cancel in the latter.
- mean: |mean of g|, the reference package's. Where the classes have opposite gradients it cancels what is looked for.
- rms: the root of the mean of g squared, which needs no labels and also counts what is the same in both classes.

The first two need no per-example gradient: one backward pass of a weighted sum of losses gives them. No vector of all
entries is formed but the result, so that memory is that of the weights, of 4 bytes for each entry looked at, of the
gradients of one tensor at a time (`importance_bytes`), and of the activations of a batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.labels import Source
from gradiend_core.gradients.losses import example_losses, paired_losses, share_input
from gradiend_core.gradients.objectives import Example
from gradiend_core.progress import track


def stratified_sample(transitions: pd.Series, n_samples: int, seed: int) -> list[int]:
    """Positions of `n_samples` rows, the same number from each transition (remainder to the first ones).

    The positions are those of the table given, so classes come out as asked (BUG-04); the sample of a larger
    `n_samples` contains the smaller one. No row is drawn twice: fewer come back when a transition has too few.
    """
    random = np.random.default_rng(seed)
    names = sorted(transitions.unique())
    shares = {name: n_samples // len(names) + (k < n_samples % len(names)) for k, name in enumerate(names)}
    shuffled = {name: random.permutation(np.flatnonzero(transitions == name)) for name in names}
    return sorted(int(position) for name in names for position in shuffled[name][: shares[name]])


def aligned_weights(labels: np.ndarray) -> np.ndarray:
    """Weights [N] with which `mean_gradient` is half the difference of the two classes' mean gradients.

    They are the labels themselves when both classes have the same number of rows. Raises `GradiendError` when one
    class has none.
    """
    plus, minus = int((labels > 0).sum()), int((labels < 0).sum())
    if not (plus and minus):
        raise GradiendError(
            f"pre_prune.statistic: aligned_mean compares two classes, but the {len(labels)} sampled rows are of one"
            " only. Raise pre_prune.n_samples to 2 or more, add training rows of the other class, or use rms."
        )
    weights: np.ndarray = labels * len(labels) / (2 * np.where(labels > 0, plus, minus))
    return weights


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
    """Mean over N examples of weight [N] times gradient of `source`, for all entries of `parameters` [n], on the CPU.

    Accumulated in float32 whatever the model's dtype, one tensor at a time; freezes the model's parameters.
    """
    sizes = [p.numel() for p in parameters.values()]
    total = torch.zeros(sum(sizes), dtype=torch.float32, device=model.device)
    handles = []
    model.requires_grad_(False)
    try:
        for parameter, part in zip(parameters.values(), total.split_with_sizes(sizes), strict=True):
            parameter.requires_grad_(True).grad = None
            hook = partial(_move_gradient, part)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        for start in track(range(0, len(factual), batch_size), "importance batches"):
            chunk = slice(start, start + batch_size)
            weight = torch.tensor(weights[chunk], dtype=torch.float32, device=model.device)
            for rows, losses in _source_losses(model, factual[chunk], alternative[chunk], source):
                (weight[rows].to(losses.device) * losses).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
    return total.cpu().div_(len(factual))


def importance_bytes(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> int:
    """Memory that `mean_gradient` needs besides the activations of a batch, in bytes: weights, result, gradients."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in parameters.values())
    # A tensor that the model uses twice (tied embeddings) has two gradients and their sum for a moment.
    return weights + 4 * sum(p.numel() for p in parameters.values()) + 3 * largest


def require_usable(importance: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Raise `GradiendError` when `importance` [n] of the entries of `parameters` cannot tell them apart.

    That is when an entry is not finite, which the error traces to its parameter, or when all are zero.
    """
    largest = float(torch.aminmax(importance).max)  # nan when any entry is
    if largest == 0:
        raise GradiendError(
            "pre_prune: the gradient of every selected parameter is zero on the sampled rows, so that none matters"
            " more than another. Select parameters that the loss depends on (pre_prune.params)."
        )
    if not math.isfinite(largest):
        parts = importance.split_with_sizes([p.numel() for p in parameters.values()])
        names = [name for name, part in zip(parameters, parts, strict=True) if not bool(torch.isfinite(part).all())]
        raise GradiendError(
            f"pre_prune: gradients of {len(names)} of {len(parameters)} parameters are not finite, the first of"
            f" {names[0]}. Check that the base model's weights are finite, leave such parameters out"
            " (pre_prune.params), or use a base model in float32."
        )


def _move_gradient(into: Tensor, parameter: Tensor) -> None:
    """Add a gradient where it belongs and free it, so that no two tensors' gradients exist together."""
    if parameter.grad is not None:
        into.add_(parameter.grad.reshape(-1).to(into.device))
    parameter.grad = None


def _source_losses(
    model: PreTrainedModel, factual: Sequence[Example], alternative: Sequence[Example], source: Source
) -> Iterator[tuple[list[int], Tensor]]:
    """Which rows, and scalars [rows] that have the gradient of `source`, one forward pass after the other."""
    everything = list(range(len(factual)))
    if source == "factual":
        yield everything, example_losses(model, factual)
    elif source == "alternative":
        yield everything, example_losses(model, alternative)
    else:
        shared = [share_input(plus, minus) for plus, minus in zip(factual, alternative, strict=True)]
        together = [row for row in everything if shared[row]]
        if together:
            pairs = ([examples[row] for row in together] for examples in (factual, alternative))
            yield together, paired_losses(model, *pairs)[1]
        apart = [row for row in everything if not shared[row]]
        if apart:
            yield apart, example_losses(model, [factual[row] for row in apart])
            yield apart, -example_losses(model, [alternative[row] for row in apart])
