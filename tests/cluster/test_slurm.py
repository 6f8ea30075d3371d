"""The pipeline on a real Slurm: where its jobs run, and that it gets over what happens to them.

GRADIEND_TEST_SLURM says how much: `quick` (the default) for one small run with a failing job, `all` for everything,
`none`. Where Slurm can neither be found nor downloaded the tests are skipped, but not when the variable asks for them.
"""

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from on_slurm import PROBE, WAIT, OnSlurm
from project import ROOT, create
from real_project import TINY, real_project
from slurm import NODES, Cluster, NoSlurm, cluster, wait_until

ASKED = os.environ.get("GRADIEND_TEST_SLURM")
if ASKED not in {None, "none", "quick", "all"}:
    raise pytest.UsageError(f"GRADIEND_TEST_SLURM is {ASKED!r}, and may be none, quick or all")
pytestmark = [
    pytest.mark.skipif(ASKED == "none", reason="GRADIEND_TEST_SLURM=none"),
    pytest.mark.skipif(" " in sys.executable, reason="Snakemake does not quote its own path in jobs (docs/cluster.md)"),
]
minutes = pytest.mark.skipif(ASKED != "all", reason="takes minutes: `make test-slurm`, or GRADIEND_TEST_SLURM=all")

SEEDS = [f"artifacts/runs/a/seeds/{seed}/model.safetensors" for seed in (0, 1)]
CORPUS = "artifacts/corpora/english/texts.parquet"
# What the training of a seed does the first time.
_BREAK_ONCE = """
if seen["seed"] == "{}" and not Path("broken").exists():
    Path("broken").touch()
    sys.exit("broken on purpose")
"""
# profiles/cluster-generic for Slurm.
_SCHEDULER = """
job_id=SLURM_JOB_ID
submit_job() {
    sbatch --parsable --job-name "$1" -c "$2" --mem "$3" --time "$4" --gres "gpu:$5" --output "$folder/%j.log"
}
forgotten() { ! squeue --noheader --jobs "$1" 2>&1 | grep -q .; }
cancel_jobs() { scancel "$@"; }
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    try:
        with cluster() as started:
            yield started
    except NoSlurm as reason:
        refuse = pytest.fail if ASKED else pytest.skip
        refuse(f"no Slurm here: {reason}")


@pytest.fixture(scope="module")
def made(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnSlurm]:
    """A project with two shards and two seeds, made on the cluster up to the trained seeds; one failed at first."""
    project = OnSlurm(create(tmp_path_factory.mktemp("slurm") / "project").folder, slurm)
    project.replace("params.yaml", "seeds: [0]", "seeds: [0, 1]")
    project.replace("params.yaml", "gradient_shards: [0]", "gradient_shards: [0, 1]")
    for path in (project.folder / "pipeline").glob("*.py"):
        if path.read_text() == 'SALT = ""\n':
            path.write_text(PROBE)
    project.act("train", _BREAK_ONCE.format(1))
    with closing(project):
        project.finish(project.submit(*SEEDS))
        yield project


@pytest.fixture
def project(made: OnSlurm, tmp_path: Path) -> Iterator[OnSlurm]:
    """A copy of it in which every seed is due, and waits for `let_go`."""
    copied = OnSlurm(made.copy(tmp_path / "project").folder, made.slurm)
    for name in ("placed.jsonl", "executed.log", "broken"):
        (copied.folder / name).unlink()
    generic = "profiles/cluster-generic"
    (copied.folder / generic / "slurm.sh").write_text(_SCHEDULER)
    here = 'if command -v sbatch > /dev/null; then\n    . "$here/slurm.sh"\n'
    copied.replace(f"{generic}/scheduler.sh", "if ", f"{here}elif ")
    copied.replace("params.yaml", "learning_rate: 0.001", "learning_rate: 0.01")
    copied.act("train", WAIT)
    with closing(copied):
        yield copied


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


def test_a_job_that_has_failed_is_tried_again_with_twice_the_memory(made: OnSlurm) -> None:
    jobs = [job for job in made.jobs() if job["Comment"].startswith("rule_train_")]
    assert sorted((job["MinMemoryNode"], job["JobState"]) for job in jobs) == [
        ("16000M", "COMPLETED"),
        ("8000M", "COMPLETED"),
        ("8000M", "FAILED"),
    ]


@minutes
def test_a_job_that_fails_again_takes_no_other_down(project: OnSlurm) -> None:
    before = project.artifacts()
    project.act("train", "if seen['seed'] == '0': sys.exit('broken on purpose')")
    output = project.finish(project.submit(*SEEDS), succeeds=False)
    assert "broken on purpose" in output
    assert len(project.placed("train")) == 3
    after = project.artifacts()
    assert [before[seed] == after[seed] for seed in SEEDS] == [True, False]


@minutes
def test_a_job_that_runs_out_of_memory_gets_twice_as_much(project: OnSlurm) -> None:
    project.act("corpus_grammar", "import time; block = b'x' * 2_300_000_000; time.sleep(5)")
    project.replace("params.yaml", "max_size: 10", "max_size: 11")
    project.finish(project.submit(CORPUS))
    jobs = project.jobs()
    assert [job["MinMemoryNode"] for job in jobs] == ["2000M", "4000M"]
    assert [job["JobState"] for job in jobs] == ["FAILED", "COMPLETED"]
    assert f"StepId={jobs[0]['JobId']}.0 exceeded memory limit" in project.slurm.logs()


@minutes
def test_a_cancelled_job_is_submitted_again(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    project.slurm.run("scancel", project.jobs()[0]["JobId"])
    project.let_go()
    project.finish(snakemake)
    assert [job["JobState"] for job in project.jobs()] == ["CANCELLED", "COMPLETED"]


@minutes
def test_a_job_that_runs_out_of_time_is_submitted_again(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    project.slurm.run("scontrol", "update", f"JobId={project.jobs()[0]['JobId']}", "TimeLimit=1")
    wait_until(lambda: len(project.placed("train")) == 2, 300)
    project.let_go()
    project.finish(snakemake)
    assert [job["JobState"] for job in project.jobs()] == ["TIMEOUT", "COMPLETED"]


@minutes
@pytest.mark.parametrize("profile", ["slurm", "cluster-generic"])
def test_interrupting_snakemake_cancels_its_jobs(project: OnSlurm, profile: str) -> None:
    snakemake = project.submit(SEEDS[0], profile=profile)
    project.wait_for("train")
    snakemake.send_signal(signal.SIGINT)
    project.finish(snakemake, succeeds=False)
    wait_until(lambda: project.jobs()[0]["JobState"] == "CANCELLED", 60)


@minutes
def test_the_jobs_of_a_killed_node_run_on_another(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    node = str(project.wait_for("train")["SLURMD_NODENAME"])
    project.slurm.kill_node(node)
    project.let_go()
    wait_until(lambda: project.jobs()[0]["Restarts"] == "1", 180)
    # Slurm would wait for two minutes, for a node that has only lost its connection.
    project.slurm.run("scontrol", "update", f"JobId={project.jobs()[0]['JobId']}", "StartTime=now")
    project.finish(snakemake)
    first, second = project.placed("train")
    assert first["SLURMD_NODENAME"] != second["SLURMD_NODENAME"]
    project.slurm.start_node(node)


@minutes
def test_jobs_outlive_a_killed_controller(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    project.slurm.kill_controller()
    wait_until(lambda: project.said().count("could not check status") > 5, 180)
    project.slurm.start_controller()
    project.let_go()
    project.finish(snakemake)
    assert [job["JobState"] for job in project.jobs()] == ["COMPLETED"]
    assert len(project.placed("train")) == 1


@minutes
def test_a_job_that_a_killed_snakemake_has_left_is_waited_for_and_its_result_taken(project: OnSlurm) -> None:
    snakemake = project.submit(SEEDS[0])
    project.wait_for("train")
    snakemake.kill()
    snakemake.wait()
    snakemake = project.submit(SEEDS[0])
    log = project.folder / "logs/train/a-0.log"
    wait_until(lambda: "waiting for another job" in log.read_text(), 180)
    project.let_go()
    project.finish(snakemake)
    assert "restored from the cache" in log.read_text()
    assert len(project.placed("train")) == 1


@minutes
def test_the_settings_that_the_page_on_clusters_shows_are_what_jobs_ask_for(project: OnSlurm) -> None:
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL | re.MULTILINE)
    shutil.copytree(project.folder / "profiles/slurm", project.folder / "profiles/mine")
    with (project.folder / "profiles/mine/config.yaml").open("a") as config:
        config.write(settings.replace("  slurm_account: mylab\n", ""))  # without accounting there are no accounts
    project.replace("params.yaml", "&cache_gradients {}", "&cache_gradients {changed: true}")
    project.act("train", "")
    project.finish(project.submit(SEEDS[0], profile="mine"))
    keys = ("Partition", "NumCPUs", "MinMemoryNode", "TimeLimit")
    asked = [tuple(job[key] for key in keys) for job in project.jobs()]
    assert asked == [("gpu", "8", "62.50G", "1-00:00:00")] * 2 + [("cpu", "1", "8000M", "02:00:00")]
    assert [placed["CUDA_VISIBLE_DEVICES"] for placed in project.placed("train")] == [""]


@minutes
def test_the_generic_profile_tries_failed_and_cancelled_jobs_again(project: OnSlurm) -> None:
    project.act("train", _BREAK_ONCE.format(0) + WAIT)
    snakemake = project.submit(*SEEDS, profile="cluster-generic")
    wait_until(lambda: {placed["seed"] for placed in project.placed("train")} == {"0", "1"}, 180)
    (waiting,) = (placed["SLURM_JOB_ID"] for placed in project.placed("train") if placed["seed"] == "1")
    project.slurm.run("scancel", str(waiting))
    project.let_go()
    project.finish(snakemake)
    jobs = {job["JobId"]: (job["JobState"], job["MinMemoryNode"], job["TimeLimit"]) for job in project.jobs()}
    for seed, state in (("0", "FAILED"), ("1", "CANCELLED")):
        tries = [jobs[str(placed["SLURM_JOB_ID"])] for placed in project.placed("train") if placed["seed"] == seed]
        assert tries == [(state, "8000M", "02:00:00"), ("COMPLETED", "16000M", "02:00:00")]
    assert {placed["CUDA_VISIBLE_DEVICES"] for placed in project.placed("train")} == {"0"}


@minutes
def test_the_whole_pipeline_writes_the_same_bytes_as_on_this_machine(slurm: Cluster, tmp_path: Path) -> None:
    here = real_project(tmp_path / "here")
    with closing(OnSlurm(real_project(tmp_path / "there").folder, slurm)) as there:
        for project in (here, there):
            (project.folder / "params.yaml").write_text(yaml.safe_dump(TINY))
        threads = ["--set-threads", *(f"{rule}=1" for rule in ("pre_prune", "cache_gradients", "evaluate_decoder"))]
        snakemake = there.submit(*threads)
        here.snakemake(*threads)
        there.finish(snakemake, seconds=1800)
        assert there.artifacts() == here.artifacts()
        assert {job["JobState"] for job in there.jobs()} == {"COMPLETED"}
        assert "Nothing to be done" in there.snakemake()
