"""The gradient store of a run: per-example rows in memory-mapped shards, with a Parquet index.

A shard i is `shard-<i>.safetensors` (tensors `alternative` and `diff`, both [rows, n]; the selection; metadata) and
`shard-<i>.parquet` (`INDEX`, one line per row in the same order). docs/gradient-store.md shows how to use it.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from gradiend_core.corpus.texts import SPLITS
from gradiend_core.errors import GradiendError
from gradiend_core.files import damaged
from gradiend_core.gradients.selection import Selection
from gradiend_core.tables import Schema, read_table
from gradiend_core.tensors import consecutive, load_tensors, read_metadata

Stored = Literal["alternative", "diff"]
Quantity = Literal["factual", "alternative", "diff"]

# The stored matrices whose sum a quantity is: diff = factual - alternative.
_PARTS: Final[dict[str, tuple[Stored, ...]]] = {
    "factual": ("alternative", "diff"),
    "alternative": ("alternative",),
    "diff": ("diff",),
}

# Entries that are gathered or widened at a time: 16 MiB of float32, memory that the allocator keeps for the next ones.
_CHUNK: Final = 2**22

# Entries of a bfloat16 row that are widened at a time: 512 KiB of float32, which stay in a core's own cache.
_CACHED: Final = 2**17

TRAINING: Final = "training"

INDEX: Final[Schema] = {
    "type": pa.string(),  # TRAINING, or a type of the neutral table
    "row": pa.int64(),  # row of training.parquet or neutral.parquet
    "split": pa.string(),
    "masked": pa.string(),
    "factual_class": pa.string(),  # null for neutral rows
    "alternative_class": pa.string(),
    "factual": pa.string(),
    "alternative": pa.string(),  # the factual itself for neutral rows, whose diff is zero
    "transition": pa.string(),
    "label": pa.float64(),  # of the factual class: +1 first target class, -1 second, 0 neutral
    "n_positions": pa.int64(),  # masked positions of the factual input
}


def shard_files(folder: Path, shard: int) -> tuple[Path, Path]:
    """Tensors and index of a shard."""
    return folder / f"shard-{shard}.safetensors", folder / f"shard-{shard}.parquet"


def store_bytes(rows: int, n: int, dtype: torch.dtype) -> int:
    """Size of the two row matrices of a store."""
    return 2 * rows * n * dtype.itemsize


def require_space(folder: Path, needed: int) -> None:
    """Raise `GradiendError` when the disk that holds `folder` has less than `needed` bytes (plus 2 %) free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed * 1.02 > free:
        raise GradiendError(
            f"{folder}: the gradient store needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free."
            " Free some space, lower pre_prune.topk, or set cache_gradients.dtype to bfloat16."
        )


@dataclass(frozen=True, repr=False, eq=False)
class GradientStore:
    """An opened store: `len(store)` rows of `n` gradient entries. A row is addressed by its position in `index`.

    Of each row there are three quantities: "alternative" and "diff" are stored, "factual" is their sum. Positions are
    int64 tensors of values 0 … len(store)-1. Results are float32, in new memory, on the CPU; only `matrix` gives the
    mapped memory itself. Whatever a method is asked for that is not there raises `GradiendError`.

    Attributes:
        index: a line per row, with the columns of `INDEX`.
        selection: the n entries of the base model that the columns of the matrices stand for, in this order.
        metadata: JSON: target_classes; base_model and dataset (path, SHA-256 of the files); mapping; num_shards.
    """

    index: pd.DataFrame
    selection: Selection
    metadata: dict[str, Any]
    _shards: tuple[dict[str, Tensor], ...]

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open all shards of a folder; tensors are memory-mapped, not read.

        Raises:
            GradiendError: a shard is missing, damaged, or belongs to another store.
        """
        folder = Path(folder)
        first = read_metadata(shard_files(folder, 0)[0])
        if not {"mapping", "num_shards"} <= first.keys():
            raise damaged(shard_files(folder, 0)[0], "it is not a shard of a gradient store")
        shards: list[dict[str, Tensor]] = []
        indices = []
        for shard in range(first["num_shards"]):
            tensor_file, index_file = shard_files(folder, shard)
            metadata = read_metadata(tensor_file)
            shards.append(load_tensors(tensor_file))
            selection = Selection.from_tensors(shards[0], first["mapping"])
            _check_matrices(tensor_file, shards[-1], selection.n)
            if metadata != first | {"shard": shard} or not _alike(shards[-1], shards[0]):
                raise damaged(tensor_file, f"it is not shard {shard} of the store that shard 0 belongs to")
            indices.append(read_table(index_file, INDEX))
            if len(indices[-1]) != len(shards[-1]["diff"]):
                raise damaged(index_file, f"{len(indices[-1])} lines for {len(shards[-1]['diff'])} rows")
        return cls(pd.concat(indices, ignore_index=True), selection, first, tuple(shards))

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"GradientStore({len(self)} rows of {self.n} entries, {self.dtype}, shards: {len(self._shards)})"

    @property
    def n(self) -> int:
        """Entries per row."""
        return self.selection.n

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored matrices: float32 or bfloat16."""
        return self._shards[0]["diff"].dtype

    def positions(
        self,
        *,
        split: str | Sequence[str] | None = None,
        kind: str | Sequence[str] | None = None,
        transition: str | Sequence[str] | None = None,
        factual_class: str | Sequence[str] | None = None,
        alternative_class: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Positions, in order (int64), of the rows that have the given value, or one of those given, everywhere.

        `kind` is the column `type`. A split may be empty; any other value that no row has is an error.
        """
        asked = {
            "split": split,
            "type": kind,
            "transition": transition,
            "factual_class": factual_class,
            "alternative_class": alternative_class,
        }
        chosen = np.ones(len(self), dtype=bool)
        for column, value in asked.items():
            if value is not None:
                wanted = [value] if isinstance(value, str) else list(value)
                known = {*self.index[column].dropna(), *(SPLITS if column == "split" else ())}
                if unknown := [name for name in wanted if name not in known]:
                    raise GradiendError(f"{column} {unknown[0]!r}: this store has {', '.join(sorted(known))}")
                chosen &= self.index[column].isin(wanted).to_numpy()
        return torch.from_numpy(chosen.nonzero()[0])

    def rows(self, quantity: Quantity, positions: Tensor, selection: Selection | None = None) -> Tensor:
        """Gradient rows [len(positions), n], or only their entries at a part of the store's selection."""
        first, *others = self._parts(quantity)
        self._check(positions)
        columns = None if selection is None else self.selection.locate(selection)
        result = torch.empty(len(positions), self.n if columns is None else len(columns))
        if columns is None:
            for shard, where, stored in self._runs(positions):
                result[where] = shard[first][stored]
        else:
            for where, rows in self._chunks(first, positions):
                torch.index_select(rows, 1, columns, out=result[where])
        for part in others:
            for where, rows in self._chunks(part, positions):
                result[where] += rows if columns is None else rows[:, columns]
        return result

    def iterate(self, quantity: Quantity, positions: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The rows at `positions` in order, `batch_size` at a time: [batch_size, n], the last may have fewer rows."""
        for batch in torch.split(positions, batch_size):
            yield self.rows(quantity, batch)

    def batch_means(
        self, quantity: Quantity, batches: Sequence[Tensor] | Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The weighted mean row of each batch of positions: [len(batches), n].

        `weights` has an entry for every row of the store [len(store)]; by default it is the index's n_positions. The
        loss of a batch is the mean over all its labelled positions, so an example with two of them counts twice, and
        only with these weights is the mean of the rows the gradient of that loss.

        Sums are float32 whatever is stored. The matrices are read in place. One batch per call for every thread is
        fastest: with glibc, more than 32 MiB of means are fresh memory each time, which costs as much as reading the
        rows. Which shards the rows come from may change the last digit.
        """
        parts = self._parts(quantity)
        if not len(batches):
            return torch.empty(0, self.n)
        rows = torch.cat(list(batches))
        self._check(rows)
        lengths = torch.tensor([len(batch) for batch in batches])
        shares = self._shares(rows, lengths, weights)
        if len(self._shards) == 1 and self.dtype == torch.float32:
            matrices = [self._shards[0][part] for part in parts]
            bags: dict[str, Any] = {"offsets": lengths.cumsum(0) - lengths, "per_sample_weights": shares, "mode": "sum"}
            return reduce(Tensor.add_, (F.embedding_bag(rows, matrix, **bags) for matrix in matrices))
        # embedding_bag takes one matrix, and would round sums of bfloat16 to bfloat16.
        result = torch.zeros(len(lengths), self.n)
        for mean, batch, share in zip(result, batches, torch.split(shares, lengths.tolist()), strict=True):
            stored = [(shard, row) for shard, _, run in self._runs(batch) for row in range(run.start, run.stop)]
            for part in parts:
                _add_scaled(mean, [shard[part][row] for shard, row in stored], share.tolist())
        return result

    def project(self, quantity: Quantity, vectors: Tensor, positions: Tensor | None = None) -> Tensor:
        """Inner products of rows (all, or those at `positions`) with vectors [n] or [n, k]: [rows] or [rows, k].

        Reads the mapped matrices in place where positions follow one another (all of them do), so that it is as fast
        as memory; scattered positions and bfloat16 go through a small buffer. Vectors are used as float32.
        """
        parts = self._parts(quantity)
        if vectors.dim() not in (1, 2) or len(vectors) != self.n:
            raise GradiendError(f"vectors of shape {list(vectors.shape)}: this store needs [{self.n}] or [{self.n}, k]")
        vectors = vectors.detach().to("cpu", torch.float32)
        positions = torch.arange(len(self)) if positions is None else positions
        self._check(positions)
        result = torch.zeros(len(positions), *vectors.shape[1:])
        for part in parts:
            for where, rows in self._chunks(part, positions):
                result[where] += rows @ vectors
        return result

    def matrix(self, quantity: Stored, shard: int = 0) -> Tensor:
        """The mapped matrix [rows of the shard, n] itself, in `dtype`: nothing is copied, pages are read when touched.

        Rows stand in the order of `index`, those of shard 0 first. `matrix(…).numpy()` shares the memory of a float32
        matrix; NumPy has no bfloat16 (`.view(torch.int16).numpy()` shares its bits, `.float()` copies). Treat it as
        read-only: the mapping is private, so a value written into it never reaches the file, but this store shows it.
        """
        if quantity not in _PARTS["factual"]:
            raise GradiendError(f"matrix {quantity!r}: stored are alternative and diff (factual is their sum)")
        if not 0 <= shard < len(self._shards):
            raise GradiendError(f"shard {shard}: this store has shards 0 to {len(self._shards) - 1}")
        return self._shards[shard][quantity]

    def _parts(self, quantity: str) -> tuple[Stored, ...]:
        if quantity not in _PARTS:
            raise GradiendError(f"quantity {quantity!r}: there are {', '.join(_PARTS)}")
        return _PARTS[quantity]

    def _check(self, positions: Tensor) -> None:
        if positions.dtype != torch.int64 or positions.dim() != 1:
            raise GradiendError(
                f"positions of type {positions.dtype} and shape {list(positions.shape)}: they are int64, in one"
                " dimension, as `positions` gives them (from a mask: mask.nonzero()[:, 0])"
            )
        outside = positions[(positions < 0) | (positions >= len(self))]
        if len(outside):
            raise GradiendError(f"position {outside[0]}: this store has rows 0 to {len(self) - 1}")

    def _shares(self, rows: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        """The weights of the rows of batches that stand one after the other, scaled to sum to 1 in each (float32)."""
        if weights is None:
            weights = torch.tensor(self.index["n_positions"].to_numpy())
        if weights.shape != (len(self),):
            raise GradiendError(f"weights of shape {list(weights.shape)}: one per row of the store, [{len(self)}]")
        batches = torch.arange(len(lengths)).repeat_interleave(lengths)
        shares = weights[rows].double()
        totals = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, batches, shares)
        if not (totals > 0).all():
            raise GradiendError(f"batch {int((totals <= 0).nonzero()[0])}: it is empty, or its weights sum to 0")
        return (shares / totals[batches]).float()

    def _runs(self, positions: Tensor) -> Iterator[tuple[dict[str, Tensor], slice, slice]]:
        """Stretches of rows that follow one another in a shard: the shard, where in `positions`, where in the shard."""
        ends = [0, *accumulate(len(shard["diff"]) for shard in self._shards)]
        owners = torch.bucketize(positions, torch.tensor(ends[1:]), right=True)
        # Owners never fall while positions rise, so the sum grows by one only within a shard and to the next row.
        for run in consecutive(positions + owners):
            owner = int(owners[run.start])
            start = int(positions[run.start]) - ends[owner]
            yield self._shards[owner], run, slice(start, start + run.stop - run.start)

    def _chunks(self, part: Stored, positions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a stored matrix in float32, `_CHUNK` entries at a time, and where they stand in `positions`.

        They are mapped memory where possible, else a buffer that the next ones overwrite: to be read, and at once.
        """
        step = max(1, _CHUNK // self.n)
        buffer = torch.empty(min(step, len(positions)), self.n)
        for start in range(0, len(positions), step):
            runs = list(self._runs(positions[start : start + step]))
            rows = buffer[: runs[-1][1].stop]
            if len(runs) == 1 and self.dtype == torch.float32:
                rows = runs[0][0][part][runs[0][2]]
            else:
                for shard, where, stored in runs:
                    rows[where] = shard[part][stored]
            yield slice(start, start + len(rows)), rows


def _check_matrices(file: Path, shard: dict[str, Tensor], n: int) -> None:
    """Raise unless `alternative` and `diff` are there, [rows, n] both."""
    found = {name: list(shard[name].shape) for name in _PARTS["factual"] if name in shard}
    rows = found.get("diff", [0])[0]
    if found != {name: [rows, n] for name in _PARTS["factual"]}:
        raise damaged(file, f"it should have alternative and diff of shape [rows, {n}], and has {found}")


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two shards, alike in their mapping, keep the same entries in the same format."""
    names = {name for name in (*one, *other) if name.startswith("kept.")}
    same = all(name in one and name in other and torch.equal(one[name], other[name]) for name in names)
    return same and one["diff"].dtype == other["diff"].dtype


def _add_scaled(total: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Add Σ weight · row to `total` [n] (float32), in pieces that stay in cache while the rows stream by."""
    wide, stored = torch.empty(min(_CACHED, len(total))), rows[0].dtype
    for part, *pieces in zip(torch.split(total, _CACHED), *(torch.split(row, _CACHED) for row in rows), strict=True):
        for piece, weight in zip(pieces, weights, strict=True):
            part.add_(piece if stored == torch.float32 else wide[: len(part)].copy_(piece), alpha=weight)
