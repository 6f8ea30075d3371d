"""Second moments of per-example gradients, without a per-example gradient of the whole model."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradiend_core.gradients.labels import Source
from gradiend_core.gradients.losses import example_losses, paired_losses, share_input
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.products import Scratch
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
    scratch = Scratch()
    sites = Sites.find(model, {p: i for i, p in enumerate(parameters.values())})
    try:
        if sites.without_rule:
            raise NotSeparatedError(f"no rule for the parameters of {', '.join(sites.without_rule)}")
        for chunk in track(chunks, "second moments"):
            calls = _calls(model, sites, factual[chunk], alternative[chunk], source)
            n = len(factual[chunk])
            with torch.no_grad():
                for tensor, (total, parameter) in enumerate(zip(totals, parameters.values(), strict=True)):
                    total += _sum_of_squares(parameter.shape, calls[tensor], n, scratch).to(total.device)
    except NotSeparatedError as reason:
        logger.info("%s: one example at a time", reason)
        moments.zero_()
        pairs = list(zip(factual, alternative, strict=True))
        for plus, minus in track(pairs, "second moments"):
            _add_one(totals, model, list(parameters.values()), plus, minus, source)
    return moments.div_(len(factual)).cpu()


def _losses(
    model: PreTrainedModel, factual: Sequence[Example], alternative: Sequence[Example], source: str
) -> Iterator[tuple[Sequence[Example], Callable[[], Tensor]]]:
    """Losses [N] whose gradients add up to the one asked for, with the examples that each passes through the model."""
    if source == "diff" and all(share_input(plus, minus) for plus, minus in zip(factual, alternative, strict=True)):
        yield factual, lambda: paired_losses(model, factual, alternative)[1]
        return
    if source in {"factual", "diff"}:
        yield factual, lambda: example_losses(model, factual)
    if source in {"alternative", "diff"}:
        sign = -1 if source == "diff" else 1
        yield alternative, lambda: sign * example_losses(model, alternative)


def _calls(
    model: PreTrainedModel, sites: Sites, factual: Sequence[Example], alternative: Sequence[Example], source: str
) -> Mapping[int, Calls]:
    """What flows at each use of each tensor, in backward passes of the batch."""
    calls: dict[int, Calls] = defaultdict(list)
    for examples, losses in _losses(model, factual, alternative, source):
        with Taps(sites, examples) as taps, torch.enable_grad():
            taps.backward(losses().sum(), lambda tensor, *call: calls[tensor].append(call), again=False)
    return calls


def _sum_of_squares(shape: tuple[int, ...], calls: Calls, n: int, scratch: Scratch) -> Tensor:
    """Σ_n of the squared gradient of one tensor [numel]; the gradient of an example is the sum over all calls."""
    size = math.prod(shape)
    device = calls[0][3].device if calls else None
    total = torch.zeros(size, device=device)
    rules = {rule: rule(shape, None, scratch) for rule, *_ in calls}
    step = max(1, _CHUNK // (size or 1))
    for start in range(0, n if calls else 0, step):
        gradients = scratch("gradients", total, min(step, n - start), size)
        for number, (rule, use, a, d) in enumerate(calls):
            part = slice(start, start + step)
            rules[rule].put(gradients, use, a[part], d[part], first=number == 0)
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
        losses = [losses() for _, losses in _losses(model, [factual], [alternative], source)]
        gradients = torch.autograd.grad(torch.cat(losses).sum(), parameters, materialize_grads=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.flatten().float().square().to(total.device)
    finally:
        model.requires_grad_(False)
