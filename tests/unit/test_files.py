"""Files with stable bytes, statistics against references, progress lines."""

import errno
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError

from gradiend_core import progress
from gradiend_core.errors import GradiendError
from gradiend_core.files import read_json, sha256_file, write_json
from gradiend_core.statistics import bootstrap_interval, pearson, ratio_interval
from gradiend_core.tables import read_table, write_table
from gradiend_core.tensors import disk_errors, load_tensors, open_tensors, read_metadata, save_tensors

SCHEMA = {"name": pa.string(), "step": pa.int64(), "value": pa.float64()}


def frame() -> pd.DataFrame:
    return pd.DataFrame({"value": [0.5, np.nan], "step": [0, 1], "name": ["é", None], "extra": [1, 2]}, index=[7, 9])


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_is_sorted_and_refuses_what_json_has_no_word_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_bytes() == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    assert read_json(path) == {"a": "é", "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (read_json, load_tensors, read_metadata, open_tensors, lambda path: read_table(path, SCHEMA)):
        with pytest.raises(
            GradiendError, match=rf"^{path}: damaged: .*Delete it and run the stage that makes it again"
        ):
            read(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for read in (sha256_file, read_json, load_tensors, read_metadata, lambda path: read_table(path, SCHEMA)):
        with pytest.raises(GradiendError, match=rf"^{path}: .*(Run the stage that makes it|Make it) first"):
            read(path)


def test_table_keeps_columns_of_the_schema_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(path, frame(), SCHEMA)
    read = read_table(path, SCHEMA)
    assert list(read.columns) == list(SCHEMA)
    assert list(read.index) == [0, 1]
    assert read["name"].isna().tolist() == [False, True]
    assert read["value"].isna().tolist() == [False, True]
    assert read["step"].tolist() == [0, 1]


def test_equal_tables_have_equal_bytes_whatever_their_index(tmp_path: Path) -> None:
    write_table(tmp_path / "a", frame(), SCHEMA)
    write_table(tmp_path / "b", frame().reset_index(drop=True)[["step", "name", "value"]], SCHEMA)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert b"pandas" not in content
    assert b"ARROW:schema" not in content


def test_table_with_other_columns_or_types_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(path, frame(), SCHEMA)
    with pytest.raises(
        GradiendError, match=r"a\.parquet: damaged: column 'split' is missing \(it has name, step, value"
    ):
        read_table(path, SCHEMA | {"split": pa.string()})
    with pytest.raises(GradiendError, match="damaged: column 'step' has type int64, not double"):
        read_table(path, SCHEMA | {"step": pa.float64()})


def test_tensors_and_metadata_return_with_stable_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([1, 2])}
    metadata = {"z": [1, 2], "a": {"k": None}}
    save_tensors(tmp_path / "a", tensors, metadata)
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_metadata(tmp_path / "a") == metadata
    read = load_tensors(tmp_path / "a")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_without_our_metadata_are_damaged(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    assert load_tensors(tmp_path / "a") == {}
    with pytest.raises(GradiendError, match="its header has no 'gradiend' metadata"):
        read_metadata(tmp_path / "a")


def test_refusal_of_the_disk_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        save_tensors(tmp_path / "no folder" / "a", {"a": torch.zeros(1)}, {})
    assert caught.value.filename == str(tmp_path / "no folder" / "a")


def test_pearson_is_that_of_numpy() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1)


def test_constant_vectors_correlate_with_nothing() -> None:
    constant = np.full(3, 0.1)  # whose mean is not exactly 0.1
    assert pearson(constant, constant) == 0
    assert pearson(constant, np.array([1.0, 2, 4])) == 0


def test_bootstrap_of_a_mean_has_the_width_of_its_standard_error() -> None:
    x = np.random.default_rng(1).normal(size=400)

    def interval(seed: int, confidence: float = 0.95) -> tuple[float, float]:
        return bootstrap_interval(
            lambda rows: float(x[rows].mean()), len(x), samples=2000, confidence=confidence, seed=seed
        )

    low, high = interval(0)
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1)
    assert interval(0) == (low, high)
    assert interval(1) != (low, high)
    narrow_low, narrow_high = interval(0, 0.5)
    assert low < narrow_low < narrow_high < high


def test_ratio_weighs_rows_by_their_denominators() -> None:
    numerators, denominators = np.array([1.0, 0, 9]), np.array([1.0, 2, 9])
    value, low, high = ratio_interval(numerators, denominators, samples=500, confidence=0.9, seed=0)
    assert value == pytest.approx(10 / 12)
    assert 0 <= low <= value <= high <= 1
    ones = np.ones(200)
    x = np.random.default_rng(2).normal(size=200)
    mean, low, high = ratio_interval(x, ones, samples=2000, confidence=0.95, seed=0)
    assert mean == pytest.approx(x.mean())
    assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(200), rel=0.1)


def test_progress_passes_items_on_and_speaks_every_fifteen_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO, logger="gradiend_core.progress"):
        assert list(progress.track("abcdef", "letters")) == list("abcdef")
    # The clock shows 10, 20, … when item 0, 1, … is due; lines 20 s apart are the first more than 15 s apart.
    assert caplog.messages == [
        "letters: 1 of 6, about 100 s left",
        "letters: 3 of 6, about 40 s left",
        "letters: 5 of 6, about 12 s left",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (Exception("Read-only file system (os error 30)"), errno.EROFS),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), errno.EIO),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), errno.EIO),
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
    ],
)
def test_a_disk_that_refuses_is_an_os_error_that_names_the_file(error: Exception, code: int) -> None:
    with pytest.raises(OSError, match="a\\.bin") as caught, disk_errors(Path("a.bin")):
        raise error
    assert caught.value.errno == code
    assert caught.value.filename == "a.bin"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("no number"), FileNotFoundError(2, "No such", "b")])
def test_other_errors_of_a_writer_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(Path("a.bin")):
        raise error
    assert caught.value is error
