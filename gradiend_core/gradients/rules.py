"""The gradient of one parameter tensor from the input a and the output gradient d of the module that uses it.

Each rule adds the gradients of N examples at the kept entries of its tensor: per example, Σ_t d_t a_tᵀ for the weight
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

from gradiend_core.gradients.products import OuterProduct

# Entries of gradients that the general rule holds at a time, on top of its result.
_CHUNK = 2**24


class NotSeparatedError(Exception):
    """A module's contribution cannot be told apart by example."""


class Use(NamedTuple):
    """The place where a parameter takes part: the module that owns it (for an embedding table any owner), and how."""

    module: nn.Module
    attribute: str


class Rule(Protocol):
    """Made for a tensor of `shape` and its `kept` flat positions (None: all); applied call by call."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None: ...

    def add(self, out: Tensor, use: Use, a: Tensor, d: Tensor) -> None:
        """Add to `out` [N, kept] the gradients of one call with input `a` [N, …] and output gradient `d` [N, …]."""


class LinearWeight:
    """Weight [output, input] of `nn.Linear`."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None:
        self._product = OuterProduct(shape, kept)

    def add(self, out: Tensor, use: Use, a: Tensor, d: Tensor) -> None:
        self._product.add(out, _by_position(d), _by_position(a))


class Conv1DWeight(LinearWeight):
    """Weight [input, output] of transformers' `Conv1D`."""

    def add(self, out: Tensor, use: Use, a: Tensor, d: Tensor) -> None:
        self._product.add(out, _by_position(a), _by_position(d))


class Bias:
    """What is added to every position of the output."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None:
        self._kept = kept

    def add(self, out: Tensor, use: Use, a: Tensor, d: Tensor) -> None:
        out += _take(_by_position(d).sum(1, dtype=out.dtype), self._kept)


class LayerNormWeight:
    """Weight of `nn.LayerNorm` over the last dimension: Σ_t d_t x̂_t, with x̂ the normalised input."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None:
        self._kept = kept

    def add(self, out: Tensor, use: Use, a: Tensor, d: Tensor) -> None:
        normalised = F.layer_norm(a.to(out.dtype), use.module.normalized_shape, None, None, use.module.eps)  # type: ignore[arg-type]
        out += _take(_by_position(d.to(out.dtype) * normalised).sum(1), self._kept)


class EmbeddingWeight:
    """Weight [entries, features] of `F.embedding`; `a` holds the entry of each position, -1 where it takes no part."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None:
        self._entries, self._features = shape
        self._kept = kept

    def add(self, out: Tensor, use: Use, a: Tensor, d: Tensor) -> None:
        entries = a.reshape(len(a), -1)
        example, position = (entries >= 0).nonzero(as_tuple=True)
        entry = entries[example, position]
        gradient = _by_position(d)[example, position].to(out.dtype)
        if self._kept is None:
            table = out.view(len(out), self._entries, self._features)
            table.index_put_((example, entry), gradient, accumulate=True)
            return
        first, last = (torch.searchsorted(self._kept, entry * self._features + end) for end in (0, self._features))
        # One line per position and kept feature of its entry: which position, and which kept entry.
        count = last - first
        line = torch.repeat_interleave(torch.arange(len(entry), device=entry.device), count)
        kept = torch.arange(len(line), device=entry.device) + (first - (count.cumsum(0) - count))[line]
        values = gradient[line, self._kept[kept] % self._features]
        out.index_put_((example[line], kept), values, accumulate=True)


class AnyWeight:
    """Any parameter of a module without children that takes one tensor: differentiated example by example."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None:
        self._chunk = max(1, _CHUNK // (math.prod(shape) or 1))
        self._kept = kept

    def add(self, out: Tensor, use: Use, a: Tensor, d: Tensor) -> None:
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
        out += _take(found.flatten(1).to(out.dtype), self._kept)


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
