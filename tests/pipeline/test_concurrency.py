"""Several engines, and several jobs of one stage, in one folder: they wait or refuse, and nothing is made twice."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from project import Project, create

# What stage `train` of both runs does besides its work, so that something else can happen meanwhile.
_WAIT = """SALT = ""
import time
from pathlib import Path
Path("training").touch()
while not Path("go").exists():
    time.sleep(0.02)
"""
_TARGET = "artifacts/runs/a/seed_report.json"


class Started:
    """An engine that runs in the background."""

    def __init__(self, project: Project, *command: str) -> None:
        self._output = project.folder / f"output-{time.monotonic_ns()}"
        with self._output.open("w") as stream:
            self.process = project.start(*command, output=stream)

    def said(self) -> str:
        return self._output.read_text()

    def says(self, words: str) -> None:
        """Wait until it has said this."""
        wait_until(lambda: words in self.said() or self.process.poll() is not None)
        assert words in self.said()

    def succeeds(self) -> str:
        """Wait for its end; what it said."""
        assert self.process.wait(timeout=120) == 0, self.said()
        return self.said()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project made up to the gradients, whose training waits for a file `go`."""
    project = create(tmp_path_factory.mktemp("concurrency") / "my project")
    (project.folder / "pipeline/train.py").write_text(_WAIT)
    project.snakemake("artifacts/runs/a/gradients/shard-0.parquet")
    project.executed()
    return project


@pytest.fixture
def project(half: Project, tmp_path: Path) -> Iterator[Project]:
    copy = half.copy(tmp_path / "my project")
    yield copy
    go(copy)


def snakemake(project: Project) -> Started:
    return Started(project, "snakemake", "--cores", "2", "--nocolor", _TARGET)


def go(project: Project) -> None:
    (project.folder / "go").touch()


def until_training(project: Project, started: Started) -> None:
    wait_until(lambda: (project.folder / "training").exists() or started.process.poll() is not None)
    assert started.process.poll() is None, started.said()


def made_once(project: Project) -> None:
    """Every stage that was due has been executed once, and there is nothing more to do."""
    assert project.executed() == ["select_seed/a", "train/a-0"]
    assert "Nothing to be done" in project.snakemake(_TARGET)


def test_of_two_snakemakes_one_waits_and_then_executes_nothing(project: Project) -> None:
    first = snakemake(project)
    until_training(project, first)
    second = snakemake(project)
    second.says("Another Snakemake is at work in this folder: waiting for its end.")
    assert "Train run a with seed 0" in project.snakemake("--dry-run", _TARGET)
    go(project)
    first.succeeds()
    second.succeeds()
    made_once(project)


def test_while_snakemake_is_at_work_dvc_refuses_and_touches_nothing(project: Project) -> None:
    first = snakemake(project)
    until_training(project, first)
    before = project.artifacts()
    second = Started(project, "dvc", "repro", "select_seed@a")
    assert second.process.wait(timeout=60) != 0
    assert "is busy, it is being blocked by" in second.said()
    assert f"(PID {first.process.pid})" in second.said()
    assert project.artifacts() == before
    go(project)
    first.succeeds()
    made_once(project)


def test_while_dvc_is_at_work_snakemake_waits(project: Project) -> None:
    first = Started(project, "dvc", "repro", "select_seed@a")
    until_training(project, first)
    second = snakemake(project)
    second.says("DVC is at work in this folder: waiting for its end.")
    go(project)
    first.succeeds()
    second.succeeds()
    made_once(project)


def test_after_a_killed_snakemake_the_same_command_goes_on_and_waits_for_what_it_left(project: Project) -> None:
    first = snakemake(project)
    until_training(project, first)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    second = snakemake(project)
    log = project.folder / "logs/train/a-0.log"
    wait_until(lambda: log.exists() and "waiting for another job" in log.read_text())
    go(project)
    second.succeeds()
    made_once(project)


def test_jobs_of_one_stage_wait_for_each_other(project: Project) -> None:
    first, second = (Started(project, "python", "-m", "pipeline.cached", "train@a-0") for _ in range(2))
    wait_until(lambda: "waiting for another job" in first.said() + second.said())
    go(project)
    outputs = [first.succeeds(), second.succeeds()]
    assert project.executed() == ["train/a-0"]
    assert sorted("restored from the cache" in output for output in outputs) == [False, True]


def test_a_file_of_locks_that_a_kill_has_cut_off_stops_nobody(project: Project) -> None:
    go(project)
    locks = project.folder / ".dvc/tmp/rwlock"
    locks.write_text('{"write": {"/pro')
    project.snakemake(_TARGET)
    assert not any(json.loads(locks.read_text()).values())
    made_once(project)
