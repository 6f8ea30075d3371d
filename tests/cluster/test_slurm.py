"""The pipeline on a real Slurm, with stub stages: where its jobs run, and that it gets over what happens to them.

Only where it is asked for, with GRADIEND_TEST_SLURM set to `all`, or to `quick` for the run without trouble.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from project import Project, create
from slurm import NODES, Cluster, cluster, wait_until

ASKED = os.environ.get("GRADIEND_TEST_SLURM")
pytestmark = pytest.mark.skipif(not ASKED, reason="starts a Slurm; ask for it with `make test-slurm`")
trouble = pytest.mark.skipif(ASKED == "quick", reason="GRADIEND_TEST_SLURM=quick leaves out what takes minutes")

SEEDS = [f"artifacts/runs/a/seeds/{seed}/model.safetensors" for seed in (0, 1)]
CORPUS = "artifacts/corpora/english/texts.parquet"
# What every stub stage does besides its work: say where it runs, and what the test wants of it.
_PROBE = """SALT = ""
import json, os, sys
from pathlib import Path
stage = sys.argv[1]
seen = {name: os.environ.get(name) for name in ("SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
with open("placed.jsonl", "a") as placed:
    placed.write(json.dumps({"stage": stage} | seen) + "\\n")
if Path(f"act-{stage}.py").exists():
    exec(Path(f"act-{stage}.py").read_text())
"""
_WAIT = """
import time
while not Path("go").exists():
    time.sleep(0.1)
"""


class OnSlurm(Project):
    """A project whose jobs go to the cluster."""

    def __init__(self, folder: Path, slurm: Cluster) -> None:
        super().__init__(folder, folder.with_name(f"{folder.name}-site"))
        self.slurm = slurm
        sacct = folder / "profiles/slurm/without-accounting"
        self._environment |= slurm.environment | {"PATH": f"{sacct}:{slurm.environment['PATH']}"}
        self._started: list[subprocess.Popen[bytes]] = []

    def submit(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Snakemake, which submits its jobs to the cluster."""
        command = ["snakemake", "--profile", "profiles/slurm", "--nocolor", "--latency-wait", "5", "--retries", "1"]
        command += ["--slurm-init-seconds-before-status-checks", "1", "--verbose", *arguments]
        with (self.folder / "snakemake.out").open("wb") as output:
            started = subprocess.Popen(command, cwd=self.folder, env=self._environment, stdout=output, stderr=output)
        self._started.append(started)
        return started

    def finish(self, snakemake: subprocess.Popen[bytes], *, succeeds: bool = True) -> str:
        """Wait for Snakemake's end; what it said."""
        status = snakemake.wait(timeout=240)
        output = self.said()
        assert (status == 0) == succeeds, output + self.slurm.logs()[-5000:]
        return output

    def end(self) -> None:
        """Kill every Snakemake that still runs, and its jobs."""
        for snakemake in self._started:
            snakemake.kill()
            snakemake.wait()
        for job in self.jobs():
            self.slurm.run("scancel", job["JobId"])

    def said(self) -> str:
        """What Snakemake has said so far."""
        return (self.folder / "snakemake.out").read_text()

    def act(self, stage: str, code: str) -> None:
        """What the stage's programs do before their work."""
        (self.folder / f"act-{stage}.py").write_text(code)

    def wait_for(self, stage: str) -> dict[str, str | None]:
        """Wait until one of the stage's programs runs; where."""
        wait_until(lambda: self.placed(stage), 60)
        return self.placed(stage)[-1]

    def let_go(self) -> None:
        """Let the programs that wait go on."""
        (self.folder / "go").touch()

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm knows of this project's jobs."""
        return [job for job in self.slurm.jobs() if job["WorkDir"] == str(self.folder)]

    def placed(self, stage: str) -> list[dict[str, str | None]]:
        """Where and with what the stage's programs have been started, the first one first."""
        file = self.folder / "placed.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [placed for placed in map(json.loads, lines) if placed["stage"] == stage]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    try:
        with cluster() as started:
            yield started
    except OSError as error:
        pytest.skip(f"no Slurm here: {error}")


@pytest.fixture(scope="module")
def made(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> OnSlurm:
    """A project with two shards and two seeds, made on the cluster up to the trained seeds."""
    project = OnSlurm(create(tmp_path_factory.mktemp("slurm") / "project").folder, slurm)
    project.replace("params.yaml", "seeds: [0]", "seeds: [0, 1]")
    project.replace("params.yaml", "gradient_shards: [0]", "gradient_shards: [0, 1]")
    for path in (project.folder / "pipeline").glob("*.py"):
        if path.read_text() == 'SALT = ""\n':
            path.write_text(_PROBE)
    project.finish(project.submit(*SEEDS))
    return project


@pytest.fixture
def project(made: OnSlurm, tmp_path: Path) -> Iterator[OnSlurm]:
    """A copy of it in which every seed is due, and waits for `let_go`."""
    copied = OnSlurm(made.copy(tmp_path / "project").folder, made.slurm)
    for name in ("placed.jsonl", "executed.log"):
        (copied.folder / name).unlink()
    copied.replace("params.yaml", "learning_rate: 0.001", "learning_rate: 0.01")
    copied.act("train", _WAIT)
    yield copied
    copied.end()


def test_jobs_get_what_their_rules_ask_for(made: OnSlurm) -> None:
    jobs = {job["Comment"].split("_wildcards")[0].removeprefix("rule_"): job for job in made.jobs()}
    asked = {rule: (job["MinMemoryNode"], job["TimeLimit"], job.get("TresPerJob")) for rule, job in jobs.items()}
    assert asked["corpus_grammar"] == ("2000M", "00:30:00", None)
    assert asked["cache_gradients"] == ("16000M", "08:00:00", "gres:gpu:1")
    assert [placed["CUDA_VISIBLE_DEVICES"] for placed in made.placed("corpus_grammar")] == [None]
    assert [placed["CUDA_VISIBLE_DEVICES"] for placed in made.placed("cache_gradients")] == ["0", "0"]


def test_shards_and_seeds_spread_over_the_nodes(made: OnSlurm) -> None:
    for stage in ("cache_gradients", "train"):
        assert {placed["SLURMD_NODENAME"] for placed in made.placed(stage)} == {*NODES}


def test_threads_are_those_of_the_job_not_half_of_the_node(made: OnSlurm) -> None:
    threads = str(min(4, len(os.sched_getaffinity(0))))
    assert [placed["OMP_NUM_THREADS"] for placed in made.placed("cache_gradients")] == [threads, threads]


def test_what_the_cluster_has_made_is_up_to_date_here(made: OnSlurm) -> None:
    assert "Nothing to be done" in made.snakemake(*SEEDS)


@trouble
def test_a_failing_job_is_tried_again_and_takes_no_other_down(project: OnSlurm) -> None:
    before = project.artifacts()
    project.act("train", "if sys.argv[sys.argv.index('--seed') + 1] == '0': sys.exit('broken on purpose')")
    output = project.finish(project.submit(*SEEDS), succeeds=False)
    assert "broken on purpose" in output
    assert len(project.placed("train")) == 3
    after = project.artifacts()
    assert [before[seed] == after[seed] for seed in SEEDS] == [True, False]


@trouble
def test_a_job_that_runs_out_of_memory_gets_twice_as_much(project: OnSlurm) -> None:
    project.act("corpus_grammar", "import time; block = b'x' * 2_300_000_000; time.sleep(5)")
    project.replace("params.yaml", "max_size: 10", "max_size: 11")
    project.finish(project.submit(CORPUS))
    jobs = project.jobs()
    assert [job["MinMemoryNode"] for job in jobs] == ["2000M", "4000M"]
    assert [job["JobState"] for job in jobs] == ["FAILED", "COMPLETED"]
    assert f"StepId={jobs[0]['JobId']}.0 exceeded memory limit" in project.slurm.logs()


@trouble
def test_a_cancelled_job_is_submitted_again(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    project.slurm.run("scancel", project.jobs()[0]["JobId"])
    project.let_go()
    project.finish(snakemake)
    assert [job["JobState"] for job in project.jobs()] == ["CANCELLED", "COMPLETED"]


@trouble
def test_interrupting_snakemake_cancels_its_jobs(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    snakemake.send_signal(signal.SIGINT)
    snakemake.wait(60)
    wait_until(lambda: project.jobs()[0]["JobState"] == "CANCELLED", 20)


@trouble
def test_the_jobs_of_a_killed_node_run_on_another(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    node = str(project.wait_for("train")["SLURMD_NODENAME"])
    project.slurm.kill_node(node)
    project.let_go()
    wait_until(lambda: project.jobs()[0]["Restarts"] == "1", 60)
    # Slurm would wait for two minutes, for a node that has only lost its connection.
    project.slurm.run("scontrol", "update", f"JobId={project.jobs()[0]['JobId']}", "StartTime=now")
    project.finish(snakemake)
    first, second = project.placed("train")
    assert first["SLURMD_NODENAME"] != second["SLURMD_NODENAME"]
    project.slurm.start_node(node)


@trouble
def test_jobs_outlive_a_killed_controller(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    project.slurm.kill_controller()
    wait_until(lambda: project.said().count("could not check status") > 5, 60)
    project.slurm.start_controller()
    project.let_go()
    project.finish(snakemake)
    assert [job["JobState"] for job in project.jobs()] == ["COMPLETED"]
    assert len(project.placed("train")) == 1


@trouble
def test_a_job_that_a_killed_snakemake_has_left_is_waited_for_and_its_result_taken(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    snakemake.kill()
    snakemake.wait()
    project.snakemake("--unlock")
    snakemake = project.submit(SEEDS[0])
    log = project.folder / "logs/train/a-0.log"
    wait_until(lambda: "waiting for another job" in log.read_text(), 60)
    project.let_go()
    project.finish(snakemake)
    assert "restored from the cache" in log.read_text()
    assert len(project.placed("train")) == 1
