"""Writing a gradient store beside writing the same bytes, and reading its batch means beside memory (part `store`)."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from bench.gradients.child import Child, serve
from bench.gradients.report import Line
from bench.gradients.timing import Spread, interleave, ratio, scaled
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.shard_writer import ShardWriter
from gradiend_core.gradients.store import INDEX, GradientStore, Quantity, shard_files, store_bytes
from gradiend_core.tables import write_table

ROWS, ENTRIES = 240, 1_090_000  # 2.1 GB: 1 % of bert-base's entries
ROWS_WRITTEN = (
    64  # at a time: disks change their speed from one second to the next, so that many short rounds tell more
)
BATCH, BATCHES_PER_CHECKPOINT = 16, 8
ROUNDS = {"write": 21, "read": 7}
GIGA = 1e9
MEMORY, AT_ONCE = "memory", "alternative, all at once"


def run() -> Iterator[list[Line]]:
    """Writing once, reading with one thread and with two."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".partial-bench-") as folder:  # on the disk of artifacts/
        yield written(Path(folder), ROWS_WRITTEN, ENTRIES, ROUNDS["write"])
        write_whole(Path(folder), ROWS, ENTRIES)
        for threads in (1, 2):
            with Child(__spec__.name, environment={"OMP_NUM_THREADS": str(threads)}) as child:
                seconds = child.ask(folder=folder, threads=threads, rounds=ROUNDS["read"])
            yield _judged(threads, seconds, ROWS * ENTRIES * 4)


def written(folder: Path, rows: int, n: int, rounds: int) -> list[Line]:
    """Write a store in turn with plain files of the same bytes, on the same disk."""
    batch, starts = _batch(rows, n), range(0, rows, BATCH)
    shard, plain = shard_files(folder, 0)[0], folder / "plain"
    size = store_bytes(rows, n, torch.float32)

    def delete() -> None:
        for path in (shard, plain):
            path.unlink(missing_ok=True)
        os.sync()

    seconds = interleave(
        {
            "store": lambda: _write_store(shard, rows, n, starts, batch),
            "plain": lambda: _write_plain(plain, rows, starts, batch),
        },
        rounds,
        between=delete,
    )
    share = ratio(seconds["plain"], seconds["store"])
    lines = [Line(f"writing {size / GIGA:.2g} GB: speed of the store / plain write and fsync", "x", share, 0.8, True)]
    return lines + [Line(f"writing, {name}", "GB/s", _rate(size, s)) for name, s in seconds.items()]


def write_whole(folder: Path, rows: int, n: int) -> None:
    """A store to be read."""
    shard, parquet = shard_files(folder, 0)
    _write_store(shard, rows, n, range(0, rows, BATCH), _batch(rows, n))
    index = pd.DataFrame({column: [None] * rows for column in INDEX}).assign(row=range(rows), n_positions=1)
    write_table(parquet, index.assign(type="training", split="train", masked="", label=0.0), INDEX)


def _batch(rows: int, n: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(min(BATCH, rows), n, generator=random) for _ in range(2)]


def _rate(size: int, seconds: list[float]) -> Spread:
    return scaled([1 / s for s in seconds], size / GIGA)


def _write_store(path: Path, rows: int, n: int, starts: range, batch: list[Tensor]) -> None:
    selection = Selection(("weight",), ((n,),), (None,))
    constants, mapping = selection.to_tensors()
    metadata = {"mapping": mapping, "shard": 0, "num_shards": 1}
    aside = path.with_suffix(".partial")
    with ShardWriter(
        aside, rows=rows, n=n, dtype=torch.float32, constants=constants, metadata=metadata, identity={}
    ) as writer:
        for number, start in enumerate(starts, 1):
            positions = torch.arange(start, min(start + BATCH, rows))
            writer.write(positions, *(matrix[: len(positions)] for matrix in batch))
            if number % BATCHES_PER_CHECKPOINT == 0:
                writer.checkpoint(int(positions[-1]) + 1)
        writer.finish()
        aside.rename(path)


def _write_plain(path: Path, rows: int, starts: range, batch: list[Tensor]) -> None:
    with path.open("wb", buffering=0) as file:
        for start in starts:
            for matrix in batch:
                file.write(matrix[: min(BATCH, rows - start)].numpy().data)
        os.fsync(file.fileno())


def read(folder: str, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for the means of shuffled batches of 8 rows, from mapped files in memory, and for reading memory.

    A batch for every thread is asked for at a time; or all of them, whose means are fresh memory.
    """
    torch.set_num_threads(threads)
    store = GradientStore.open(folder)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    batches = [order[start : start + 8] for start in range(0, len(store), 8)]
    same_size = torch.ones(len(store), store.n)

    def means(quantity: Quantity, at_once: int) -> None:
        for start in range(0, len(batches), at_once):
            store.batch_means(quantity, batches[start : start + at_once])

    return interleave(
        {
            MEMORY: lambda: same_size.sum(),
            "alternative": lambda: means("alternative", threads),
            "factual": lambda: means("factual", threads),
            AT_ONCE: lambda: means("alternative", len(batches)),
        },
        rounds,
    )


def _judged(threads: int, seconds: dict[str, list[float]], size: int) -> list[Line]:
    where = f"{threads} thread{'s' if threads > 1 else ''}"
    sizes = dict.fromkeys(seconds, size) | {"factual": 2 * size}  # factual is the sum of two matrices
    lines = [
        Line(f"batch means of {name}, {where}: bytes / bytes read from memory", "x", share, limit, True)
        for name, limit in (("alternative", 0.3), ("factual", 0.3), (AT_ONCE, None))
        for share in [ratio([s * sizes[name] / size for s in seconds[MEMORY]], seconds[name])]
    ]
    rates = {name: _rate(sizes[name], times) for name, times in seconds.items()}
    return lines + [Line(f"reading {name}, {where}", "GB/s", rate) for name, rate in rates.items()]


if __name__ == "__main__":
    serve(read)
