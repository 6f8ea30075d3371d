"""Jobs of one pipeline side by side: each with its own GPU, and never two of one stage. With stub stages."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from project import create
from slurm import wait_until

# What a stub stage does besides its work: say which GPUs it sees, wait until it may go on.
_PROBE = """SALT = ""
import os, time
from pathlib import Path
with open("seen", "a") as seen:
    seen.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
while not Path("go").exists():
    time.sleep(0.05)
"""


@dataclass(frozen=True)
class Job:
    """A job's process, and the file with what it has said."""

    process: subprocess.Popen[bytes]
    output: Path

    def waits(self) -> bool:
        """Whether it has found that another job makes its stage."""
        return "waiting for another job" in self.output.read_text()


class Jobs:
    """Jobs of a project, started beside each other; its stages wait for `let_go`."""

    def __init__(self, folder: Path) -> None:
        project = create(folder / "project")
        project.run("python", "-m", "pipeline", "check_params")
        self.folder = project.folder
        for stage in ("corpus_grammar", "corpus_text"):
            (self.folder / f"pipeline/{stage}.py").write_text(_PROBE)
        gpus = {"CUDA_VISIBLE_DEVICES": "4,5", "TMPDIR": str(folder), "DVC_SITE_CACHE_DIR": str(folder / "site")}
        self._environment = os.environ | gpus
        self._started: list[Job] = []

    def start(self, stage: str) -> "Job":
        """Start a job that makes the stage, with a GPU for itself."""
        output = self.folder / f"job-{len(self._started)}.log"
        command = [sys.executable, "-m", "pipeline.cached", "--gpus", "1", stage]
        with output.open("wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=self._environment, stdout=log, stderr=log)
        self._started.append(Job(process, output))
        return self._started[-1]

    def seen(self) -> list[tuple[int, str]]:
        """Process and GPUs of every stage's program that was started."""
        file = self.folder / "seen"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(pid), gpus) for pid, gpus in map(str.split, lines)]

    def let_go(self) -> None:
        (self.folder / "go").touch()

    def end(self) -> None:
        self.let_go()
        for job in self._started:
            job.process.wait()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    started = Jobs(tmp_path)
    yield started
    started.end()


def test_stages_that_run_at_once_see_different_gpus(jobs: Jobs) -> None:
    for stage in ("corpus_grammar@english", "corpus_text@own"):
        jobs.start(stage)
    wait_until(lambda: len(jobs.seen()) == 2, 60)
    assert {gpus for _, gpus in jobs.seen()} == {"4", "5"}


def test_a_second_job_of_a_stage_waits_and_takes_the_result_of_the_first(jobs: Jobs) -> None:
    first = jobs.start("corpus_grammar@english")
    wait_until(jobs.seen, 60)
    second = jobs.start("corpus_grammar@english")
    wait_until(second.waits, 60)
    jobs.let_go()
    assert [first.process.wait(), second.process.wait()] == [0, 0]
    assert "restored from the cache" in second.output.read_text()
    assert len(jobs.seen()) == 1


def test_a_program_whose_job_was_killed_is_waited_for(jobs: Jobs) -> None:
    first = jobs.start("corpus_grammar@english")
    wait_until(jobs.seen, 60)
    first.process.kill()
    second = jobs.start("corpus_grammar@english")
    wait_until(second.waits, 60)
    jobs.let_go()
    assert second.process.wait() == 0
