"""The gradient of one parameter tensor from the input a and the output gradient d of the module that uses it.

Each rule gives the gradients of N examples at the kept entries of its tensor: per example, Σ_t d_t a_tᵀ for the weight
of a linear layer, Σ_t d_t for a bias, and so on, accumulated in float32 whatever the model's number format.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gradiend_core.gradients.products import Lines, OuterProduct, Scratch, occurring, pick, put

# Entries of gradients that the general rule holds at a time, on top of its result.
_CHUNK = 2**24

# With so few entries of an embedding in use (token types), products are cheaper than a scatter: up to 15 times where
# most features of an entry are kept.
_FEW_ENTRIES = 64

# Below this share of kept entries it is cheaper to select before the sum over positions than after it.
_FEW = 0.1


class NotSeparatedError(Exception):
    """A module's contribution cannot be told apart by example."""


class Use(NamedTuple):
    """The place where a parameter takes part: the module that owns it (for an embedding table any owner), and how."""

    module: nn.Module
    attribute: str


class Rule(Protocol):
    """Made for a tensor of `shape` and its `kept` flat positions (None: all); applied call by call."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, scratch: Scratch) -> None: ...

    def put(self, out: Tensor, use: Use, a: Tensor, d: Tensor, *, first: bool) -> None:
        """The gradients of one call with input `a` [N, …] and output gradient `d` [N, …]: written to `out` [N, kept]
        if it is the first call, whatever was there; else added to it."""


class LinearWeight:
    """Weight [output, input] of `nn.Linear`."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, scratch: Scratch) -> None:
        self._product = OuterProduct(shape, kept, scratch)

    def put(self, out: Tensor, use: Use, a: Tensor, d: Tensor, *, first: bool) -> None:
        self._product.put(out, _by_position(d), _by_position(a), first=first)


class Conv1DWeight(LinearWeight):
    """Weight [input, output] of transformers' `Conv1D`."""

    def put(self, out: Tensor, use: Use, a: Tensor, d: Tensor, *, first: bool) -> None:
        self._product.put(out, _by_position(a), _by_position(d), first=first)


class Bias:
    """What is added to every position of the output."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, scratch: Scratch) -> None:
        self._kept = kept

    def put(self, out: Tensor, use: Use, a: Tensor, d: Tensor, *, first: bool) -> None:
        put(out, _sum(_by_position(d), self._kept), first)


class LayerNormWeight:
    """Weight of `nn.LayerNorm` over the last dimension: Σ_t d_t x̂_t, with x̂ the normalised input."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, scratch: Scratch) -> None:
        self._shape, self._kept = shape, kept

    def put(self, out: Tensor, use: Use, a: Tensor, d: Tensor, *, first: bool) -> None:
        # With a weight and a bias torch takes half the time, for the same bits.
        one, zero = out.new_ones(self._shape), out.new_zeros(self._shape)
        normalised = F.layer_norm(a.to(out.dtype), self._shape, one, zero, use.module.eps)  # type: ignore[arg-type]
        put(out, _sum(_by_position(d.to(out.dtype) * normalised), self._kept), first)


class EmbeddingWeight:
    """Weight [entries, features] of `F.embedding`; `a` holds the entry of each position, -1 where it takes no part.

    Lines of d are added up where the entry is; or, where few entries are kept, Σ_t onehot_t d_tᵀ.
    """

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, scratch: Scratch) -> None:
        self._lines = Lines(shape, kept)
        entries = torch.arange(shape[0]) if kept is None else occurring(kept // shape[1], shape[0])
        self._entries = entries if len(entries) <= _FEW_ENTRIES else None
        if self._entries is not None:
            if kept is not None:
                kept = torch.searchsorted(entries, kept // shape[1]) * shape[1] + kept % shape[1]
            self._product = OuterProduct((len(entries), shape[1]), kept, scratch)

    def put(self, out: Tensor, use: Use, a: Tensor, d: Tensor, *, first: bool) -> None:
        entries = a.reshape(len(a), -1)
        if self._entries is not None:
            one_hot = entries[:, :, None] == self._entries.to(a.device)
            self._product.put(out, one_hot.to(out.dtype), _by_position(d), first=first)
        else:
            example = torch.arange(len(a), device=a.device).repeat_interleave(entries.shape[1])
            self._lines.add(out.zero_() if first else out, example, entries.flatten(), d.reshape(-1, d.shape[-1]))


class AnyWeight:
    """Any parameter of a module without children that takes one tensor: differentiated example by example."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, scratch: Scratch) -> None:
        self._chunk = max(1, _CHUNK // (math.prod(shape) or 1))
        self._kept = kept

    def put(self, out: Tensor, use: Use, a: Tensor, d: Tensor, *, first: bool) -> None:
        weight = use.module._parameters[use.attribute]
        bare = copy.copy(use.module)  # calling the module itself would tap it again
        bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()

        def gradient(a: Tensor, d: Tensor) -> Tensor:
            def output(weight: Tensor) -> Tensor:
                return functional_call(bare, {use.attribute: weight}, (a[None],))[0]  # type: ignore[no-any-return]

            return vjp(output, weight)[1](d)[0]  # type: ignore[no-any-return]

        try:
            found = vmap(gradient, chunk_size=self._chunk)(a, d)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise NotSeparatedError(f"no gradient by example of a {type(use.module).__name__} ({reason})") from None
        put(out, _take(found.flatten(1).to(out.dtype), self._kept), first)


# By the forward function itself: a subclass that changes it (a scale, an offset) has other gradients.
RULES: Final[Mapping[object, Mapping[str, type[Rule]]]] = {
    nn.Linear.forward: {"weight": LinearWeight, "bias": Bias},
    Conv1D.forward: {"weight": Conv1DWeight, "bias": Bias},
    nn.LayerNorm.forward: {"weight": LayerNormWeight, "bias": Bias},
}


def _by_position(tensor: Tensor) -> Tensor:
    """[N, …, features] as [N, T, features]."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _take(gradients: Tensor, kept: Tensor | None) -> Tensor:
    return gradients if kept is None else gradients.index_select(1, kept)


def _sum(by_position: Tensor, kept: Tensor | None) -> Tensor:
    """Σ_t of [N, T, features] at the kept features, [N, kept]."""
    if kept is not None and len(kept) < _FEW * by_position.shape[-1]:
        by_position, kept = pick(by_position, kept), None
    return _take(by_position.sum(1, dtype=torch.float32), kept)
