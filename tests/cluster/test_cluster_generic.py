"""The commands of profiles/cluster-generic, with stand-ins for the schedulers' own: submit, status, cancel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from project import ROOT, create
from slurm import wait_until

PROFILE = ROOT / "profiles/cluster-generic"
# Start a job, say whether it is known, end it: as each scheduler does, as far as the commands depend on it.
_SUBMIT = """#!/bin/sh
echo "$@" > "$FAKE/options"
id=$$
cat > "$FAKE/$id.sh"
{variable}=$id setsid sh "$FAKE/$id.sh" > /dev/null 2>&1 &
echo $! > "$FAKE/$id.pid"
echo "{answer}"
"""
_STATUS = """#!/bin/sh
[ ! -e "$FAKE/down" ] || {{ echo "cannot connect to server" >&2; exit 1; }}
for id; do :; done
kill -0 "$(cat "$FAKE/$id.pid")" 2> /dev/null && echo RUN && exit
echo "{gone}" >&2
exit 1
"""
_CANCEL = """#!/bin/sh
for id; do kill -9 -"$(cat "$FAKE/$id.pid")"; done
"""
# The commands' names, the variable that a job finds its id in, and what is said of a new and of an ended job.
SCHEDULERS = {
    "pbs": ("qsub", "qstat", "qdel", "PBS_JOBID", "$id", "qstat: Unknown Job Id $id"),
    "sge": ("qsub", "qstat", "qdel", "JOB_ID", "$id", "Following jobs do not exist: $id"),
    "lsf": (
        "bsub",
        "bjobs",
        "bkill",
        "LSB_JOBID",
        "Job <$id> is submitted to queue <a>.",
        "Job <$id> is not found",
    ),
}
OPTIONS = {
    "pbs": "select=1:ncpus=4:mem=16000mb:ngpus=2 -l walltime=7200",
    "sge": "-pe smp 4 -l h_vmem=4000M,h_rt=7200,gpu=2",
    "lsf": "-n 4 -R span[hosts=1] rusage[mem=16000MB] -M 16000MB -W 120",
}


class Scheduler:
    """The stand-in for a scheduler, and the profile's commands that use it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        submit, status, cancel, variable, answer, gone = SCHEDULERS[name]
        programs = {
            submit: _SUBMIT.format(variable=variable, answer=answer),
            status: _STATUS.format(gone=gone),
            cancel: _CANCEL,
        }
        for program, text in (programs | ({"qconf": ""} if name == "sge" else {})).items():
            (folder / program).write_text(text)
            (folder / program).chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "FAKE": str(folder), "GRADIEND_CLUSTER_GRACE": "0"}

    def run(self, command: str, *arguments: str | Path) -> str:
        """The output of one of the profile's commands."""
        program = [PROFILE / command, *arguments]
        return subprocess.check_output(program, cwd=self.folder, env=self.environment, text=True).strip()

    def submit(self, code: str) -> str:
        """Submit a job that does this; its id."""
        script = self.folder / "a job.sh"
        script.write_text(f"#!/bin/sh\n{code}\n")
        script.chmod(0o755)
        return self.run("submit", "train", "4", "16000", "120", "2", script)

    def ends(self, job: str) -> str:
        """Wait until a job runs no longer; how it has ended."""
        wait_until(lambda: self.run("status", job) != "running", 20)
        return self.run("status", job)


@pytest.fixture(params=SCHEDULERS)
def scheduler(request: pytest.FixtureRequest, tmp_path: Path) -> Scheduler:
    return Scheduler(request.param, tmp_path)


@pytest.mark.parametrize(("code", "end"), [("true", "success"), ("exit 3", "failed"), ("kill -KILL $PPID", "failed")])
def test_a_jobs_end_is_known_also_when_the_scheduler_has_killed_it(scheduler: Scheduler, code: str, end: str) -> None:
    assert scheduler.ends(scheduler.submit(code)) == end


def test_a_job_runs_until_it_is_cancelled(scheduler: Scheduler) -> None:
    job = scheduler.submit("sleep 60")
    assert scheduler.run("status", job) == "running"
    scheduler.run("cancel", job)
    assert scheduler.ends(job) == "failed"


def test_a_scheduler_that_does_not_answer_has_not_lost_its_jobs(scheduler: Scheduler) -> None:
    job = scheduler.submit("sleep 60")
    (scheduler.folder / "down").touch()
    assert scheduler.run("status", job) == "running"
    scheduler.run("cancel", job)
    assert scheduler.run("status", job) == "running"


def test_a_jobs_end_is_known_while_the_scheduler_does_not_answer(scheduler: Scheduler) -> None:
    job = scheduler.submit("true")
    wait_until((scheduler.folder / f"logs/cluster/{job}.status").exists, 20)
    (scheduler.folder / "down").touch()
    assert scheduler.run("status", job) == "success"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_job_is_submitted_with_what_its_rule_asks_for(name: str, tmp_path: Path) -> None:
    scheduler = Scheduler(name, tmp_path)
    scheduler.ends(scheduler.submit("true"))
    assert OPTIONS[name] in (tmp_path / "options").read_text()
    assert ("-gpu num=2" in (tmp_path / "options").read_text()) == (name == "lsf")


@pytest.mark.skipif(" " in sys.executable, reason="Snakemake does not quote its own path in jobs (docs/cluster.md)")
def test_snakemake_makes_a_stage_with_the_profile(tmp_path: Path) -> None:
    project = create(tmp_path / "project")
    target = "artifacts/corpora/english/texts.parquet"
    scheduler = Scheduler("pbs", tmp_path)
    command = ["snakemake", "--profile", "profiles/cluster-generic", "--seconds-between-status-checks", "1"]
    project._environment |= {name: scheduler.environment[name] for name in ("FAKE", "GRADIEND_CLUSTER_GRACE")}
    project._environment["PATH"] = f"{tmp_path}{os.pathsep}{project._environment['PATH']}"
    project.run(*command, target)
    assert project.executed() == ["corpora/english"]
    assert "ncpus=1:mem=2000mb -l walltime=1800" in (tmp_path / "options").read_text()
