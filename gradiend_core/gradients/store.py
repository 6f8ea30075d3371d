"""The gradient store of a run: per-example rows in memory-mapped shards, with a Parquet index.

A shard i is `shard-<i>.safetensors` (tensors `alternative` and `diff`, both [rows, n]; the selection; metadata) and
`shard-<i>.parquet` (`INDEX`, one line per row in the same order).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from gradiend_core.errors import GradiendError
from gradiend_core.files import damaged
from gradiend_core.gradients.selection import Selection
from gradiend_core.tables import Schema, read_table
from gradiend_core.tensors import load_tensors, read_metadata

Quantity = Literal["factual", "alternative", "diff"]

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


def _same_kept(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the selections of two shards, alike in their mapping, keep the same entries."""
    names = {name for name in (*one, *other) if name.startswith("kept.")}
    return all(name in one and name in other and torch.equal(one[name], other[name]) for name in names)


@dataclass(frozen=True)
class GradientStore:
    """An opened store. Rows are addressed by their position in `index`."""

    index: pd.DataFrame  # the columns of INDEX
    selection: Selection
    metadata: dict[str, Any]  # target_classes, base_model, …
    _shards: tuple[dict[str, Tensor], ...]

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open all shards of a folder; tensors are memory-mapped, not read.

        Raises:
            GradiendError: a shard is missing, damaged, or belongs to another store.
        """
        folder = Path(folder)
        first = read_metadata(shard_files(folder, 0)[0])
        shards, indices = [], []
        for shard in range(first["num_shards"]):
            tensor_file, index_file = shard_files(folder, shard)
            metadata = read_metadata(tensor_file)
            shards.append(load_tensors(tensor_file))
            if metadata != first | {"shard": shard} or not _same_kept(shards[-1], shards[0]):
                raise damaged(tensor_file, f"it is not shard {shard} of the store that shard 0 belongs to")
            indices.append(read_table(index_file, INDEX))
            if len(indices[-1]) != len(shards[-1]["alternative"]):
                raise damaged(index_file, f"{len(indices[-1])} lines for {len(shards[-1]['alternative'])} rows")
        selection = Selection.from_tensors(shards[0], first["mapping"])
        return cls(pd.concat(indices, ignore_index=True), selection, first, tuple(shards))

    @property
    def n(self) -> int:
        """Entries per row."""
        return self.selection.n

    def positions(self, *, split: str | None = None, kind: str | None = None) -> Tensor:
        """Positions of the rows of a split and of a type, in order (int64)."""
        chosen = pd.Series(True, index=self.index.index)
        if split is not None:
            chosen &= self.index["split"] == split
        if kind is not None:
            chosen &= self.index["type"] == kind
        return torch.from_numpy(chosen.to_numpy().nonzero()[0])

    def rows(self, quantity: Quantity, positions: Tensor, selection: Selection | None = None) -> Tensor:
        """Gradient rows [len(positions), n] in float32, or only their entries at a part of the store's selection."""
        if selection is not None:
            return self.rows(quantity, positions)[:, self.selection.locate(selection)]
        if quantity == "factual":
            return self.rows("alternative", positions) + self.rows("diff", positions)
        result = torch.empty(len(positions), self.n)
        start = 0
        for shard in self._shards:
            stop = start + len(shard[quantity])
            inside = (positions >= start) & (positions < stop)
            result[inside] = shard[quantity][positions[inside] - start].float()
            start = stop
        return result
