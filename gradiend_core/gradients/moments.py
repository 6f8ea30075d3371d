"""Second moments of per-example gradients, without a per-example gradient of the whole model."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradiend_core.gradients.labels import Source
from gradiend_core.gradients.losses import example_losses, paired_losses, share_input
from gradiend_core.gradients.objectives import Example, padded_length
from gradiend_core.gradients.rules import NotSeparatedError, Rule, Use
from gradiend_core.gradients.taps import Sites, Taps
from gradiend_core.progress import track

# Entries of per-example gradients held at a time: at least one example's gradient of the largest tensor.
_CHUNK = 2**24

logger = logging.getLogger(__name__)

Calls = list[tuple[type[Rule], Use, Tensor, Tensor]]


def second_moment(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    factual: Sequence[Example],
    alternative: Sequence[Example],
    *,
    source: Source,
    batch_size: int,
) -> Tensor:
    """Mean over N examples of the squared gradient of `source`, for all entries of `parameters` [n], on the CPU.

    Tensor by tensor, from the inputs and output gradients of the modules that use it (`taps`). Memory: the model, the
    result, the gradient of one example for the largest tensor, and twice the activations of a batch.
    """
    model.requires_grad_(False)
    sizes = [p.numel() for p in parameters.values()]
    moments = torch.zeros(sum(sizes), device=model.device)
    totals = torch.split(moments, sizes)  # views, filled tensor by tensor
    chunks = [slice(start, start + batch_size) for start in range(0, len(factual), batch_size)]
    sites = Sites.find(model, {p: i for i, p in enumerate(parameters.values())})
    try:
        if sites.without_rule:
            raise NotSeparatedError(f"no rule for the parameters of {', '.join(sites.without_rule)}")
        for chunk in track(chunks, "second moments"):
            _add_batch(totals, model, sites, list(parameters.values()), factual[chunk], alternative[chunk], source)
    except NotSeparatedError as reason:
        logger.info("%s: one example at a time", reason)
        moments.zero_()
        pairs = list(zip(factual, alternative, strict=True))
        for plus, minus in track(pairs, "second moments"):
            _add_one(totals, model, list(parameters.values()), plus, minus, source)
    return moments.div_(len(factual)).cpu()


def _losses(model: PreTrainedModel, factual: Sequence[Example], alternative: Sequence[Example], source: str) -> Tensor:
    """The loss [N] whose gradient is the one asked for."""
    if source == "factual":
        return example_losses(model, factual)
    if source == "alternative":
        return example_losses(model, alternative)
    if all(share_input(plus, minus) for plus, minus in zip(factual, alternative, strict=True)):
        return paired_losses(model, factual, alternative)[1]
    return example_losses(model, factual) - example_losses(model, alternative)


def _add_batch(
    totals: Sequence[Tensor],
    model: PreTrainedModel,
    sites: Sites,
    parameters: list[nn.Parameter],
    factual: Sequence[Example],
    alternative: Sequence[Example],
    source: str,
) -> None:
    calls: dict[int, Calls] = defaultdict(list)
    widths = {padded_length(factual), padded_length(alternative)}
    with Taps(sites, len(factual), widths) as taps, torch.enable_grad():
        loss = _losses(model, factual, alternative, source).sum()
        taps.backward(loss, lambda tensor, *call: calls[tensor].append(call), again=False)
    with torch.no_grad():
        for tensor, (total, parameter) in enumerate(zip(totals, parameters, strict=True)):
            total += _sum_of_squares(parameter.shape, calls[tensor], len(factual)).to(total.device)


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


def _add_one(
    totals: Sequence[Tensor],
    model: PreTrainedModel,
    parameters: list[nn.Parameter],
    factual: Example,
    alternative: Example,
    source: str,
) -> None:
    for p in parameters:
        p.requires_grad_(True)
    try:
        loss = _losses(model, [factual], [alternative], source).sum()
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.flatten().float().square().to(total.device)
    finally:
        model.requires_grad_(False)
