"""The gradient stage continues what was interrupted, checks itself first, and works without pruning."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.collector import GradientCollector, Rows
from gradiend_core.gradients.shard_writer import ShardWriter
from gradiend_core.gradients.store import GradientStore
from pipeline import cache_gradients, stage
from tests.unit.test_store import collect, prune, run  # noqa: F401 - a fixture


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows of every batch that is computed."""
    sizes: list[int] = []
    original = GradientCollector.rows

    def rows(self: GradientCollector, factual: Any, alternative: Any, out: Rows | None = None) -> Rows:
        sizes.append(len(factual))
        return original(self, factual, alternative, out)

    monkeypatch.setattr(GradientCollector, "rows", rows)
    return sizes


def interrupt_after(checkpoints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stage be interrupted (Ctrl-C) right after so many blocks of rows are on disk."""
    original, seen = ShardWriter.checkpoint, []

    def checkpoint(self: ShardWriter, done: int) -> None:
        original(self, done)
        seen.append(done)
        if len(seen) == checkpoints:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "checkpoint", checkpoint)
    monkeypatch.setattr(cache_gradients, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)


def content(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"manifest": Path(f"manifests/{folder.name}-0.json").read_bytes().replace(folder.name.encode(), b"")}


@pytest.mark.usefixtures("run")
def test_interrupted_stage_goes_on_at_the_last_block(monkeypatch: pytest.MonkeyPatch, batches: list[int]) -> None:
    prune()
    expected = content(collect("one", "whole"))
    assert sum(batches) == 25 + 2  # and the batch of the self-check
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            collect("one", "parts")
    assert [path.name.startswith(".partial-") for path in Path("parts").iterdir()] == [True, True]
    batches.clear()
    assert content(collect("one", "parts")) == expected
    assert sum(batches) == 25 - 8 + 2  # a block has four batches of two rows


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("changed", ["code", "selection", "threads"])
def test_other_circumstances_begin_afresh(
    monkeypatch: pytest.MonkeyPatch, batches: list[int], caplog: pytest.LogCaptureFixture, changed: str
) -> None:
    prune()
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            collect("one", "parts")
    selection = "selection.safetensors"
    if changed == "code":
        monkeypatch.setattr(cache_gradients, "code_digest", lambda: "edited")
    elif changed == "threads":
        monkeypatch.setattr(cache_gradients, "environment", lambda: stage.environment() | {"threads": "3"})
    else:
        selection = str(prune("rms", "other.safetensors"))
    batches.clear()
    with caplog.at_level(logging.INFO):
        parts = collect("one", "parts", selection=selection)
    assert f"another {changed}" in caplog.text
    assert sum(batches) == 25 + 2
    whole = collect("one", "whole", selection=selection)
    assert (parts / "shard-0.safetensors").read_bytes() == (whole / "shard-0.safetensors").read_bytes()


@pytest.mark.usefixtures("run")
def test_failed_self_check_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prune()
    original = GradientCollector.rows

    def wrong(self: GradientCollector, factual: Any, alternative: Any, out: Rows | None = None) -> Rows:
        rows = original(self, factual, alternative, out)
        return Rows(rows.alternative, rows.diff.roll(1, 0))

    monkeypatch.setattr(GradientCollector, "rows", wrong)
    with pytest.raises(GradiendError, match=r"self-check failed.*BertForMaskedLM.*Nothing was written"):
        collect("one", "store")
    assert not list(Path("store").glob("shard-*"))


@pytest.mark.usefixtures("run")
def test_whole_backbone_without_pruning(caplog: pytest.LogCaptureFixture) -> None:
    prune("keep_all", "everything.safetensors")
    with caplog.at_level(logging.INFO):
        store = GradientStore.open(collect("one", "store", selection="everything.safetensors"))
    assert store.n == sum(torch.Size(shape).numel() for shape in store.selection.shapes)
    assert all(kept is None for kept in store.selection.kept)
    assert f"{store.n} entries: {2 * 25 * store.n * 4 / 1e6:.1f} MB" in caplog.text
    assert "25 rows will take at most about" in caplog.text
    assert json.loads(Path("manifests/store-0.json").read_text())["self_check_relative_error"] < 1e-5
