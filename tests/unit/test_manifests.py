"""A stage refuses an input that is not the file of which its manifest tells."""

import hashlib
from pathlib import Path

import pytest

from gradiend_core.errors import GradiendError
from gradiend_core.files import write_json
from pipeline import manifests
from pipeline.stage import Outputs

MODEL = "artifacts/runs/a/seeds/0/model.safetensors"
MANIFEST = "artifacts/manifests/train/a-0.json"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(MODEL).parent.mkdir(parents=True)
    Path(MODEL).write_bytes(b"weights")
    manifest(MANIFEST, b"weights")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest(path: str, content: bytes, output: str = MODEL) -> None:
    """A manifest that says that an output has this content."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(path), {"stage": "train", "inputs": {}, "outputs": {output: digest(content)}})


def refuse(content: bytes, path: str = MODEL) -> None:
    manifests.refuse_damaged({path: digest(content)})


def test_what_the_manifest_says_is_taken() -> None:
    refuse(b"weights")


def test_a_users_own_file_is_taken_wherever_it_lies() -> None:
    refuse(b"a text", "artifacts/notes.txt")
    refuse(b"a text", "notes.txt")


def test_another_content_is_refused_with_file_manifest_and_next_step() -> None:
    with pytest.raises(GradiendError) as caught:
        refuse(b"weighty")
    assert str(caught.value).startswith(f"{MODEL}: damaged or replaced: ")
    assert MANIFEST in str(caught.value)
    assert "python -m pipeline.verify" in str(caught.value)


def test_a_stage_refuses_before_it_writes_anything() -> None:
    Path(MODEL).write_bytes(b"weighty")
    with pytest.raises(GradiendError, match="damaged or replaced"):
        Outputs("select_seed", Path("artifacts/manifests/select_seed/a.json"), {}, [Path("artifacts/runs/a/seeds")])
    Path(MODEL).write_bytes(b"weights")
    Outputs("select_seed", Path("artifacts/manifests/select_seed/a.json"), {}, [Path("artifacts/runs/a/seeds")])


@pytest.mark.parametrize("path", ["own/model.safetensors", "artifacts/runs/a/by_hand.txt", "artifacts/runs/b/x.txt"])
def test_what_no_manifest_names_is_not_looked_at(path: str) -> None:
    refuse(b"anything", path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"outputs": 1}', b"\xff"])
def test_a_damaged_manifest_refuses_nothing(content: bytes) -> None:
    # The engine restores it in its turn, which may come after the stage that reads the artifact.
    Path(MANIFEST).write_bytes(content)
    refuse(b"weighty")


@pytest.mark.parametrize("other", ["artifacts/manifests/train/a.json", "artifacts/manifests/zzz/a-b-1.json"])
def test_one_manifest_that_agrees_is_enough(other: str) -> None:
    # e.g. one that an earlier layout of the pipeline has left
    manifest(other, b"weighty")
    refuse(b"weights")
    refuse(b"weighty")
    with pytest.raises(GradiendError):
        refuse(b"neither")


def test_manifests_of_other_runs_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest("artifacts/manifests/train/b-0.json", b"", "artifacts/runs/b/seeds/0/model.safetensors")
    manifest("artifacts/manifests/train/ab-0.json", b"", "artifacts/runs/ab/seeds/0/model.safetensors")
    read: list[Path] = []
    real = manifests.outputs

    def noted(path: Path) -> dict[str, str]:
        read.append(path)
        return real(path)

    monkeypatch.setattr(manifests, "outputs", noted)
    refuse(b"by hand", "artifacts/runs/a/by_hand.txt")  # which no manifest names, so that all are read
    assert read == [Path(MANIFEST)]
