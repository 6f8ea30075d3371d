"""Which entries of a base model take part: θ_S of the semantics, section 1.1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradiend_core.errors import GradiendError


@dataclass(frozen=True)
class Selection:
    """Kept entries of an ordered list of parameter tensors.

    The order of `names` is the order of coordinates: each tensor is flattened row-major, and only kept entries
    count. `kept[i]` holds the sorted flat positions kept of tensor i (int64), or None when all are.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kept: tuple[Tensor | None, ...]

    @classmethod
    def everything(cls, parameters: Mapping[str, Tensor]) -> Self:
        """All entries of the given parameters."""
        return cls(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()), (None,) * len(parameters))

    @property
    def sizes(self) -> list[int]:
        """Kept entries per tensor."""
        return [
            math.prod(shape) if kept is None else len(kept) for shape, kept in zip(self.shapes, self.kept, strict=True)
        ]

    @property
    def n(self) -> int:
        """Kept entries in all: the length of θ_S."""
        return sum(self.sizes)

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The kept entries of named tensors as one vector [n]."""
        parts = []
        for name, kept in zip(self.names, self.kept, strict=True):
            flat = tensors[name].reshape(-1)
            parts.append(flat if kept is None else flat[kept.to(flat.device)])
        return torch.cat(parts)

    def prune(self, coordinates: Tensor) -> Self:
        """Keep only the given coordinates (sorted positions in 0 … n-1) of this selection."""
        pruned, start = [], 0
        for size, shape, kept in zip(self.sizes, self.shapes, self.kept, strict=True):
            inside = coordinates[(coordinates >= start) & (coordinates < start + size)] - start
            full = len(inside) == math.prod(shape)
            pruned.append(None if full else inside if kept is None else kept[inside])
            start += size
        return type(self)(self.names, self.shapes, tuple(pruned))

    def base_global_indices(self) -> Tensor:
        """For each coordinate its position in the concatenation of all unpruned tensors [n] (int64)."""
        parts, start = [], 0
        for shape, kept in zip(self.shapes, self.kept, strict=True):
            size = math.prod(shape)
            parts.append(start + (torch.arange(size) if kept is None else kept))
            start += size
        return torch.cat(parts)

    def locate(self, part: "Selection") -> Tensor:
        """Where the entries of `part` stand among the entries of this selection [part.n] (int64).

        Raises `GradiendError` when `part` holds an entry that this selection does not.
        """
        known, wanted = self.base_global_indices(), part.base_global_indices()
        found = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
        if (self.names, self.shapes) != (part.names, part.shapes) or not torch.equal(known[found], wanted):
            raise GradiendError(
                "the entries asked for are not among those stored: this model was trained on another gradient store"
            )
        return found

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON metadata from which `from_tensors` restores the selection."""
        tensors = {f"kept.{i}": kept for i, kept in enumerate(self.kept) if kept is not None}
        return tensors, {"names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], mapping: Mapping[str, Any]) -> Self:
        """The inverse of `to_tensors`; other tensors are ignored."""
        shapes = tuple(tuple(shape) for shape in mapping["shapes"])
        return cls(tuple(mapping["names"]), shapes, tuple(tensors.get(f"kept.{i}") for i in range(len(shapes))))


def backbone_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the model's backbone in `named_parameters` order, heads excluded, tied tensors once.

    `patterns` restricts them to names that match one of the patterns in full (`*` stands for anything). A pattern
    that matches nothing raises `GradiendError` naming the nearest parameter (WEAK-08).
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)
    members = {id(parameter) for parameter in backbone.parameters()}
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in members}
    if patterns is None:
        return found
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            near = get_close_matches(pattern, found, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise GradiendError(f"pre_prune.params: {pattern!r} matches no parameter of the backbone{hint}")
    return {name: p for name, p in found.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def top_k_count(topk: int | float, n: int) -> int:
    """How many of n entries a top-k keeps: a float is a fraction rounded up; the result is clamped to [1, n]."""
    count = math.ceil(round(topk * n, 9)) if isinstance(topk, float) else topk
    return max(1, min(count, n))


def top_k(importance: Tensor, topk: int | float) -> Tensor:
    """Sorted positions of the largest entries of `importance` [n]; of equal entries the first are kept."""
    order = torch.argsort(importance, descending=True, stable=True)
    return order[: top_k_count(topk, len(importance))].sort().values
