"""Memory that runs out is one line that says which parameters take less, not a traceback and not a damaged file."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForMaskedLM

import pipeline.__main__ as program
from gradiend_core import tensors
from gradiend_core.errors import GradiendError, out_of_memory
from gradiend_core.lm.folder import load_masked_lm
from gradiend_core.tables import read_table, write_table
from gradiend_core.tensors import open_tensors, save_tensors
from pipeline.memory import explained

ROOT = Path(__file__).parents[2]
CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."
STAGES = [stage for stage in program.STAGES if stage != "check_params"]


def test_real_failures_are_recognised() -> None:
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        pa.ArrowMemoryError("malloc failed"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),
        ImportError("/lib/a.so: failed to map segment from shared object"),
        ValueError("field 'target' is required for AnnAssign"),
    ],
)
def test_errors_of_libraries_are_recognised(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        OSError(28, "No space left on device"),
        KeyError("x"),
        ValueError("field 'target' is required for AnnAssign in params.yaml"),
        ImportError("/lib/a.so: failed to map segment from shared object: Operation not permitted"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError(CPU), torch.OutOfMemoryError(CUDA), MemoryError()])
def test_a_stage_says_so_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starved(arguments: list[str]) -> None:
        raise error

    real = importlib.import_module
    stage = SimpleNamespace(main=starved, check=lambda: None)
    monkeypatch.setattr(
        program, "importlib", SimpleNamespace(import_module=lambda name: real(name) if "memory" in name else stage)
    )
    assert program.main(["train"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: train: not enough memory (")
    assert said.count("\n") == 1
    assert "pre_prune.topk" in said


def test_other_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> None:
        raise RuntimeError("shapes differ")

    stage = SimpleNamespace(main=broken, check=lambda: None)
    monkeypatch.setattr(program, "importlib", SimpleNamespace(import_module=lambda name: stage))
    with pytest.raises(RuntimeError, match="shapes differ"):
        program.main(["train"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_parameters_named_are_there(stage: str) -> None:
    advice = explained(stage, MemoryError()).partition("Give it more, or use ")[2]
    names = re.findall(r"[a-z]+_[a-z_]+", advice)
    reference = (ROOT / "docs/params.md").read_text()
    assert [name for name in names if f"`{name}`" not in reference and f"## {name}" not in reference] == []


def test_a_table_that_does_not_fit_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    schema = {"x": pa.int64()}
    path = tmp_path / "a.parquet"
    write_table(path, pa.table({"x": [1]}).to_pandas(), schema)
    monkeypatch.setattr(pq.ParquetFile, "read", starved)
    with pytest.raises(pa.ArrowMemoryError):
        read_table(path, schema)


def test_weights_that_do_not_fit_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: object, **__: object) -> None:
        raise SafetensorError("Cannot allocate memory (os error 12)")

    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {})
    monkeypatch.setattr(tensors, "safe_open", starved)
    with pytest.raises(SafetensorError):
        open_tensors(tmp_path / "a.safetensors")


def test_a_model_that_does_not_fit_is_not_called_unusable(
    reference_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(AutoModelForMaskedLM, "from_pretrained", starved)
    said = CPU
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_masked_lm(reference_folder)
    said = "a bad header"
    with pytest.raises(GradiendError, match="a bad header"):
        load_masked_lm(reference_folder)
