"""Per-example gradients of selected entries, many examples per pass.

Parameters stay frozen; only module outputs require gradients. One forward pass keeps every hooked module's input a,
one backward pass per quantity gives the gradient d of its output, and a *rule* per module type turns the two into
the gradient of its parameters, example by example: Σ_t d_t a_tᵀ for a linear layer, and so on. A tied tensor
receives the contribution of every module that uses it. Models that have modules without a rule, with an output
shared by the whole batch, or not called at all are served by `loop_rows`: exact, one example at a time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradiend_core.gradients.losses import example_losses, paired_losses, share_input
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.selection import Selection

logger = logging.getLogger(__name__)

Rule = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, input of one example, gradient of its output) -> gradient of one parameter, with the parameter's shape."""


class Rows(NamedTuple):
    """Gradients of N examples at the n kept entries, float32; factual = alternative + diff."""

    alternative: Tensor  # [N, n]
    diff: Tensor  # [N, n]


def _linear_weight(module: nn.Module, a: Tensor, d: Tensor) -> Tensor:
    return d.reshape(-1, d.shape[-1]).T @ a.reshape(-1, a.shape[-1])


def _bias(module: nn.Module, a: Tensor, d: Tensor) -> Tensor:
    return d.reshape(-1, d.shape[-1]).sum(0)


def _layer_norm_weight(module: nn.Module, a: Tensor, d: Tensor) -> Tensor:
    normalised = F.layer_norm(a, module.normalized_shape, None, None, module.eps)  # type: ignore[arg-type]
    return (d * normalised).reshape(-1, d.shape[-1]).sum(0)


def _embedding_weight(module: nn.Module, a: Tensor, d: Tensor) -> Tensor:
    padding_idx = getattr(module, "padding_idx", None)
    known = a.reshape(-1) != (-1 if padding_idx is None else padding_idx)
    gradient = torch.zeros_like(module.weight)  # type: ignore[arg-type]
    return gradient.index_add_(0, a.reshape(-1)[known], d.reshape(-1, d.shape[-1])[known])


# Chosen by the forward function itself: a subclass that changes it (scaled or offset embeddings) has other gradients.
_RULES: dict[object, dict[str, Rule]] = {
    nn.Linear.forward: {"weight": _linear_weight, "bias": _bias},
    nn.LayerNorm.forward: {"weight": _layer_norm_weight, "bias": _bias},
    nn.Embedding.forward: {"weight": _embedding_weight},
}


class GradientCollector:
    """Computes `Rows` of a base model at a selection; freezes the model's parameters."""

    def __init__(self, model: PreTrainedModel, selection: Selection) -> None:
        self._model = model.requires_grad_(False)
        self._selection = selection
        self._targets, without_rule = find_targets(model, selection)
        self._one_by_one = bool(without_rule)
        if without_rule:
            logger.info("no batched rule for %s: one example at a time", ", ".join(without_rule))

    def rows(self, factual: Sequence[Example], alternative: Sequence[Example]) -> Rows:
        """The rows of N examples, given each one's factual and alternative encoding."""
        if not self._one_by_one:
            try:
                return self._batched_rows(factual, alternative)
            except _NotSeparated as reason:
                logger.info("%s: one example at a time", reason)
                self._one_by_one = True
        return loop_rows(self._model, self._selection, factual, alternative)

    def _batched_rows(self, factual: Sequence[Example], alternative: Sequence[Example]) -> Rows:
        result = Rows(*(torch.empty(len(factual), self._selection.n) for _ in range(2)))
        shared = [share_input(plus, minus) for plus, minus in zip(factual, alternative, strict=True)]
        for together in (True, False):
            chosen = [row for row, same in enumerate(shared) if same is together]
            if chosen:
                part = self._batch([factual[row] for row in chosen], [alternative[row] for row in chosen], together)
                for whole, some in zip(result, part, strict=True):
                    whole[chosen] = some.cpu()
        return result

    def _batch(self, factual: Sequence[Example], alternative: Sequence[Example], together: bool) -> Rows:
        if together:
            return Rows(*self._gradients(len(factual), lambda: paired_losses(self._model, factual, alternative)))
        (minus,) = self._gradients(len(factual), lambda: (example_losses(self._model, alternative),))
        (plus,) = self._gradients(len(factual), lambda: (example_losses(self._model, factual),))
        return Rows(minus, plus - minus)

    def _gradients(self, n: int, losses: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        """For each loss vector [N] that one forward pass gives: the gradients [N, n] of its entries."""
        with _Tape([module for module, _ in self._targets], n) as tape, torch.enable_grad():
            values = losses()
        tape.require_calls()
        results = []
        for position, value in enumerate(values):
            keep = position + 1 < len(values)
            found = torch.autograd.grad(value.sum(), [call.output for call in tape.calls], retain_graph=keep)
            results.append(self._contract(n, tape.calls, found))
        return results

    def _contract(self, n: int, calls: "list[_Call]", output_gradients: Sequence[Tensor]) -> Tensor:
        """Turn the module inputs and output gradients of a pass into rows [N, n]."""
        rows = torch.zeros(n, self._selection.n, device=self._model.device)
        columns = torch.tensor([0, *self._selection.sizes]).cumsum(0).tolist()
        by_module = dict(self._targets)
        for call, d in zip(calls, output_gradients, strict=True):
            for tensor, rule in by_module[call.module]:
                kept = self._selection.kept[tensor]
                span = slice(columns[tensor], columns[tensor + 1])
                for row in range(n):
                    gradient = rule(call.module, call.input[row], d[row]).reshape(-1)
                    rows[row, span] += gradient if kept is None else gradient[kept]
        return rows


def find_targets(
    model: nn.Module, selection: Selection
) -> tuple[list[tuple[nn.Module, list[tuple[int, Rule]]]], list[str]]:
    """Which modules to hook: (module, [(index into selection.names, rule)]), and the names of modules without a rule.

    A pure look at the module tree; nothing is hooked. Tensors without kept entries are left out.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = zip(selection.names, selection.sizes, strict=True)
    index = {id(parameters[name]): i for i, (name, n) in enumerate(sizes) if n}
    targets, without_rule = [], []
    for name, module in model.named_modules():
        owned = {attribute: index[id(p)] for attribute, p in module._parameters.items() if id(p) in index}
        rules = _RULES.get(type(module).forward, {})
        if owned and owned.keys() <= rules.keys():
            targets.append((module, [(tensor, rules[attribute]) for attribute, tensor in owned.items()]))
        elif owned:
            without_rule.append(name)
    return targets, without_rule


def loop_rows(
    model: PreTrainedModel, selection: Selection, factual: Sequence[Example], alternative: Sequence[Example]
) -> Rows:
    """The same rows by plain autograd, one example per pass: exact for every module, slow."""
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name].requires_grad_(True) for name in selection.names}
    pairs: list[tuple[Tensor, Tensor]] = []
    try:
        for plus, minus in zip(factual, alternative, strict=True):
            if share_input(plus, minus):
                losses = [value.sum() for value in paired_losses(model, [plus], [minus])]
                pairs.append((_plain(losses[0], chosen, selection), _plain(losses[1], chosen, selection)))
            else:
                g_minus = _plain(example_losses(model, [minus]).sum(), chosen, selection)
                pairs.append((g_minus, _plain(example_losses(model, [plus]).sum(), chosen, selection) - g_minus))
    finally:
        model.requires_grad_(False)
    return Rows(torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs]))


def _plain(loss: Tensor, parameters: Mapping[str, Tensor], selection: Selection) -> Tensor:
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
    return selection.gather(dict(zip(parameters, gradients, strict=True))).detach().cpu()


class _Call(NamedTuple):
    module: nn.Module
    input: Tensor
    output: Tensor


class _NotSeparated(Exception):
    """A module's contribution cannot be told apart by example."""


class _Tape:
    """While active, records input and output of every call of the given modules, in a batch of n examples."""

    def __init__(self, modules: Sequence[nn.Module], n: int) -> None:
        self.calls: list[_Call] = []
        self._modules = modules
        self._n = n
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "_Tape":
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._separate))
            self._handles.append(module.register_forward_hook(self._record))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def require_calls(self) -> None:
        """Raise `_NotSeparated` when a module was not called: its weights may be used without it (DeBERTa)."""
        uncalled = set(self._modules) - {call.module for call in self.calls}
        if uncalled:
            kinds = sorted(type(module).__name__ for module in uncalled)
            raise _NotSeparated(f"the forward pass does not call {', '.join(kinds)}")

    def _separate(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Position ids of shape [1, T] are broadcast over the batch: their gradient would mix the examples.
        if len(inputs) != 1:
            raise _NotSeparated(f"a {type(module).__name__} is not called with one positional argument")
        (first,) = inputs
        shared = isinstance(module, nn.Embedding) and first.shape[0] == 1
        return (first.expand(self._n, *first.shape[1:]),) if shared else inputs

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.shape[0] != self._n:
            kind, shape = type(module).__name__, tuple(output.shape)
            raise _NotSeparated(f"output {shape} of a {kind} is not separated by example (batch of {self._n})")
        if not output.requires_grad:
            output.requires_grad_(True)
        self.calls.append(_Call(module, inputs[0].detach(), output))
        return output
