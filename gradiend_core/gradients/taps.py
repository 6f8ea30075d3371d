"""Where a model uses given parameters, and what flows there: the input a and the output gradient d of each use.

Parameters stay frozen. While `Taps` are active, the output of every module that owns a wanted parameter passes through
an identity function that saves the module's input; in the backward pass it hands (a, d) to a receiver. So only
activation gradients are computed, each (a, d) is dropped as soon as it is used, and since a is an ordinary saved
tensor, gradient checkpointing frees and recomputes it like any other. Embeddings are tapped at the `F.embedding` that
their modules call: subclasses that scale the result or shift the positions (Gemma, OPT) need no rule of their own.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradiend_core.gradients.objectives import Example, Slots, padded_length
from gradiend_core.gradients.rules import RULES, AnyWeight, EmbeddingWeight, NotSeparatedError, Rule, Use

Receiver = Callable[[int, type[Rule], Use, Tensor, Tensor], None]
"""Called with the index of the tensor, its rule and use, the input a and the output gradient d of one call."""


@dataclass
class Sites:
    """Where the wanted tensors of a model are used; tensors are named by their index."""

    modules: dict[nn.Module, list[tuple[int, type[Rule], Use]]] = field(default_factory=dict)
    embeddings: dict[int, tuple[int, Use]] = field(default_factory=dict)  # id of the weight -> tensor, use
    without_rule: list[str] = field(default_factory=list)  # modules whose use of a parameter is not known
    tables: list[nn.Embedding] = field(default_factory=list)  # every embedding, wanted or not

    @classmethod
    def find(cls, model: nn.Module, tensors: Mapping[nn.Parameter, int]) -> Self:
        """A pure look at the module tree; nothing is hooked."""
        sites = cls()
        for name, module in model.named_modules():
            owned = {attribute: p for attribute, p in module._parameters.items() if p is not None and p in tensors}
            if isinstance(module, nn.Embedding):
                sites.tables.append(module)
                sites.embeddings |= {id(p): (tensors[p], Use(module, attribute)) for attribute, p in owned.items()}
                continue
            rules = RULES.get(type(module).forward, {})
            if owned and not rules and any(True for _ in module.children()):
                sites.without_rule.append(name)
            elif owned:
                sites.modules[module] = [
                    (tensors[p], rules.get(attribute, AnyWeight), Use(module, attribute))
                    for attribute, p in owned.items()
                ]
        return sites


class Taps:
    """Taps a model's wanted tensors, in passes over a batch of N examples (see `losses` for what the head is given).

    Stay inside the context until the backward passes are over: gradient checkpointing runs the forward pass again.
    """

    def __init__(self, sites: Sites, examples: Sequence[Example]) -> None:
        self._sites = sites
        self._n = len(examples)
        self._flat = self._n * padded_length(examples)
        self._slots = Slots.of(examples)
        self._was_flat = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._called: set[object] = set()
        self._embeddings = _Embeddings(self._called, sites.embeddings, self._embedding)
        self._receive: Receiver | None = None
        # Without a leaf that requires a gradient, autograd would not run through a frozen model at all.
        self._root = torch.zeros((), requires_grad=True)

    def __enter__(self) -> Self:
        for module in self._sites.modules:
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        for table in self._sites.tables:
            self._handles.append(table.register_forward_pre_hook(self._watch))
            self._handles.append(table.register_forward_hook(self._watched, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(self, loss: Tensor, receive: Receiver, *, again: bool) -> None:
        """Run the backward pass of a scalar; `again` when another one through the same graph follows.

        Raises `NotSeparatedError` when a tensor's module was not called: its weights may be used without it (DeBERTa).
        """
        uncalled = [module for module in self._sites.modules if module not in self._called]
        # Where a table is used without a call, outputs that it shares with the batch could be taken for flat ones.
        tables = (t for t in self._sites.tables if self._was_flat or id(t.weight) in self._sites.embeddings)
        uncalled += [table for table in tables if id(table.weight) not in self._called]
        if uncalled:
            kinds = sorted({type(module).__name__ for module in uncalled})
            raise NotSeparatedError(f"the forward pass does not call {', '.join(kinds)}")
        self._receive = receive
        torch.autograd.grad(loss, self._root, retain_graph=again, allow_unused=True)

    def _watch(self, table: nn.Module, args: Any) -> None:
        self._embeddings.__enter__()  # type: ignore[no-untyped-call]

    def _watched(self, table: nn.Module, args: Any, output: Any) -> None:
        self._embeddings.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **named: Any
    ) -> Tensor:
        if any(value not in (None, 2.0, False) for value in (*rest, *named.values())):
            raise NotSeparatedError("an embedding changes its weights or scales its gradient by frequency")
        # Position ids of shape [1, T] are broadcast over the batch: their gradient would mix the examples.
        ids = input.expand(self._n, *input.shape[1:]) if input.shape[0] == 1 else input
        output = F.embedding(ids, weight, padding_idx, *rest, **named)
        tensor, use = self._sites.embeddings[id(weight)]
        entries = ids if padding_idx is None else ids.masked_fill(ids == padding_idx % len(weight), -1)
        return self._tap(use.module, output, entries, [(tensor, EmbeddingWeight, use)])

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise NotSeparatedError(f"a {type(module).__name__} does not turn one tensor into one tensor")
        self._called.add(module)
        return self._tap(module, output, inputs[0], self._sites.modules[module])

    def _tap(self, module: nn.Module, output: Tensor, a: Tensor, uses: list[tuple[int, type[Rule], Use]]) -> Tensor:
        # Some models (OPT) run layers on all positions of all examples in one dimension.
        flat = output.dim() == 2 and len(output) == len(a) == self._flat
        self._was_flat |= flat
        packed = output.shape[:2] == a.shape[:2] == (1, len(self._slots.row))
        if not (flat or packed or len(output) == len(a) == self._n):
            kind, shape = type(module).__name__, tuple(output.shape)
            raise NotSeparatedError(f"output {shape} of a {kind} is not separated by example (batch of {self._n})")
        if not torch.is_grad_enabled():
            return output

        def receive(a: Tensor, d: Tensor) -> None:
            if packed:
                a, d = self._unpack(a, d)
            elif flat:
                a, d = (tensor.reshape(self._n, -1, tensor.shape[-1]) for tensor in (a, d))
            for tensor, rule, use in uses:
                self._receive(tensor, rule, use, a.to(d.device), d)  # type: ignore[misc]

        return _Tap.apply(output, self._root, a, receive)  # type: ignore[no-any-return, no-untyped-call]

    def _unpack(self, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """a, d [1, P, features] by example, [N, L, features]; d is zero where an example has fewer positions."""
        if self._slots.places.shape[1] == 1:
            return a.transpose(0, 1), d.transpose(0, 1)
        slots = self._slots.to(d.device)
        places = slots.places.flatten()
        a, d = (tensor[0].index_select(0, places.to(tensor.device)) for tensor in (a, d))
        d.index_fill_(0, (~slots.present).flatten().nonzero()[:, 0], 0.0)
        return a.view(self._n, -1, *a.shape[1:]), d.view(self._n, -1, *d.shape[1:])


class _Embeddings(TorchFunctionMode):
    """While a table's module is called: `embed` instead of `F.embedding` for the `wanted` tables."""

    def __init__(self, called: set[object], wanted: Container[int], embed: Callable[..., Tensor]) -> None:
        super().__init__()
        self._called, self._wanted, self._embed = called, wanted, embed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every call of a torch function passes here."""
        if func is F.embedding:
            self._called.add(id(args[1]))
            if id(args[1]) in self._wanted:
                return self._embed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Tap(torch.autograd.Function):
    """The identity; its backward pass hands the saved input and the gradient of the output to `receive`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor, a: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a)
        ctx.receive = receive
        # Detached, the result is a tensor of its own to autograd: models may change it in place.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if d is not None:
            ctx.receive(ctx.saved_tensors[0], d)
        return d, None, None, None
