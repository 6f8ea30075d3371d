"""Sums of outer products, one per example, at the kept entries of a matrix."""

import warnings
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this share of kept entries, computing only these is cheaper than the whole product and a gather. Measured on
# a CPU for 768x768 and 3072x768 matrices: equal at 0.13 (128 positions) to 0.25 (8 positions); on CUDA an estimate.
_SAMPLED_BELOW = {"cpu": 0.15, "cuda": 0.05}

# Smaller matrices are done whole: their product fits the processor's cache, and calls cost more than arithmetic.
_SAMPLED_FROM = 2**16

# Entries of whole products held at a time, whatever the batch: on a CPU this many fit the cache.
_CHUNK = {"cpu": 2**20, "cuda": 2**26}

# Positions are filled up with zeros to a multiple of this: on a CPU two took 2.5 times as long as eight.
_VECTOR = 8

# Entries sampled in a call: enough to make calls cheap, few enough that the patterns take little memory.
_SAMPLED_CHUNK = {"cpu": 2**16, "cuda": 2**22}


class OuterProduct:
    """Adds Σ_t left[n, t, :] right[n, t, :]ᵀ to every row n of a matrix of kept entries.

    Three ways, chosen by shape and share of kept entries only, so that the choice is the same in every run: a whole
    matrix is accumulated in place; few entries of a large one are *sampled* (`torch.sparse.sampled_addmm` with one
    block per example on the diagonal); otherwise whole products are formed, a cache-full at a time, and gathered.
    """

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None) -> None:
        self._rows, self._columns = shape
        self._size = self._rows * self._columns
        self._kept = kept
        self._patterns: dict[int, Tensor] = {}

    def add(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """Add to `out` [N, kept], given `left` [N, T, rows] and `right` [N, T, columns]."""
        left, right = left.to(out.dtype), right.to(out.dtype)
        if self._kept is None:
            matrices = out.view(len(out), self._rows, self._columns)
            for chunk in _chunks(out, self._size, _CHUNK):
                matrices[chunk].baddbmm_(left[chunk].transpose(1, 2), right[chunk])
            return
        sampled = self._size >= _SAMPLED_FROM and len(self._kept) < _SAMPLED_BELOW[out.device.type] * self._size
        product = self._sampled if sampled else partial(self._gathered, self._buffer(out))
        chunks = _chunks(out, len(self._kept), _SAMPLED_CHUNK) if sampled else _chunks(out, self._size, _CHUNK)
        for chunk in chunks:
            out[chunk] += product(left[chunk], right[chunk])

    def _buffer(self, out: Tensor) -> Tensor:
        # Reused by every chunk: a fresh product would be written to fresh pages of memory each time.
        chunk = _chunks(out, self._size, _CHUNK)[0]
        return out.new_empty(min(chunk.stop, len(out)), self._rows, self._columns)

    def _gathered(self, buffer: Tensor, left: Tensor, right: Tensor) -> Tensor:
        product = torch.bmm(left.transpose(1, 2), right, out=buffer[: len(left)])
        return product.flatten(1).index_select(1, self._kept)  # type: ignore[arg-type]

    def _sampled(self, left: Tensor, right: Tensor) -> Tensor:
        n, positions, _ = left.shape
        pattern = self._pattern(n, left.device)
        spare = -positions % _VECTOR if positions > 1 else 0
        by_row, by_column = (F.pad(side.transpose(1, 2), (0, spare)).flatten(0, 1) for side in (left, right))
        torch.sparse.sampled_addmm(pattern, by_row, by_column.T, beta=0.0, out=pattern)
        return pattern.values().view(n, -1)

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


def _chunks(out: Tensor, entries: int, most: dict[str, int]) -> list[slice]:
    """Slices of the examples of `out`, of `entries` each, that hold about as many entries as the device likes."""
    step = max(1, most[out.device.type] // (entries or 1))
    return [slice(start, start + step) for start in range(0, len(out), step)]
