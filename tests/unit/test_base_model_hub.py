"""What the stage for models of the hub asks for; the hub itself is not there in tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradiend_core.lm.folder import MODEL_FILES
from pipeline import base_model_hub


def test_the_model_is_that_of_the_repository_at_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def load(name: str, *, revision: str) -> tuple[str, str]:
        asked.append((name, revision))
        return "model", "tokenizer"

    def save(folder: Path, model: str, tokenizer: str) -> None:
        for name in MODEL_FILES:
            (folder / name).write_text(f"{model} {tokenizer}")

    monkeypatch.setattr(base_model_hub, "load_masked_lm", load)
    monkeypatch.setattr(base_model_hub, "save_masked_lm", save)
    monkeypatch.chdir(tmp_path)
    section = {"repo_id": "some/model", "revision": "0123456"}
    Path("params.yaml").write_text(json.dumps({"theirs": section}))
    base_model_hub.main(["--params", "theirs", "--output", "out", "--manifest", "manifest.json"])
    assert asked == [("some/model", "0123456")]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(MODEL_FILES)
    assert json.loads(Path("manifest.json").read_bytes())["params"] == section
