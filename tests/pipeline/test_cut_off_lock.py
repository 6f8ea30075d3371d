"""A kill while `dvc repro` writes dvc.lock, or its file of locks, leaves a part that DVC may refuse for ever after."""

from pathlib import Path

import pytest
from dvc.dvcfile import Lockfile

from pipeline import verify
from pipeline.dag import private_repo
from project import Project, create

STAGE = "corpus_grammar@english"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = create(tmp_path / "project")
    made.repro(STAGE)
    made.executed()
    return made


def verified(project: Project, *, succeeds: bool) -> str:
    """What the real pipeline.verify, not the project's stubs, says about it."""
    return project.run("python", "-P", "-m", "pipeline.verify", succeeds=succeeds)


def test_verify_sets_it_aside_and_nothing_is_computed_again(project: Project) -> None:
    lock = project.folder / "dvc.lock"
    lock.write_text(lock.read_text()[:4])
    assert "'./dvc.lock' validation failed" in project.repro(STAGE, succeeds=False)
    said = verified(project, succeeds=False)
    assert "dvc.lock: damaged: './dvc.lock' validation failed" in said
    assert "Now dvc.lock.damaged" in said
    assert "skipping run" in project.repro(STAGE)
    assert project.executed() == []
    assert "Nothing is damaged" in verified(project, succeeds=True)


@pytest.mark.parametrize("part", ["", '{"write": {"/pro'])
def test_verify_removes_a_file_of_locks_that_was_cut_off(project: Project, part: str) -> None:
    (project.folder / ".dvc/tmp/rwlock").write_text(part)
    assert "Unable to read RWLock-file" in project.repro(STAGE, succeeds=False)
    said = verified(project, succeeds=True)
    assert "DVC's file of locks was cut off by a kill: removed." in said
    assert "Nothing is damaged" in said
    project.repro(STAGE)
    assert project.executed() == []


def test_only_what_dvc_cannot_read_is_set_aside(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    lock, aside = Path("dvc.lock"), Path("dvc.lock.damaged")
    text = lock.read_text()
    with private_repo() as repo:
        assert verify._set_aside_lock(repo) == 0
        outcomes = set()
        for length in range(0, len(text), len(text) // 60):
            lock.write_text(text[:length])
            damaged = verify._set_aside_lock(repo)
            outcomes.add(damaged)
            if damaged:
                assert aside.read_text() == text[:length]
                aside.unlink()
            else:
                assert lock.read_text() == text[:length]
            Lockfile(repo, "dvc.lock").load()
        assert outcomes == {0, 1}
