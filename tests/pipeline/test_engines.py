"""Snakemake and DVC on one pipeline: what runs, what is restored, and that nothing stale is ever taken for fresh.

The stages are stubs (stub_stages.py) that write functions of their inputs and log that they were executed.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.check_params import CHECKED
from pipeline.imports import declared
from project import ROOT, Project, create

AFTER_TRAINING = ["select_seed", "post_prune", "evaluate_encoder", "evaluate_decoder", "rewrite_model", "plot"]
TRAINED_A = sorted(["train/a-0", *(f"{stage}/a" for stage in AFTER_TRAINING)])
NOTHING = "Nothing to be done"
UP_TO_DATE = "Data and pipelines are up to date."
Fork = Callable[[], Project]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose folder's name has a space, made by Snakemake once."""
    project = create(tmp_path_factory.mktemp("engines") / "my project")
    project.snakemake()
    assert len(project.executed()) == 23
    return project


@pytest.fixture(scope="module")
def committed_once(made_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same after `dvc repro`, which has executed nothing, and committed."""
    project = made_once.copy(tmp_path_factory.mktemp("committed") / "my project")
    project.repro()
    assert project.executed() == []
    project.run("git", "add", "--all")
    project.run("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message", "first")
    return project


@pytest.fixture(scope="module")
def changed_by_dvc(committed_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The committed project with one parameter changed and `dvc repro` run."""
    project = committed_once.copy(tmp_path_factory.mktemp("changed") / "my project")
    faster_learning(project)
    project.repro()
    assert project.executed() == TRAINED_A
    return project


@pytest.fixture
def committed(committed_once: Project, tmp_path: Path) -> Project:
    """A copy of the finished project after `dvc repro`."""
    return committed_once.copy(tmp_path / "committed")


@pytest.fixture
def made(made_once: Project, tmp_path: Path) -> Project:
    """A copy of the finished project."""
    return made_once.copy(tmp_path / "my project")


def faster_learning(project: Project) -> None:
    project.replace("params.yaml", "learning_rate: 0.001", "learning_rate: 0.01")


def touch_everything(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not {".git", ".snakemake", ".dvc"} & set(path.relative_to(folder).parts):
            os.utime(path)


def test_after_one_engine_the_other_executes_nothing_and_says_so(made: Project, committed: Project) -> None:
    assert NOTHING in made.snakemake()
    assert not (made.folder / "dvc.lock").exists()
    for run, answer in ((committed.repro, UP_TO_DATE), (committed.snakemake, NOTHING)):
        assert answer in run()
    assert committed.executed() == []


def test_what_dvc_has_made_is_taken_by_snakemake(changed_by_dvc: Project) -> None:
    by_dvc = changed_by_dvc.artifacts()
    changed_by_dvc.snakemake()
    assert changed_by_dvc.executed() == []
    assert changed_by_dvc.artifacts() == by_dvc


def test_touched_files_execute_nothing(committed: Project) -> None:
    touch_everything(committed.folder)
    committed.snakemake()
    committed.repro()
    assert committed.executed() == []
    assert NOTHING in committed.snakemake()


def test_a_changed_value_executes_the_stages_that_depend_on_it_and_changing_it_back_none(made: Project) -> None:
    before = made.artifacts()
    faster_learning(made)
    assert "train@a-0 is due: runs.a.train.learning_rate is 0.01, was 0.001" in made.snakemake("--dry-run")
    made.snakemake()
    assert made.executed() == TRAINED_A
    made.replace("params.yaml", "learning_rate: 0.01", "learning_rate: 0.001")
    made.snakemake()
    assert made.executed() == []
    assert made.artifacts() == before


def test_a_plot_parameter_executes_the_plot_only(made: Project) -> None:
    made.replace("params.yaml", "plot: *plot", "plot: {dpi: 300}")
    made.snakemake()
    assert made.executed() == ["plot/b"]


def test_a_changed_module_executes_its_stages_and_the_same_output_stops_there(committed: Project) -> None:
    stages = declared((ROOT / "dvc.yaml").read_text())
    assert [stage for stage, files in stages.items() if "pipeline/train.py" in files] == ["train"]
    committed.replace("pipeline/train.py", "SALT", "# A remark.\nSALT")
    output = committed.snakemake("artifacts/runs/a/plots/training.png")
    assert "train@a-0 is due: pipeline/train.py changed" in output
    assert committed.executed() == ["train/a-0"]
    committed.repro()
    assert committed.executed() == ["train/b-0"]


@pytest.mark.parametrize("records", [".stages", ".snakemake"])
def test_without_either_records_replaced_outputs_are_noticed(made: Project, records: str) -> None:
    before = made.artifacts()
    shutil.rmtree(made.folder / records)
    target = "artifacts/runs/a/selection.safetensors"
    (made.folder / target).write_text("other")
    made.snakemake(target)
    assert made.executed() == []
    assert made.artifacts() == before


def test_without_snakemakes_own_records_only_what_changed_is_executed(made: Project) -> None:
    shutil.rmtree(made.folder / ".snakemake")
    faster_learning(made)
    made.snakemake()
    assert made.executed() == TRAINED_A


@pytest.mark.parametrize("engine", ["snakemake", "dvc"])
def test_a_fresh_clone_with_a_shared_cache_executes_nothing(made: Project, engine: str) -> None:
    before = made.artifacts()
    one_figure = "artifacts/runs/a/plots/training.png"
    shared = made.folder.with_name("shared")
    shutil.move(made.folder / ".dvc/cache", shared)
    for name in ("artifacts", ".snakemake", ".stages"):
        shutil.rmtree(made.folder / name)
    made.dvc("cache", "dir", "--local", str(shared))
    made.snakemake(one_figure) if engine == "snakemake" else made.dvc("repro", "plot@a")
    assert made.executed() == []
    assert made.artifacts().items() <= before.items()
    assert one_figure in made.artifacts()


def test_replaced_outputs_are_noticed_whatever_their_times(made: Project) -> None:
    before = made.artifacts()
    target = made.folder / "artifacts/runs/a/selection.safetensors"
    times = target.stat()
    target.write_bytes(target.read_bytes()[::-1])
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns - 10**9))
    made.snakemake("artifacts/runs/a/seed_report.json")
    assert made.executed() == []
    assert made.artifacts() == before


def test_a_part_run_and_touched_files_do_not_hide_what_is_due(made: Project) -> None:
    faster_learning(made)
    made.snakemake("artifacts/runs/a/seeds/0/model.safetensors")
    time.sleep(0.01)
    for folder in ("artifacts/runs/a/model", "artifacts/manifests", "benchmarks"):
        touch_everything(made.folder / folder)
    os.utime(made.folder / "artifacts/runs/a/seed_report.json")
    made.snakemake("artifacts/runs/a/model/model.safetensors")
    assert made.executed() == ["post_prune/a", "select_seed/a", "train/a-0"]


@pytest.mark.parametrize("engine", ["snakemake", "repro"])
def test_an_error_in_params_stops_both_engines_before_any_stage(made: Project, engine: str) -> None:
    before = made.artifacts()
    faster_learning(made)
    made.replace("params.yaml", "steps: 1", "steps: 2, bad_key: 1")
    output = getattr(made, engine)(succeeds=False)
    assert "bad_key" in output
    assert "Traceback" not in output
    assert made.executed() == []
    changed = {path for path, _ in before.items() ^ made.artifacts().items()}
    assert changed == ({str(CHECKED)} if engine == "repro" else set())  # DVC removes a stage's outputs before it runs


def test_after_a_check_that_failed_with_one_engine_the_other_goes_on(committed: Project) -> None:
    before = committed.artifacts()
    committed.replace("params.yaml", "steps: 1", "steps: 1, bad_key: 1")
    committed.repro("plot@a", succeeds=False)
    committed.replace("params.yaml", ", bad_key: 1", "")
    faster_learning(committed)
    committed.snakemake()
    assert committed.executed() == TRAINED_A
    committed.replace("params.yaml", "plot: *plot", "plot: {dpi: 300, bad_key: 1}")
    committed.snakemake(succeeds=False)
    committed.replace("params.yaml", ", bad_key: 1", "")
    committed.repro()
    assert committed.executed() == ["plot/b"]
    assert committed.artifacts().keys() == before.keys()


def test_a_failing_stage_leaves_earlier_results_and_is_tried_again(made: Project) -> None:
    before = made.artifacts()
    faster_learning(made)
    target = "artifacts/runs/a/seeds/0/model.safetensors"
    (made.folder / "break-train").touch()
    for _ in range(2):
        assert "broken on purpose" in made.snakemake(target, succeeds=False)
        assert made.executed() == ["train/a-0"]
        assert made.artifacts() == before
    (made.folder / "break-train").unlink()
    made.snakemake(target)
    assert made.executed() == ["train/a-0"]
    assert made.artifacts()[target] != before[target]


def test_a_stage_failing_under_dvc_is_brought_back_by_checkout(committed: Project) -> None:
    before = committed.artifacts()
    faster_learning(committed)
    (committed.folder / "break-train").touch()
    committed.repro("train@a-0", succeeds=False)
    assert committed.artifacts() != before
    committed.dvc("checkout", "--force")
    assert committed.artifacts() == before


def test_code_that_changes_while_a_stage_runs_is_not_credited_with_its_result(made: Project) -> None:
    made.replace("pipeline/plot.py", "SALT", "from pathlib import Path\nPath(__file__).open('a').write('#')\nSALT")
    output = made.run("python", "-m", "pipeline.cached", "plot@a", succeeds=False)
    assert "pipeline/plot.py: changed while the stage ran" in output
    assert "Traceback" not in output


def test_a_killed_stage_is_named_with_its_signal(made: Project) -> None:
    made.replace("pipeline/plot.py", "SALT", "import os\nos.kill(os.getpid(), 9)\nSALT")
    output = made.run("python", "-m", "pipeline.cached", "plot@a", succeeds=False)
    assert "error: plot@a: killed (SIGKILL, as the system does when memory runs out). Run it again." in output


def test_dvc_compares_metrics_with_the_last_commit_and_shows_plots(changed_by_dvc: Project) -> None:
    assert not list((changed_by_dvc.folder / "artifacts").rglob(".gitignore"))
    changes = changed_by_dvc.dvc("metrics", "diff")
    assert "artifacts/runs/a/encoder/metrics.json" in changed_by_dvc.dvc("metrics", "show")
    assert "artifacts/runs/a/encoder/metrics.json" in changes
    assert "artifacts/runs/b/encoder/metrics.json" not in changes
    changed_by_dvc.dvc("plots", "show")
    assert (changed_by_dvc.folder / "dvc_plots/index.html").exists()


def test_the_report_is_built_offline(made: Project) -> None:
    made.run("snakemake", "--report", "report.html")
    assert "training.png" in (made.folder / "report.html").read_text()
