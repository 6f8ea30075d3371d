"""A shard is the file that would have been written at once, whatever happened on the way."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.shard_writer import ShardWriter
from gradiend_core.tensors import consecutive, layout, save_tensors

ROWS, N = 23, 17
METADATA = {"mapping": {"names": ["ä", 'b"\\\n'], "shapes": [[3, 4]]}, "shard": 0, "target_classes": ["é", "☃"]}
KEPT = {f"kept.{i}": torch.arange(i) for i in (0, 2, 10, 5)}  # an empty one; 10 stands before 2 and 5
IDENTITY = {"selection": "abc", "batch_size": 4}
FULL = OSError(errno.ENOSPC, "No space left on device")


def content(rows: int = ROWS, n: int = N, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, n, generator=generator).to(dtype) for name in ("alternative", "diff")}


def bytes_at_once(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] = METADATA) -> bytes:
    save_tensors(folder / "at once", tensors, metadata)
    return (folder / "at once").read_bytes()


def open_writer(path: Path, **changes: Any) -> ShardWriter:
    arguments: dict[str, Any] = {"rows": ROWS, "n": N, "dtype": torch.float32, "constants": KEPT}
    return ShardWriter(path, **(arguments | {"metadata": METADATA, "identity": IDENTITY} | changes))


def write_rows(writer: ShardWriter, rows: Tensor, tensors: dict[str, Tensor] | None = None) -> None:
    tensors = tensors or content()
    writer.write(rows, tensors["alternative"][rows], tensors["diff"][rows])


def interrupt(path: Path) -> None:
    """Write 10 rows, make them durable, write some more, and stop with an exception."""
    with suppress(KeyboardInterrupt), open_writer(path) as writer:
        write_rows(writer, torch.arange(10))
        writer.checkpoint(10)
        write_rows(writer, torch.arange(10, 15))
        raise KeyboardInterrupt


def complete(path: Path) -> None:
    """Write the rows that are missing."""
    with open_writer(path) as writer:
        write_rows(writer, torch.arange(writer.done, ROWS))
        writer.finish()


def progress_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.progress.json")


def recorded(path: Path) -> int:
    return int(json.loads(progress_of(path).read_text())["done"])


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".partial-shard-0.safetensors"


# --- bytes


@pytest.mark.parametrize("kept", [{}, KEPT], ids=["whole", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_bytes_are_those_of_a_file_written_at_once(
    tmp_path: Path, path: Path, rows: int, dtype: torch.dtype, kept: dict[str, Tensor]
) -> None:
    tensors = content(rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    with open_writer(path, rows=rows, dtype=dtype, constants=kept) as writer:
        assert writer.done == 0
        for batch in torch.split(order, 4):
            write_rows(writer, batch, tensors)
        writer.finish()
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert path.read_bytes() == bytes_at_once(tmp_path, stored | kept)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, "at once"]


@pytest.mark.parametrize("length", range(9))
def test_header_is_padded_to_eight_bytes(tmp_path: Path, length: int) -> None:
    tensors = content(2, 3, torch.bfloat16) | KEPT | {'ä "☃"\n': torch.zeros(1)}
    header, starts = layout(tensors, {"x": "y" * length})
    whole = bytes_at_once(tmp_path, tensors, {"x": "y" * length})
    assert whole.startswith(header)
    assert starts["diff"] + tensors["diff"].nbytes == len(whole)
    assert min(starts.values()) == len(header)
    assert len(header) % 8 == 0


def test_file_is_whole_after_finish_and_moved_away_in_the_block(tmp_path: Path, path: Path) -> None:
    with open_writer(path) as writer:
        write_rows(writer, torch.arange(ROWS))
        writer.finish()
        path.rename(tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == bytes_at_once(tmp_path, content() | KEPT)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["at once", "final"]


def test_rows_may_be_views_of_another_type(tmp_path: Path, path: Path) -> None:
    tensors = content()
    with open_writer(path) as writer:
        for row in torch.arange(ROWS):
            alternative, diff = tensors["alternative"][row][None], tensors["diff"][row][None]
            strided = torch.stack([alternative, diff], dim=-1).requires_grad_()[..., 0]
            writer.write(row[None], strided, diff.double())
        writer.write(torch.empty(0, dtype=torch.int64), torch.empty(0, N), torch.empty(0, N))
        writer.finish()
    assert path.read_bytes() == bytes_at_once(tmp_path, tensors | KEPT)


def test_partial_writes_are_continued(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:50], offset))
    complete(path)
    assert path.read_bytes() == bytes_at_once(tmp_path, content() | KEPT)


def test_consecutive_rows_are_one_write_and_nothing_is_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []

    def record(file: int, data: memoryview, offset: int) -> int:
        written.append((np.frombuffer(data, np.uint8).__array_interface__["data"][0], len(data)))
        return len(data)

    rows = content(7)
    with open_writer(path) as writer:
        monkeypatch.setattr(os, "pwrite", record)
        writer.write(torch.tensor([4, 5, 6, 2, 9, 10, 1]), rows["alternative"], rows["diff"])
        writer.checkpoint(0)
    starts, size = {name: matrix.data_ptr() for name, matrix in rows.items()}, 4 * N
    runs = [(0, 3), (3, 1), (4, 2), (6, 1)]
    assert written == [(starts[name] + size * at, size * m) for name in ("alternative", "diff") for at, m in runs]


@pytest.mark.parametrize(
    ("positions", "slices"),
    [
        ([], []),
        ([3], [(0, 1)]),
        ([3, 4, 5], [(0, 3)]),
        ([5, 4, 3], [(0, 1), (1, 2), (2, 3)]),
        ([1, 1, 2, 4], [(0, 1), (1, 3), (3, 4)]),
    ],
)
def test_consecutive(positions: list[int], slices: list[tuple[int, int]]) -> None:
    found = consecutive(torch.tensor(positions, dtype=torch.int64))
    assert [(run.start, run.stop) for run in found] == slices


# --- what a caller may get wrong


def test_missing_rows_are_found_at_the_end(path: Path) -> None:
    with open_writer(path) as writer:
        write_rows(writer, torch.tensor([row for row in range(ROWS) if row not in (7, 20)]))
        with pytest.raises(ValueError, match="2 of 23 rows were never written, first row 7"):
            writer.finish()
    assert progress_of(path).exists()


def test_rows_that_cannot_be_meant_are_refused(path: Path) -> None:
    with open_writer(path) as writer:
        write_rows(writer, torch.arange(3))
        for wrong, message in (([2], "written before"), ([5, 5], "written before"), ([-1], "row -1"), ([23], "row 23")):
            with pytest.raises(ValueError, match=message):
                writer.write(torch.tensor(wrong), torch.zeros(len(wrong), N), torch.zeros(len(wrong), N))
        for shape in ((2, N), (1, N - 1)):
            with pytest.raises(ValueError, match=r"rows of shape \[1, 17\] and .*, not \[1, 17\]"):
                writer.write(torch.tensor([8]), torch.zeros(1, N), torch.zeros(shape))
        with pytest.raises(ValueError, match="not all of the first 4 rows"):
            writer.checkpoint(4)
        write_rows(writer, torch.arange(3, ROWS))
        with pytest.raises(ValueError, match="not all of the first 24 rows"):
            writer.checkpoint(24)


# --- resuming


def test_interrupted_rows_are_continued_and_not_written_again(
    tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(path)
    assert json.loads(progress_of(path).read_text()) == {"identity": IDENTITY, "done": 10}
    expected = bytearray(bytes_at_once(tmp_path, content() | KEPT))
    assert path.stat().st_size == len(expected)
    in_row_9 = layout(content() | KEPT, METADATA)[1]["diff"] + 10 * N * 4 - 1
    expected[in_row_9] ^= 1
    overwrite(path, in_row_9, bytes([expected[in_row_9]]))  # it shows that the row is not touched again
    with caplog.at_level(logging.INFO):
        complete(path)
    assert caplog.messages == [f"{path}: 10 of 23 rows are there already"]
    assert path.read_bytes() == expected


def _set_record(path: Path, **changes: Any) -> None:
    progress_of(path).write_text(json.dumps({"identity": IDENTITY, "done": 10} | changes))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no record": lambda path: progress_of(path).unlink(),
    "no data": Path.unlink,
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "another kept entry": lambda path: overwrite(path, layout(content() | KEPT, METADATA)[1]["kept.10"], b"\1"),
    "half a record": lambda path: progress_of(path).write_text('{"done": 3'),
    "no identity": lambda path: progress_of(path).write_text('{"done": 3}'),
    "no mapping": lambda path: _set_record(path, identity=4),
    "more than all": lambda path: _set_record(path, done=ROWS + 1),
    "negative": lambda path: _set_record(path, done=-1),
}
CHANGES: dict[str, dict[str, Any]] = {
    "identity": {"identity": IDENTITY | {"batch_size": 5, "threads": 1}},
    "metadata": {"metadata": METADATA | {"shard": 1}},
    "rows": {"rows": ROWS + 1},
    "dtype": {"dtype": torch.bfloat16, "n": 2 * N},  # as many bytes
}


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("identity", "it was made with another batch_size, threads"),
        ("metadata", "it has another size or header"),
        ("rows", "it has another size or header"),
        ("dtype", "it has another size or header"),
        ("no record", ".partial-shard-0.safetensors.progress.json is missing"),
        ("no data", "it has another size or header"),
        ("shorter", "it has another size or header"),
        ("longer", "it has another size or header"),
        ("another kept entry", "it has another size or header"),
        ("half a record", ".partial-shard-0.safetensors.progress.json is damaged"),
        ("no identity", ".partial-shard-0.safetensors.progress.json is damaged"),
        ("no mapping", ".partial-shard-0.safetensors.progress.json is damaged"),
        ("more than all", ".partial-shard-0.safetensors.progress.json is damaged"),
        ("negative", ".partial-shard-0.safetensors.progress.json is damaged"),
    ],
)
def test_what_cannot_be_continued_is_begun_afresh(
    tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture, what: str, why: str
) -> None:
    interrupt(path)
    if what in DAMAGES:
        DAMAGES[what](path)
    changes = CHANGES.get(what, {})
    tensors = content(changes.get("rows", ROWS), changes.get("n", N))
    stored = {name: tensor.to(changes.get("dtype", torch.float32)) for name, tensor in tensors.items()} | KEPT
    starts = layout(stored, METADATA)[1]
    with caplog.at_level(logging.INFO), open_writer(path, **changes) as writer:
        assert writer.done == 0
        assert not any(path.read_bytes()[starts["alternative"] + 8 :])  # no row of before is left
        write_rows(writer, torch.arange(len(tensors["diff"])), tensors)
        writer.finish()
    assert caplog.messages == [f"{path}: begun afresh, because {why}"]
    assert path.read_bytes() == bytes_at_once(tmp_path, stored, changes.get("metadata", METADATA))


def test_a_new_file_and_one_without_complete_rows_need_no_words(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with suppress(KeyboardInterrupt), open_writer(path) as writer:
                write_rows(writer, torch.arange(3))
                raise KeyboardInterrupt
    assert caplog.messages == []


def test_record_of_another_identity_is_gone_before_its_rows_are(path: Path) -> None:
    # Otherwise a kill between the two leaves a file of zeros that the first identity takes for its own rows.
    interrupt(path)
    with suppress(KeyboardInterrupt), open_writer(path, identity={"other": 1}):
        raise KeyboardInterrupt
    with open_writer(path) as writer:
        assert writer.done == 0


def test_a_whole_file_that_was_not_moved_away_is_continued_at_its_end(tmp_path: Path, path: Path) -> None:
    with suppress(KeyboardInterrupt), open_writer(path) as writer:
        write_rows(writer, torch.arange(ROWS))
        writer.finish()
        raise KeyboardInterrupt
    with open_writer(path) as writer:
        assert writer.done == ROWS
        writer.finish()
    assert path.read_bytes() == bytes_at_once(tmp_path, content() | KEPT)
    assert not progress_of(path).exists()


def test_file_in_use_is_refused(path: Path) -> None:
    with open_writer(path) as writer:
        write_rows(writer, torch.arange(4))
        writer.checkpoint(4)
        before = path.read_bytes()
        with pytest.raises(GradiendError, match=r"shard-0\S+: another process is writing.*Wait"), open_writer(path):
            pass
        assert path.read_bytes() == before
        assert recorded(path) == 4
    complete(path)


def test_file_system_without_locks_will_do(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    complete(path)
    assert path.read_bytes() == bytes_at_once(tmp_path, content() | KEPT)


# --- kills

KILLED_ROWS, BLOCK = 400, 40


def _write_slowly(path: Path, log: Path) -> None:
    """Batches of 8 rows, shuffled in blocks; a line in `log` at first and before each block, a checkpoint after it."""
    tensors = content(KILLED_ROWS)
    lines = log.open("a", buffering=1)
    lines.write("opening\n")
    with lines, open_writer(path, rows=KILLED_ROWS) as writer:
        for start in range(writer.done, KILLED_ROWS, BLOCK):
            lines.write(f"{start}\n")
            order = start + torch.randperm(BLOCK, generator=torch.Generator().manual_seed(start))
            for rows in torch.split(order, 8):
                write_rows(writer, rows, tensors)
                time.sleep(0.005)
            writer.checkpoint(start + BLOCK)
        writer.finish()
        path.rename(path.with_name("final"))


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_lose_no_checkpoint_and_change_no_byte(tmp_path: Path, path: Path, seed: int) -> None:
    moments = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "safetensors.torch", "torch"])
    expected = bytes_at_once(tmp_path, content(KILLED_ROWS) | KEPT)
    starts = layout(content(KILLED_ROWS) | KEPT, METADATA)[1]
    log = tmp_path / "log"
    log.touch()
    done, kills = 0, 0
    while True:
        before = log.read_text()
        process = context.Process(target=_write_slowly, args=(path, log))
        process.start()
        while process.is_alive() and log.read_text() == before:  # importing takes a while
            time.sleep(0.002)
        process.join(moments.uniform(0, 0.12))
        process.kill()
        process.join()
        blocks = log.read_text().removeprefix(before).split()[1:]
        assert not blocks or int(blocks[0]) == done, "not continued where the record says"
        if (tmp_path / "final").exists():
            break
        kills, done = kills + 1, recorded(path) if progress_of(path).exists() else done
        if not done:
            continue
        current = path.read_bytes()
        for name in ("alternative", "diff"):
            stop = starts[name] + done * N * 4
            assert current[starts[name] : stop] == expected[starts[name] : stop], "recorded, but not there"
            overwrite(path, stop, b"\xff" * ((KILLED_ROWS - done) * N * 4))  # nothing else may be relied upon
    assert (tmp_path / "final").read_bytes() == expected
    assert kills


# --- the disk


def fail_at(call: int) -> Callable[[int, memoryview, int], int]:
    """os.pwrite on a disk that is full at its nth call, and then no longer."""
    pwrite, calls = os.pwrite, itertools.count()

    def write(file: int, data: memoryview, offset: int) -> int:
        if next(calls) == call:
            raise FULL
        return pwrite(file, data, offset)

    return write


def write_more(writer: ShardWriter) -> None:
    for row in range(12, 15):  # the third has to wait for the first
        write_rows(writer, torch.tensor([row]))


AFTER_THE_FAILURE: dict[str, Callable[[ShardWriter], None]] = {
    "write": write_more,
    "checkpoint": lambda writer: writer.checkpoint(12),
    "finish": lambda writer: writer.finish(),
    "leaving": lambda writer: None,
}


@pytest.mark.parametrize("call", AFTER_THE_FAILURE)
@pytest.mark.parametrize("at", [0, 1])
def test_full_disk_surfaces_at_the_next_call(path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int) -> None:
    def run() -> None:
        with open_writer(path) as writer:
            write_rows(writer, torch.arange(8))
            writer.checkpoint(8)
            monkeypatch.setattr(os, "pwrite", fail_at(at))
            write_rows(writer, torch.arange(8, ROWS if call == "finish" else 12))
            AFTER_THE_FAILURE[call](writer)

    with pytest.raises(OSError, match="No space left on device") as caught:
        run()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert recorded(path) == 8


def test_full_disk_is_never_forgotten(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(KeyboardInterrupt), open_writer(path) as writer:
        write_rows(writer, torch.arange(8))
        writer.checkpoint(8)
        monkeypatch.setattr(os, "pwrite", fail_at(0))
        write_rows(writer, torch.arange(8, 12))
        for _ in range(3):
            with pytest.raises(OSError, match="No space"):
                writer.checkpoint(12)
        raise KeyboardInterrupt
    assert recorded(path) == 8
    complete(path)
    assert path.read_bytes() == bytes_at_once(tmp_path, content() | KEPT)


def test_rows_are_durable_before_they_are_recorded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    with open_writer(path) as writer:
        write_rows(writer, torch.arange(4))
        data, record, synced = path.stat().st_ino, progress_of(path).stat().st_ino, []

        def log(file: int) -> None:
            synced.append((os.fstat(file).st_ino, recorded(path)))
            fsync(file)

        monkeypatch.setattr(os, "fsync", log)
        writer.checkpoint(4)
        new_record, folder = progress_of(path).stat().st_ino, path.parent.stat().st_ino
        assert record != new_record
    assert synced == [(data, 0), (new_record, 0), (folder, 4)]


def test_refusal_to_make_rows_durable_is_no_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with open_writer(path) as writer:
        write_rows(writer, torch.arange(4))
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="Input/output error") as caught:
            writer.checkpoint(4)
    assert caught.value.filename == str(path)
    assert (recorded(path), writer.done) == (0, 0)


def test_file_larger_than_allowed_is_refused_at_once(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, open_writer(path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no folder" / "shard"
    with pytest.raises(FileNotFoundError) as caught, open_writer(path):
        pass
    assert caught.value.filename == str(path)


# --- computing goes on meanwhile


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on nothing is written for half a second, until the event."""
    opened, pwrite = threading.Event(), os.pwrite

    def wait(file: int, data: memoryview, offset: int) -> int:
        opened.wait()
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", wait)
    threading.Timer(0.5, opened.set).start()
    return opened


def test_two_batches_are_queued_and_the_third_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(path) as writer:
        opened = hold_writes(monkeypatch)
        write_rows(writer, torch.tensor([0]))
        write_rows(writer, torch.tensor([1]))
        assert not opened.is_set()
        write_rows(writer, torch.tensor([2]))
        assert opened.is_set()


def test_leaving_waits_for_what_is_queued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(path) as writer:
        hold_writes(monkeypatch)
        write_rows(writer, torch.tensor([0]))
        write_rows(writer, torch.tensor([ROWS - 1]))
    assert path.read_bytes()[-N * 4 :] == content()["diff"][-1].numpy().tobytes()


def test_exception_of_the_caller_drops_what_is_queued_and_closes_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, written = threading.Event(), []

    def slowly(file: int, data: memoryview, offset: int) -> int:
        started.set()
        time.sleep(0.1)
        written.append(offset)
        return len(data)

    before = os.listdir("/dev/fd")
    with suppress(KeyboardInterrupt), open_writer(path) as writer:
        monkeypatch.setattr(os, "pwrite", slowly)
        write_rows(writer, torch.tensor([0]))
        write_rows(writer, torch.tensor([1]))
        started.wait()
        raise KeyboardInterrupt
    assert len(written) == 2  # both matrices of the batch that was being written, nothing of the one that waited
    assert os.listdir("/dev/fd") == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-writer")]
