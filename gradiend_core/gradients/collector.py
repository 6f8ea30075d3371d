"""Per-example gradients of selected entries, many examples per pass.

One forward pass serves both quantities of a row; each has one backward pass that carries activation gradients only
(`taps`). A rule per kind of module turns them into gradients of the selected entries, example by example (`rules`,
`products`). What cannot be told apart by example is served by `loop_rows`: exact, one example at a time.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradiend_core.gradients.losses import example_losses, paired_losses, share_input
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.products import Scratch, put
from gradiend_core.gradients.rules import NotSeparatedError, Rule, Use
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.taps import Receiver, Sites, Taps

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Gradients of N examples at the n kept entries, float32; factual = alternative + diff."""

    alternative: Tensor  # [N, n]
    diff: Tensor  # [N, n]


class GradientCollector:
    """Computes `Rows` of a base model at a selection, on the model's device; freezes the model's parameters."""

    def __init__(self, model: PreTrainedModel, selection: Selection, *, one_by_one: bool = False) -> None:
        self.model = model.requires_grad_(False)
        self.selection = selection
        self._sites = find_sites(model, selection)
        self._rules: dict[tuple[int, type[Rule]], Rule] = {}
        self._scratch = Scratch()
        starts = torch.tensor([0, *selection.sizes]).cumsum(0).tolist()
        self._spans = [slice(*ends) for ends in pairwise(starts)]
        self.one_by_one = one_by_one
        if self._sites.without_rule and not one_by_one:
            self._go_one_by_one(f"no rule for the parameters of {', '.join(self._sites.without_rule)}")

    def for_another_thread(self) -> "GradientCollector":
        """A collector of the same rows that may be used at the same time: its modules are copies, the weights are not.

        For models on one device.
        """
        weights = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.model.parameters()}
        buffers = {id(buffer): buffer for buffer in self.model.buffers()}
        model = copy.deepcopy(self.model, {**weights, **buffers})
        return GradientCollector(model, self.selection, one_by_one=self.one_by_one)

    def rows(self, factual: Sequence[Example], alternative: Sequence[Example], out: Rows | None = None) -> Rows:
        """The rows of N examples, given each one's factual and alternative encoding.

        With `out`, matrices of at least N rows from `buffer`, they are views of its first N rows: touching fresh memory
        for every batch can cost as much as a third of the arithmetic.
        """
        result = Rows(*(matrix[: len(factual)] for matrix in out or self.buffer(len(factual))))
        if not self.one_by_one:
            try:
                self._batched_rows(factual, alternative, result)
                return result
            except NotSeparatedError as reason:
                self._go_one_by_one(str(reason))
        for matrix, rows in zip(result, loop_rows(self.model, self.selection, factual, alternative), strict=True):
            matrix.copy_(rows)
        return result

    def _go_one_by_one(self, reason: str) -> None:
        logger.info("%s: one example at a time", reason)
        self.one_by_one = True

    def buffer(self, n: int) -> Rows:
        """Memory for the rows of n examples; its values mean nothing."""
        return Rows(*(torch.empty(n, self.selection.n, device=self.model.device) for _ in range(2)))

    def _batched_rows(self, factual: Sequence[Example], alternative: Sequence[Example], result: Rows) -> None:
        shared = [share_input(plus, minus) for plus, minus in zip(factual, alternative, strict=True)]
        if all(shared):
            self._shared_rows(factual, alternative, result)
            return
        for same, compute in ((True, self._shared_rows), (False, self._separate_rows)):
            chosen = [row for row, is_shared in enumerate(shared) if is_shared is same]
            if chosen:
                part = self.buffer(len(chosen))
                compute([factual[row] for row in chosen], [alternative[row] for row in chosen], part)
                for whole, some in zip(result, part, strict=True):
                    whole[chosen] = some

    def _shared_rows(self, factual: Sequence[Example], alternative: Sequence[Example], result: Rows) -> None:
        self._gradients(factual, lambda: paired_losses(self.model, factual, alternative), result)

    def _separate_rows(self, factual: Sequence[Example], alternative: Sequence[Example], result: Rows) -> None:
        self._gradients(alternative, lambda: (example_losses(self.model, alternative),), [result.alternative])
        self._gradients(factual, lambda: (example_losses(self.model, factual),), [result.diff])
        result.diff.sub_(result.alternative)

    def _gradients(
        self, examples: Sequence[Example], losses: Callable[[], tuple[Tensor, ...]], results: Sequence[Tensor]
    ) -> None:
        """For each loss vector [N] that one forward pass of the examples gives: the gradients [N, n] of its entries."""
        with Taps(self._sites, examples) as taps, torch.enable_grad():
            values = losses()
            for position, (value, rows) in enumerate(zip(values, results, strict=True)):
                seen: set[int] = set()
                taps.backward(value.sum(), self._receiver(rows, seen), again=position + 1 < len(values))
                for tensor in {*range(len(self._spans))} - seen:
                    rows[:, self._spans[tensor]].zero_()

    def _receiver(self, rows: Tensor, seen: set[int]) -> Receiver:
        """Puts gradients in `rows`, whose values mean nothing where a tensor is not among those that were `seen`."""

        def receive(tensor: int, rule: type[Rule], use: Use, a: Tensor, d: Tensor) -> None:
            key = (tensor, rule)
            if key not in self._rules:
                kept = self.selection.kept[tensor]
                kept = None if kept is None else kept.to(d.device)
                self._rules[key] = rule(self.selection.shapes[tensor], kept, self._scratch)
            span, first = rows[:, self._spans[tensor]], tensor not in seen
            seen.add(tensor)
            if rows.device == d.device:
                self._rules[key].put(span, use, a, d, first=first)
            else:  # a model spread over several devices
                part = torch.empty(span.shape, device=d.device)
                self._rules[key].put(part, use, a, d, first=True)
                put(span, part.to(rows.device), first)

        return receive


def find_sites(model: nn.Module, selection: Selection) -> Sites:
    """Where the tensors of a selection are used; tensors without kept entries are left out."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = zip(selection.names, selection.sizes, strict=True)
    return Sites.find(model, {parameters[name]: i for i, (name, n) in enumerate(sizes) if n})


def loop_rows(
    model: PreTrainedModel, selection: Selection, factual: Sequence[Example], alternative: Sequence[Example]
) -> Rows:
    """The same rows by plain autograd, one example per pass: exact for every module, slow."""
    pairs = [summed_rows(model, selection, [plus], [minus]) for plus, minus in zip(factual, alternative, strict=True)]
    return Rows(torch.cat([pair.alternative for pair in pairs]), torch.cat([pair.diff for pair in pairs]))


def summed_rows(
    model: PreTrainedModel, selection: Selection, factual: Sequence[Example], alternative: Sequence[Example]
) -> Rows:
    """The sum of the rows of a batch, both [1, n], by plain autograd of the batch's summed losses."""
    named = dict(model.named_parameters())
    parameters = {name: named[name].requires_grad_(True) for name in selection.names}
    total = Rows(*(torch.zeros(1, selection.n, device=model.device) for _ in range(2)))
    pairs = list(zip(factual, alternative, strict=True))
    try:
        for same in (True, False):
            chosen = [pair for pair in pairs if share_input(*pair) is same]
            if not chosen:
                continue
            plus, minus = zip(*chosen, strict=True)
            if same:
                losses = [value.sum() for value in paired_losses(model, plus, minus)]
            else:
                of_minus = example_losses(model, minus).sum()
                losses = [of_minus, example_losses(model, plus).sum() - of_minus]
            for sums, loss in zip(total, losses, strict=True):
                found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
                sums += selection.gather(dict(zip(parameters, found, strict=True))).to(sums.device)
    finally:
        model.requires_grad_(False)
    return total
