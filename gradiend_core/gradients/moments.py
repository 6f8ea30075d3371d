"""Second moments of per-example gradients, without a per-example gradient of the whole model."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradiend_core.gradients.losses import example_losses, paired_losses, share_input
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.rules import NotSeparatedError, Rule, Use
from gradiend_core.gradients.taps import Sites, Taps
from gradiend_core.progress import track

# Entries of per-example gradients held at a time: at least one example's gradient of the largest tensor.
_CHUNK = 2**24

Calls = list[tuple[type[Rule], Use, Tensor, Tensor]]


def second_moment(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    factual: Sequence[Example],
    alternative: Sequence[Example],
    *,
    source: Literal["factual", "alternative", "diff"],
    batch_size: int,
) -> Tensor:
    """Mean over N examples of the squared gradient of `source`, for all entries of `parameters` [n], on the CPU.

    Tensor by tensor, from the inputs and output gradients of the modules that use it (`taps`). Memory: the model, the
    result, the gradient of one example for the largest tensor, and twice the activations of a batch.
    """
    model.requires_grad_(False)
    totals = [torch.zeros(p.numel(), device=p.device) for p in parameters.values()]
    sites = Sites.find(model, {p: i for i, p in enumerate(parameters.values())})
    separated = not sites.without_rule
    for start in track(range(0, len(factual), batch_size), "second moments"):
        chunk = slice(start, start + batch_size)
        pairs = factual[chunk], alternative[chunk]
        if separated:
            try:
                calls = _calls(model, sites, *pairs, source)
            except NotSeparatedError:
                separated = False
        if separated:
            for tensor, total in enumerate(totals):
                total += _sum_of_squares(list(parameters.values())[tensor].shape, calls[tensor], len(pairs[0]))
        else:
            _add_one_by_one(totals, model, list(parameters.values()), *pairs, source)
    return torch.cat([total.cpu() / len(factual) for total in totals])


def _losses(model: PreTrainedModel, factual: Sequence[Example], alternative: Sequence[Example], source: str) -> Tensor:
    """The loss [N] whose gradient is the one asked for."""
    if source == "factual":
        return example_losses(model, factual)
    if source == "alternative":
        return example_losses(model, alternative)
    if all(share_input(plus, minus) for plus, minus in zip(factual, alternative, strict=True)):
        return paired_losses(model, factual, alternative)[1]
    return example_losses(model, factual) - example_losses(model, alternative)


def _calls(
    model: PreTrainedModel, sites: Sites, factual: Sequence[Example], alternative: Sequence[Example], source: str
) -> dict[int, Calls]:
    """For each tensor every call that uses it, with the input and the output gradient of the whole batch."""
    found: dict[int, Calls] = defaultdict(list)
    with Taps(sites, len(factual)) as taps, torch.enable_grad():
        loss = _losses(model, factual, alternative, source).sum()
        taps.backward(loss, lambda tensor, *call: found[tensor].append(call), again=False)
    return found


def _sum_of_squares(shape: tuple[int, ...], calls: Calls, n: int) -> Tensor:
    """Σ_n of the squared gradient of one tensor [numel]; the gradient of an example is the sum over all calls."""
    size = math.prod(shape)
    device = calls[0][3].device if calls else None
    total = torch.zeros(size, device=device)
    rules = {rule: rule(shape, None) for rule, *_ in calls}
    step = max(1, _CHUNK // (size or 1))
    for start in range(0, n if calls else 0, step):
        gradients = torch.zeros(min(step, n - start), size, device=device)
        for rule, use, a, d in calls:
            rules[rule].add(gradients, use, a[start : start + step], d[start : start + step])
        total += gradients.square_().sum(0)
    return total


def _add_one_by_one(
    totals: list[Tensor],
    model: PreTrainedModel,
    parameters: list[nn.Parameter],
    factual: Sequence[Example],
    alternative: Sequence[Example],
    source: str,
) -> None:
    for p in parameters:
        p.requires_grad_(True)
    try:
        for plus, minus in zip(factual, alternative, strict=True):
            loss = _losses(model, [plus], [minus], source).sum()
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient.flatten().float().square()
    finally:
        model.requires_grad_(False)
