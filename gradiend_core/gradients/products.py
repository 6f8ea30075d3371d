"""Sums of outer products, one per example, at the kept entries of a matrix."""

import math
import warnings
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# Below this share of kept entries, computing only these is cheaper than the whole product and a gather. Measured on
# a CPU for 768x768 and 3072x768 matrices: equal at 0.13 (128 positions) to 0.25 (8 positions); on CUDA an estimate.
_SAMPLED_BELOW = {"cpu": 0.15, "cuda": 0.05}

# Smaller matrices are done whole: calls cost more than arithmetic. Measured on a CPU with 32 positions: equal for 64x64
# at a share of 0.1 to 0.15, for 128x128 at 0.2 to 0.3.
_SAMPLED_FROM = 2**12

# With so few positions (a vocabulary head), and below this share times their number, factors are gathered instead:
# measured on a CPU, equal to the whole product at 0.3, twice as fast as sampling.
_FEW_POSITIONS = 2
_FACTORS_BELOW = 0.3
_FACTORS_CHUNK = {"cpu": 2**18, "cuda": 2**24}

# At few positions, where a smaller share of the matrix' rows has a factor that is not zero, only these are touched.
_SPARSE = 1 / 8

# Entries of whole products held at a time, whatever the batch: on a CPU this many fit the cache.
_CHUNK = {"cpu": 2**18, "cuda": 2**26}

# Positions are filled up with zeros to a multiple of this: on a CPU two took 2.5 times as long as eight.
_VECTOR = 8

# Features times positions that are transposed at a time: more would drive each other out of the first-level cache.
# Measured on a CPU, 2.5 times as fast for 3072 features as all positions at once.
_TRANSPOSED = 2**13
_TRANSPOSED_POSITIONS = 12  # at least

# With a smaller share of rows or columns that hold kept entries, only these take part; picking them out saves little
# above. The largest entries of a gradient stand in few rows and columns.
_USED_BELOW = 0.5

# Entries sampled in a call: enough to make calls cheap, few enough that the patterns take little memory.
_SAMPLED_CHUNK = {"cpu": 2**16, "cuda": 2**22}


class Scratch:
    """Memory for intermediate results, used again and again: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of a shape, with the device and format of `like`; its values mean nothing.

        It shares its memory with the tensors that were given under the same name before.
        """
        key, size = (name, like.device, like.dtype), math.prod(shape)
        if key not in self._flat or self._flat[key].numel() < size:
            self._flat[key] = like.new_empty(size)
        return self._flat[key][:size].view(shape)


class OuterProduct:
    """Puts Σ_t left[n, t, :] right[n, t, :]ᵀ in every row n of a matrix of kept entries.

    Rows and columns without kept entries are left out first. The way is then chosen by shape and share of kept
    entries, so that it is the same in every run: a whole matrix is accumulated in place; few entries are multiplied
    from gathered factors at few positions, or *sampled* (`torch.sparse.sampled_addmm`); otherwise whole products are
    formed, a cache-full at a time, and gathered. A `left` that is zero but for a few of its features, as the gradient
    of a difference of two logits is, touches these rows of the matrix only.
    """

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, scratch: Scratch) -> None:
        self._rows, self._columns = shape
        self._used: tuple[Tensor | None, Tensor | None] = (None, None)
        if kept is not None:
            kept, self._used = _without_unused(kept, shape)
            self._rows, self._columns = (
                count if used is None else len(used) for count, used in zip(shape, self._used, strict=True)
            )
        self._size = self._rows * self._columns
        self._kept = None if kept is not None and len(kept) == self._size else kept
        self._count = self._size if kept is None else len(kept)
        self._scratch = scratch
        self._patterns: dict[int, Tensor] = {}
        self._blocks: list[tuple[slice, slice, Tensor]] = []
        self._factors: tuple[Tensor, Tensor] | None = None
        self._lines = Lines((self._rows, self._columns), self._kept)

    def put(self, out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
        """Write to `out` [N, kept], or add to it unless `first`; `left` [N, T, rows], `right` [N, T, columns]."""
        left, right = (pick(side.to(out.dtype), used) for side, used in zip((left, right), self._used, strict=True))
        share, few = self._count / self._size, left.shape[1] <= _FEW_POSITIONS
        if few and self._count > self._rows:
            touched = left.flatten(0, 1).abs().amax(0).nonzero()[:, 0]
            if len(touched) < _SPARSE * self._rows:
                self._put_lines(out, left, right, touched, first)
                return
        if self._kept is None:
            for chunk in _chunks(len(out), self._size, _CHUNK[out.device.type]):
                matrices = out[chunk].view(-1, self._rows, self._columns)
                matrices.baddbmm_(left[chunk].transpose(1, 2), right[chunk], beta=0 if first else 1)
        elif few and share * left.shape[1] < _FACTORS_BELOW:
            self._put_factors(out, left, right, first)
        elif self._size >= _SAMPLED_FROM and share < _SAMPLED_BELOW[out.device.type]:
            self._put_sampled(out, left, right, first)
        else:
            self._put_gathered(out, left, right, first)

    def _put_lines(self, out: Tensor, left: Tensor, right: Tensor, touched: Tensor, first: bool) -> None:
        left = pick(left, touched)
        example, position, place = left.nonzero(as_tuple=True)
        lines = left[example, position, place][:, None] * right[example, position]
        self._lines.add(out.zero_() if first else out, example, touched[place], lines)

    def _put_gathered(self, out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        most = _CHUNK[out.device.type]
        for rows, span, kept in self._row_blocks(most // self._columns or 1):
            height = min(rows.stop, self._rows) - rows.start
            for chunk in _chunks(len(out), height * self._columns, most):
                some = left[chunk, :, rows].transpose(1, 2)
                product = self._scratch("product", out, *some.shape[:2], self._columns)
                torch.bmm(some, right[chunk], out=product)
                put(out[chunk, span], product.flatten(1).index_select(1, kept), first)

    def _row_blocks(self, height: int) -> list[tuple[slice, slice, Tensor]]:
        """For each block of matrix rows: them, the span of kept entries in them, and where in the block these are."""
        if not self._blocks:
            kept: Tensor = self._kept  # type: ignore[assignment]
            starts = torch.arange(0, self._rows, height, device=kept.device) * self._columns
            ends = [*torch.searchsorted(kept, starts).tolist(), len(kept)]
            spans = [slice(*pair) for pair in pairwise(ends)]
            rows = [slice(start, start + height) for start in range(0, self._rows, height)]
            self._blocks = [
                (block, span, kept[span] - block.start * self._columns)
                for block, span in zip(rows, spans, strict=True)
                if span.stop > span.start
            ]
        return self._blocks

    def _put_factors(self, out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        for position in range(left.shape[1]):
            by_row, by_column = left[:, position].contiguous(), right[:, position].contiguous()
            if first and position == 0:
                for span, factors in self._gathered_factors(by_row, by_column):
                    torch.mul(*factors, out=out[:, span])
            else:
                some = by_row.abs().amax(1).nonzero()[:, 0]  # examples with fewer positions have zeros there
                examples = some.tolist()
                for span, factors in self._gathered_factors(by_row[some], by_column[some]):
                    for example, *pair in zip(examples, *factors, strict=True):
                        out[example, span].addcmul_(*pair)

    def _gathered_factors(self, by_row: Tensor, by_column: Tensor) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """For spans of kept entries: these, and for n examples the factors [n, span] of rows and of columns."""
        if self._factors is None:
            kept: Tensor = self._kept  # type: ignore[assignment]
            self._factors = (kept // self._columns, kept % self._columns)
        for span in _chunks(self._count, len(by_row), _FACTORS_CHUNK[by_row.device.type]):
            gathered = []
            for name, side, index in zip(("left", "right"), (by_row, by_column), self._factors, strict=True):
                memory = self._scratch(name, side, len(side), len(index[span]))
                gathered.append(torch.index_select(side, 1, index[span], out=memory))
            yield span, (gathered[0], gathered[1])

    def _put_sampled(self, out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        for chunk in _chunks(len(out), self._count, _SAMPLED_CHUNK[out.device.type]):
            by_row, by_column = self._side("left", left[chunk]), self._side("right", right[chunk])
            pattern = self._pattern(len(out[chunk]), out.device)
            pattern.values().zero_()  # what is not a number would stay, even times 0
            torch.sparse.sampled_addmm(pattern, by_row, by_column.T, beta=0.0, out=pattern)
            put(out[chunk], pattern.values().view(-1, self._count), first)

    def _side(self, name: str, side: Tensor) -> Tensor:
        """[n, T, features] as [n · features, T], T filled up to whole vectors."""
        n, positions, features = side.shape
        spare = -positions % _VECTOR if positions > 1 else 0
        memory = self._scratch(name, side, n, features, positions + spare)
        step = max(_TRANSPOSED_POSITIONS, _TRANSPOSED // features)
        for start in range(0, positions, step):
            some = slice(start, min(positions, start + step))
            memory[:, :, some].copy_(side[:, some].transpose(1, 2))
        memory[:, :, positions:].zero_()
        return memory.flatten(0, 1)

    def _pattern(self, n: int, device: torch.device) -> Tensor:
        """The kept entries of n examples as one block-diagonal CSR matrix, whose values are overwritten."""
        if n not in self._patterns:
            kept: Tensor = self._kept  # type: ignore[assignment]
            starts = torch.searchsorted(kept, torch.arange(self._rows, device=device) * self._columns)
            example = torch.arange(n, device=device)[:, None]
            rows = torch.cat([(starts + example * len(kept)).flatten(), starts.new_tensor([n * len(kept)])])
            columns = (kept % self._columns + example * self._columns).flatten()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                self._patterns[n] = torch.sparse_csr_tensor(
                    rows.int(),
                    columns.int(),
                    torch.zeros(n * len(kept), device=device),
                    size=(n * self._rows, n * self._columns),
                    check_invariants=False,
                )
        return self._patterns[n]


class Lines:
    """Adds whole rows to matrices of `shape`, one matrix per example, of which only the kept entries are there."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None:
        self._rows, self._features = shape
        self._kept = kept
        self._starts: Tensor | None = None

    def add(self, out: Tensor, example: Tensor, row: Tensor, lines: Tensor) -> None:
        """Add `lines` [L, features], each to its `row` [L] (-1: to none) of the matrix of its `example` [L].

        `out` [N, kept] holds the kept entries of the matrices.
        """
        if self._kept is None:
            some = (row >= 0).nonzero()[:, 0]
            matrices = out.view(len(out), self._rows, self._features)
            matrices.index_put_((example[some], row[some]), lines[some].to(out.dtype), accumulate=True)
            return
        if self._starts is None:
            edges = torch.arange(self._rows + 1, device=row.device) * self._features
            self._starts = torch.searchsorted(self._kept, edges)
        first = self._starts[row]
        count = (self._starts[row + 1] - first).masked_fill_(row < 0, 0)
        # One item per line and kept entry of its row: which line, and which kept entry.
        line = torch.repeat_interleave(count)
        entry = torch.arange(len(line), device=row.device) + (first - (count.cumsum(0) - count))[line]
        values = lines[line, self._kept[entry] % self._features]
        out.index_put_((example[line], entry), values.to(out.dtype), accumulate=True)


def occurring(lines: Tensor, count: int) -> Tensor:
    """Those of 0 … count - 1 that occur among lines, in order."""
    return torch.zeros(count, dtype=torch.bool, device=lines.device).index_fill_(0, lines, True).nonzero()[:, 0]


def pick(side: Tensor, features: Tensor | None) -> Tensor:
    """[N, T, features] at the given features (None: all)."""
    if features is None:
        return side
    # Of two dimensions, four times as fast as the same of three.
    return side.flatten(0, 1).index_select(1, features).view(*side.shape[:2], -1)


def put(out: Tensor, values: Tensor, first: bool) -> None:
    """Write values to `out`, or add them to it unless they are the first."""
    if first:
        out.copy_(values)
    else:
        out.add_(values)


def _chunks(count: int, entries: int, most: int) -> list[slice]:
    """Slices of 0 … count - 1 that hold about `most` entries, of which each item has some."""
    step = max(1, most // (entries or 1))
    return [slice(start, start + step) for start in range(0, count, step)]


def _without_unused(kept: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Kept entries as positions in the matrix of the rows and columns that hold any, and which these are.

    Where many rows, or columns, hold some, all stay (None).
    """
    of_row, of_column = kept // shape[1], kept % shape[1]
    rows, columns = (
        used if len(used) < _USED_BELOW * count else None
        for used, count in zip((occurring(of_row, shape[0]), occurring(of_column, shape[1])), shape, strict=True)
    )
    if rows is None and columns is None:
        return kept, (None, None)
    if rows is not None:
        of_row = torch.searchsorted(rows, of_row)
    if columns is not None:
        of_column = torch.searchsorted(columns, of_column)
    return of_row * (shape[1] if columns is None else len(columns)) + of_column, (rows, columns)
