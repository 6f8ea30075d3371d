"""Which entries of a base model take part: θ_S of the semantics, section 1.1."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradiend_core.errors import GradiendError

Floats = NDArray[np.float32]

_CHUNK = 1 << 18  # entries looked at together: 1 MB, which stays in a processor's cache


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
        """Keep only the given coordinates (sorted positions in 0 … n-1, int64 on the CPU) of this selection."""
        starts = torch.tensor([0, *accumulate(self.sizes)])
        bounds = torch.searchsorted(coordinates, starts).tolist()
        pruned: list[Tensor | None] = []
        for i, (shape, kept) in enumerate(zip(self.shapes, self.kept, strict=True)):
            inside = coordinates[bounds[i] : bounds[i + 1]] - starts[i]
            full = len(inside) == math.prod(shape)
            pruned.append(None if full else inside if kept is None else kept[inside])
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

    `patterns` restricts them to names that match one of the patterns in full (`*` stands for anything, dots
    included). Patterns that match nothing raise a `GradiendError` that names each one's near miss and lists what
    there is (WEAK-08).
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)
    members = {id(parameter) for parameter in backbone.parameters()}
    everything = dict(model.named_parameters())
    found = {name: parameter for name, parameter in everything.items() if id(parameter) in members}
    if patterns is None:
        return found
    unmatched = [pattern for pattern in patterns if not _matches(pattern, found)]
    if unmatched:
        head = [name for name in everything if name not in found]
        lines = [f"pre_prune.params: {_unmatched(pattern, list(found), head)}" for pattern in unmatched]
        numbers = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in found)
        lines.append(f"The backbone has {len(found)} parameters (here with * for the numbers of layers):")
        raise GradiendError("\n  ".join(["\n".join(lines), *numbers]))
    return {name: p for name, p in found.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _unmatched(pattern: str, names: Sequence[str], head: Sequence[str]) -> str:
    if _matches(pattern, head):
        return f"{pattern!r} matches no parameter of the backbone, only of the head, which takes no part"
    near = _near_pattern(pattern, names)
    return f"{pattern!r} matches no parameter of the backbone" + (f"; did you mean {near!r}?" if near else "")


def _near_pattern(pattern: str, names: Sequence[str]) -> str | None:
    """The pattern most like the given one that matches: one word of it mended, or `*` added at its ends."""
    parts = pattern.split(".")
    known = sorted({word for name in names for word in name.split(".")})
    mended = [pattern]
    for i, part in enumerate(parts):
        word = part.strip("*")
        near = get_close_matches(word, known)
        mended += [".".join([*parts[:i], part.replace(word, other), *parts[i + 1 :]]) for other in near]
    ends = ("", ".*")
    tries = [f"{start}{inner}{end}" for inner in mended for start in ("", "*.") for end in ends]
    found = [other for other in tries if _matches(other, names)] or get_close_matches(pattern, names, n=1)
    return max(found, key=lambda other: SequenceMatcher(None, pattern, other).ratio(), default=None)


def top_k_count(topk: int | float, n: int) -> int:
    """How many of n entries a top-k keeps: a float is a fraction rounded up; the result is clamped to [1, n].

    The fraction is the decimal number that was written: 0.07 of 100 is 7, though 0.07 * 100 > 7 in floating point.
    """
    count = math.ceil(Fraction(repr(float(topk))) * n) if isinstance(topk, float) else topk
    return max(1, min(count, n))


def top_k(importance: Tensor, topk: int | float | None, *, threshold: float = 0.0) -> Tensor:
    """Sorted positions [k] (int64, CPU) of the largest entries of a non-negative `importance` [n].

    Entries below `threshold` are left out first; `topk` counts among those that remain, a fraction is one of them
    (semantics 5), and None keeps them all. Of equal entries the first are kept. Everything is decided on the CPU in
    float32, so that a device or a library's way of sorting cannot change the result.

    The time is that of about 35 readings of `importance`; the memory beyond it is that of the result.

    Raises:
        GradiendError: when an entry is not finite, or none reaches the threshold.
    """
    values: Floats = importance.detach().to("cpu", torch.float32).contiguous().numpy()
    low, high = (float(extreme) for extreme in torch.aminmax(torch.from_numpy(values)))
    if not (low >= 0 and high < math.inf):  # a nan fails both
        raise GradiendError(
            "importance: every entry must be a finite number that is not negative; the weights or"
            " gradients it is made of are not finite. Look for a training or a base model that diverged."
        )
    if threshold > high:
        raise GradiendError(
            f"pre_prune.threshold: no entry has an importance of {threshold:g} or more, the largest has {high:g}."
            " Lower it, or choose entries by pre_prune.topk alone."
        )
    chunks = np.split(values, range(_CHUNK, len(values), _CHUNK))
    left = _count(chunks, threshold)
    if topk is None:
        return _first_positions(chunks, np.float32(threshold), left)
    k = top_k_count(topk, left)
    return _first_positions(chunks, _kth_largest(chunks, k, low, high), k)


def _count(chunks: Sequence[Floats], least: float | np.float32) -> int:
    return sum(int(np.count_nonzero(chunk >= least)) for chunk in chunks)


def _kth_largest(chunks: Sequence[Floats], k: int, low: float, high: float) -> np.float32:
    """The k-th largest value of non-negative float32 numbers in [low, high], by bisection.

    Such numbers are ordered like their bits read as integers: 31 halvings name one number exactly, and need no copy
    of the values where sorting or partitioning would.
    """
    first, last = (int(np.float32(abs(extreme)).view(np.int32)) for extreme in (low, high))
    while first < last:
        middle = (first + last + 1) // 2
        if _count(chunks, np.int32(middle).view(np.float32)) >= k:
            first = middle
        else:
            last = middle - 1
    return np.float32(np.int32(first).view(np.float32))


def _first_positions(chunks: Sequence[Floats], least: np.float32, k: int) -> Tensor:
    """Positions of all entries above `least` and of as many of the first entries equal to it as make k."""
    ties = k - sum(int(np.count_nonzero(chunk > least)) for chunk in chunks)
    positions = np.empty(k, dtype=np.int64)
    start = filled = 0
    for chunk in chunks:
        found = np.flatnonzero(chunk >= least)
        tied = chunk[found] == least
        found = found[~tied | (np.cumsum(tied) <= ties)]
        ties -= min(ties, int(np.count_nonzero(tied)))
        positions[filled : filled + len(found)] = found + start
        start, filled = start + len(chunk), filled + len(found)
    return torch.from_numpy(positions)
