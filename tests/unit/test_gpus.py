"""One job, one GPU: with simulated devices, named in CUDA_VISIBLE_DEVICES."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gradiend_core.errors import GradiendError
from pipeline.gpus import VISIBLE, taken
from pipeline.locks import Lock

DEVICES = {VISIBLE: "3,GPU-8f"}
# A job: takes one GPU, starts a program that inherits what it holds, says which one it is and waits for its input.
_JOB = """
import os, subprocess, sys
from pipeline.gpus import taken
with taken(1, os.environ) as seen:
    program = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(program.pid, seen["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
    program.kill()
"""


class Job:
    """Another process that has taken one GPU: which one it is, and the program it has started."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _JOB]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def device(self) -> str:
        """Wait until it has one."""
        assert self.process.stdout is not None
        program, device = self.process.stdout.readline().split()
        self.program = int(program)
        return device

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def _own_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv(VISIBLE, DEVICES[VISIBLE])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Two jobs; what is left of them is killed."""
    started = [Job(), Job()]
    yield started
    for job in started:
        job.kill()
        with suppress(ProcessLookupError):
            os.kill(job.program, signal.SIGKILL)


def test_jobs_that_run_at_once_have_different_gpus(jobs: list[Job]) -> None:
    assert {job.device() for job in jobs} == {"3", "GPU-8f"}


def test_a_third_job_waits_for_the_gpu_that_becomes_free(jobs: list[Job]) -> None:
    devices = [job.device() for job in jobs]
    third = Job()
    jobs[1].process.communicate()
    assert third.device() == devices[1]
    third.process.communicate()


def test_a_killed_job_frees_its_gpu_when_its_program_has_ended_too(jobs: list[Job], tmp_path: Path) -> None:
    device, _ = [job.device() for job in jobs]
    lock = Lock(tmp_path / f"gradiend-gpus-{os.getuid()}" / f"{device}.lock")
    jobs[0].kill()
    assert not lock.take(wait=False)
    os.kill(jobs[0].program, signal.SIGKILL)
    lock.take(wait=True)
    lock.close()


def test_a_stage_may_take_several_gpus() -> None:
    with taken(2, DEVICES) as seen:
        assert seen == {VISIBLE: "3,GPU-8f"}


def test_more_gpus_than_there_are_is_an_error_that_names_them() -> None:
    with pytest.raises(GradiendError, match=r"3 GPUs asked for .*, 2 on this machine: 3, GPU-8f"), taken(3, DEVICES):
        pass


@pytest.mark.parametrize("visible", ["", "-1", "-1,0"])
def test_without_gpus_the_environment_stays_as_it_is(visible: str) -> None:
    with taken(1, {VISIBLE: visible}) as seen:
        assert seen == {}


def test_a_stage_that_asks_for_none_sees_none() -> None:
    with taken(0, DEVICES) as seen:
        assert seen == {VISIBLE: ""}


def test_gpus_that_a_scheduler_has_given_are_kept() -> None:
    with taken(1, DEVICES | {"GRADIEND_GPUS_GIVEN": "1"}) as seen:
        assert seen == {}


def test_without_a_list_all_gpus_that_the_driver_names_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho GPU-1; echo GPU-2\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with taken(1, {}) as first, taken(1, {}) as second:
        assert [first, second] == [{VISIBLE: "GPU-1"}, {VISIBLE: "GPU-2"}]
