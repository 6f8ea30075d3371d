"""One shard of a gradient store, written as its rows are computed, and continued after an interruption."""

import errno
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from gradiend_core.durable import lock_alone, make_durable
from gradiend_core.files import write_json
from gradiend_core.tensors import consecutive, layout

logger = logging.getLogger(__name__)

# Batches that wait to be written or are being written: one computes while one is written and one waits.
QUEUED_BATCHES: Final = 2


class _HostRows(NamedTuple):
    """Contiguous rows in CPU memory, and the event after which they are there (None: they are)."""

    rows: Tensor
    copied: torch.cuda.Event | None


class ShardWriter:
    """A safetensors file of `alternative` and `diff` [rows, n], byte for byte that of `save_tensors`.

    Use as a context manager. Rows may come in any order, each once; one thread writes them while the caller computes
    the next. What `checkpoint` has recorded survives a kill or a power cut: the next writer of the same `path` and
    `identity` finds it in `done`. The record is `<path>.progress.json`; it goes when the block is left after `finish`.

    Args:
        path: the file to write, incomplete until `finish`; rename it to its final name after that, in the block.
        rows, n: shape of the two matrices.
        dtype: number format of the two matrices, float32 or bfloat16.
        constants: other tensors of the file (int64, on the CPU), e.g. those of `Selection.to_tensors`.
        metadata: JSON-able, as for `save_tensors`.
        identity: JSON-able; everything that the rows depend on. Rows of another identity are never continued.

    Attributes:
        done: rows 0 … done-1 are complete and on disk.

    Raises:
        GradiendError: another process is writing the same file.
        OSError: the disk refuses; errno and filename are set. Raised by the call after the one that met it, too, and
            by every call from then on: nothing is recorded as complete that is not.
    """

    done: int

    def __init__(
        self,
        path: Path,
        *,
        rows: int,
        n: int,
        dtype: torch.dtype,
        constants: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: Mapping[str, Any],
    ) -> None:
        self._path, self._progress = path, path.with_name(f"{path.name}.progress.json")
        self._shape, self._dtype = (rows, n), dtype
        self._identity = json.loads(json.dumps(identity))
        matrix = torch.empty(rows, n, dtype=dtype, device="meta")
        header, self._starts = layout({**constants, "alternative": matrix, "diff": matrix}, metadata)
        # Constants are wider than any dtype of the matrices, so they stand before them.
        first = [constants[name].contiguous() for name in self._starts if name in constants]
        self._head = b"".join([header, *map(_bytes, first)])
        self._size = self._starts["diff"] + matrix.nbytes
        self._written = torch.zeros(rows, dtype=torch.bool)
        self._pending: deque[Future[None]] = deque()
        self._finished = False

    def __enter__(self) -> Self:
        with self._naming_the_file():
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            with self._naming_the_file():
                self.done = self._resume()
        except BaseException:
            os.close(self._file)
            raise
        self._written[: self.done] = True
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._worker.shutdown(cancel_futures=kind is not None)
        if kind is None and self._finished:
            self._progress.unlink(missing_ok=True)
        os.close(self._file)
        if kind is None:
            self._wait()

    def write(self, positions: Tensor, alternative: Tensor, diff: Tensor) -> None:
        """Hand over rows [m, n] (any device and floating dtype) for the given row numbers [m] (int64).

        Returns before they are written: leave the tensors unchanged afterwards. Waits while two batches are queued.
        """
        shape = (len(positions), self._shape[1])
        if alternative.shape != shape or diff.shape != shape:
            raise ValueError(f"rows of shape {list(alternative.shape)} and {list(diff.shape)}, not {list(shape)}")
        positions = positions.cpu()
        inside = (positions >= 0) & (positions < len(self._written))
        if not inside.all():
            raise ValueError(f"row {positions[~inside][0]}: the shard has {len(self._written)} rows")
        if self._written[positions].any() or len(set(positions.tolist())) < len(positions):
            raise ValueError(f"some of the rows {positions.tolist()} have been written before")
        self._wait(QUEUED_BATCHES - 1)
        self._written[positions] = True
        runs = [(int(positions[run.start]), run) for run in consecutive(positions)]
        batch = {name: _to_host(rows, self._dtype) for name, rows in (("alternative", alternative), ("diff", diff))}
        self._pending.append(self._worker.submit(self._write, runs, batch))

    def checkpoint(self, done: int) -> None:
        """Wait until rows 0 … done-1, all handed over before, are on disk, and record that they are."""
        if done > len(self._written) or not self._written[:done].all():
            raise ValueError(f"not all of the first {done} rows have been written")
        self._wait()
        self._record(done)
        self.done = done

    def finish(self) -> None:
        """Wait until every row is on disk: the file is complete, and nothing is left to be continued."""
        if not self._written.all():
            missing = (~self._written).nonzero()[:, 0]
            raise ValueError(f"{len(missing)} of {len(self._written)} rows were never written, first row {missing[0]}")
        self.checkpoint(len(self._written))
        self._finished = True

    def _lock(self) -> None:
        # Two writers of one file, an orphan of a killed run beside its successor, would mix their rows.
        lock_alone(self._file, self._path, "writing this file")

    def _resume(self) -> int:
        """How many rows an earlier writer left complete; when there are none, the file is begun."""
        done, obstacle = self._completed()
        if done:
            logger.info("%s: %d of %d rows are there already", self._path, done, len(self._written))
            return done
        if obstacle:
            logger.info("%s: begun afresh, because %s", self._path, obstacle)
        self._record(0)  # before the file is emptied: what is recorded as complete must be there at any moment
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self._size)
        _pwrite(self._file, memoryview(self._head), 0)
        return 0

    def _completed(self) -> tuple[int, str]:
        """How many rows an earlier writer left complete, or 0 and why what it left is of no use (if it left any)."""
        size, rows = os.fstat(self._file).st_size, range(len(self._written) + 1)
        try:
            progress = json.loads(self._progress.read_text("utf-8"))
            identity, done = dict(progress["identity"]), rows.index(progress["done"])
        except FileNotFoundError:
            return 0, f"{self._progress.name} is missing" if size else ""
        except (ValueError, KeyError, TypeError):
            return 0, f"{self._progress.name} is damaged"
        if identity != self._identity:
            keys = sorted(key for key in {*identity, *self._identity} if identity.get(key) != self._identity.get(key))
            return 0, f"it was made with another {', '.join(keys)}"
        if size != self._size or os.pread(self._file, len(self._head), 0) != self._head:
            return 0, "it has another size or header"
        return done, ""

    def _record(self, done: int) -> None:
        """Make durable what has been written so far, then the record that rows 0 … done-1 are among it."""
        with self._naming_the_file():
            os.fsync(self._file)
            aside = self._progress.with_suffix(".tmp")
            write_json(aside, {"identity": self._identity, "done": done})
            with aside.open("rb") as stream:
                os.fsync(stream.fileno())
            aside.replace(self._progress)
            make_durable(self._path.parent)

    def _write(self, runs: list[tuple[int, slice]], batch: Mapping[str, _HostRows]) -> None:
        row_bytes = self._shape[1] * self._dtype.itemsize
        with self._naming_the_file():
            for name, (rows, copied) in batch.items():
                if copied is not None:
                    copied.synchronize()
                for first, run in runs:
                    _pwrite(self._file, _bytes(rows[run]), self._starts[name] + first * row_bytes)

    def _wait(self, most: int = 0) -> None:
        """Until at most `most` batches are pending; a failed one stays pending and is raised every time."""
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._pending[0].result()
            self._pending.popleft()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno or errno.EIO, error.strerror, str(self._path)) from error


def _to_host(rows: Tensor, dtype: torch.dtype) -> _HostRows:
    """Rows in CPU memory and `dtype`; copied only when they are not already so, from CUDA without waiting for it."""
    if rows.device.type != "cuda":
        return _HostRows(rows.detach().to("cpu", dtype).contiguous(), None)
    host = torch.empty(rows.shape, dtype=dtype, pin_memory=True)
    host.copy_(rows.detach().to(dtype).contiguous(), non_blocking=True)
    return _HostRows(host, torch.cuda.current_stream(rows.device).record_event())


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(torch.uint8).flatten().numpy().data


def _pwrite(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
