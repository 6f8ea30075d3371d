"""A training that is killed goes on where it was saved, and its files are those of one that was not."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import pipeline.stage
from gradiend_core.config.section import validate
from gradiend_core.config.train import Train
from gradiend_core.errors import GradiendError
from gradiend_core.files import read_json, sha256_file
from gradiend_core.gradients.store import INDEX, TRAINING, GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.tables import write_table
from gradiend_core.tensors import save_tensors
from gradiend_core.training import loop
from gradiend_core.training.checkpoint import Checkpoints
from gradiend_core.training.loop import train
from gradiend_core.training.rows import RowSet
from gradiend_core.training.runners_up import load_runners_up
from gradiend_core.training.tables import HISTORY
from pipeline import train as stage
from tests.unit.test_training import planted, scripted
from tests.unit.test_training_arguments import poisoned

FOLDER = ".partial-resume-checkpoints"
SETTINGS: dict[str, Any] = {
    "max_steps": 60,
    "eval_steps": 7,
    "save_steps": 5,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.2,
    "train_max_size": 25,
}


class Stopped(BaseException):
    """What a test stops a training with."""


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a seed and its manifest."""
    files = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    return files | {"manifest": Path(f"manifests/{folder.name}.json").read_bytes().replace(folder.name.encode(), b"")}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml (section `train`) and a gradient store."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS}))
    store = planted(40)
    tensors, mapping = store.selection.to_tensors()
    metadata = store.metadata | {"mapping": mapping, "shard": 0, "num_shards": 1}
    Path("store").mkdir()
    save_tensors(Path("store/shard-0.safetensors"), tensors | store._shards[0], metadata)
    text = ["masked", "alternative_class", "factual", "alternative"]
    index = store.index.assign(**dict.fromkeys(text, "x"))
    write_table(Path("store/shard-0.parquet"), index, INDEX)
    return tmp_path


def run_stage(name: str, seed: int = 1) -> Path:
    arguments = ["--params", "train", "--seed", str(seed), "--gradients", "store", "--output", name]
    stage.main([*arguments, "--manifest", f"manifests/{name}.json"])
    return Path(name)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let training stop after so many steps; the result grows by one for every step."""
    taken: list[int] = []
    original = loop.training_step

    def training_step(*arguments: Any, **options: Any) -> float:
        if len(taken) == step:
            raise Stopped
        taken.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "training_step", training_step)
    return taken


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("moment", [0, 4, 5, 34, 35, 59])
def test_interrupted_training_goes_on_at_the_last_save(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"preserve_n_best": 5}}))
    expected = bytes_of(run_stage("whole"))
    assert len(expected) == 6
    with monkeypatch.context() as patch:
        stop_after(moment, patch)
        with pytest.raises(Stopped):
            run_stage("parts")
    assert len(list(Path("parts").glob(f"{FOLDER}/step-*"))) == (moment >= 5)
    with monkeypatch.context() as patch:
        taken = stop_after(1000, patch)
        assert bytes_of(run_stage("parts")) == expected
    assert len(taken) == 60 - moment // 5 * 5
    assert not (Path("parts") / FOLDER).exists()


def test_best_model_of_before_the_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, params = planted(10), validate(Train, {"max_steps": 6, "eval_steps": 2, "save_steps": 2}, "train")
    scripted(monkeypatch, [0.1, 0.9, 0.5, 0.4] * 2)
    whole = train(store, params, 0)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Stopped), Checkpoints(tmp_path / FOLDER, {}) as checkpoints:
            train(store, params, 0, checkpoints)
    with Checkpoints(tmp_path / FOLDER, {}) as checkpoints:
        parts = train(store, params, 0, checkpoints)
    assert whole.best_step == parts.best_step == 2
    assert torch.equal(parts.model.decoder.weight, whole.model.decoder.weight)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("changed", ["code", "seed", "params", "gradients", "threads"])
def test_other_circumstances_begin_afresh(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: str
) -> None:
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        with pytest.raises(Stopped):
            run_stage("parts")
    if changed == "code":
        monkeypatch.setattr(stage, "code_digest", lambda: "edited")
    elif changed == "threads":
        monkeypatch.setattr(stage, "environment", lambda: {"threads": "77"})
    elif changed == "params":
        Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"adam_beta2": 0.9}}))
    elif changed == "gradients":
        index = pd.read_parquet("store/shard-0.parquet").assign(n_positions=2)
        write_table(Path("store/shard-0.parquet"), index, INDEX)
    seed = 2 if changed == "seed" else 1
    taken = stop_after(1000, monkeypatch)
    with caplog.at_level("INFO"):
        parts = bytes_of(run_stage("parts", seed))
    assert f"made with another {changed}" in caplog.text
    assert len(taken) == 60
    assert parts == bytes_of(run_stage("whole", seed))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("limit", [1, 3])
def test_newest_saves_are_kept_and_a_damaged_one_is_passed_over(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"save_total_limit": limit}}))
    expected = bytes_of(run_stage("whole"))
    with monkeypatch.context() as patch:
        stop_after(33, patch)
        with pytest.raises(Stopped):
            run_stage("parts")
    saves = sorted(Path("parts").glob(f"{FOLDER}/step-*"))
    assert [int(path.stem.removeprefix("step-")) for path in saves] == [20, 25, 30][-limit:]
    saves[-1].write_bytes(saves[-1].read_bytes()[:-10])
    with monkeypatch.context() as patch:
        taken = stop_after(1000, patch)
        assert bytes_of(run_stage("parts")) == expected
    assert len(taken) == (60 if limit == 1 else 35)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 11, "save_total_limit": 9}, [11, 22]),
        ({"save_strategy": "epoch", "save_total_limit": 9}, [7, 14, 21, 28]),  # 14 batches of 4 rows, 2 per step
    ],
)
def test_saved_steps(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], saved: list[int]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | settings}))
    stop_after(32, monkeypatch)
    with pytest.raises(Stopped):
        run_stage("parts")
    assert sorted(int(path.stem[5:]) for path in Path("parts").glob(f"{FOLDER}/step-*")) == saved


@pytest.mark.usefixtures("project")
def test_an_interruption_while_outputs_are_put_in_place_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bytes_of(run_stage("whole"))
    with monkeypatch.context() as patch:
        original, moved = Path.replace, []

        def replace(self: Path, target: Path) -> Path:
            if not self.name.startswith("writing"):
                moved.append(target)
                if len(moved) == 3:
                    raise Stopped
            return original(self, target)

        patch.setattr(Path, "replace", replace)
        with pytest.raises(Stopped):
            run_stage("parts")
    assert len(list(Path("parts").glob("[!.]*"))) == 2
    assert bytes_of(run_stage("parts")) == expected


@pytest.mark.usefixtures("project")
def test_two_processes_do_not_train_one_seed() -> None:
    with (
        Checkpoints(Path("one") / FOLDER, {}),
        pytest.raises(GradiendError, match="another process is training this seed"),
    ):
        run_stage("one")


@pytest.mark.usefixtures("project")
def test_full_disk_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GradiendError, match=r"checkpoints: cannot be written \(No space left on device\)"):
        run_stage("one")


@pytest.mark.usefixtures("project")
def test_diverged_training_is_a_result_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 12)
    folder = run_stage("one")
    metrics = read_json(folder / "metrics.json")
    assert metrics["stopped"].startswith(f"seed 1 stopped at step {metrics['stopped_step']}, at rows ")
    assert metrics["stopped_step"] in {12, 13, 14}
    assert metrics["best_step"] in {0, 7}
    assert pd.read_parquet(folder / "history.parquet")["step"].tolist() == [0, 7]
    assert all(bool(value.isfinite().all()) for value in GradiendModel.from_pretrained(folder).parameters())
    assert not (folder / FOLDER).exists()


@pytest.mark.usefixtures("project")
def test_damaged_rows_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"scaling": "reference"}}))
    original = RowSet.batch_means

    def batch_means(self: RowSet, batches: Any) -> Any:
        source, target = original(self, batches)
        return source, target.index_fill(0, torch.tensor([20]), torch.nan)

    monkeypatch.setattr(RowSet, "batch_means", batch_means)
    with pytest.raises(GradiendError, match=r"seed 1 stopped at step 11, .*not finite: run cache_gradients again\."):
        run_stage("one")
    assert [path.name for path in Path("one").iterdir()] == [FOLDER]


@pytest.mark.usefixtures("project")
def test_metrics_are_those_of_the_kept_step() -> None:
    metrics = read_json(run_stage("one") / "metrics.json")
    assert metrics["correlation_low"] <= metrics["correlation"] <= metrics["correlation_high"]
    history = pd.read_parquet("one/history.parquet").set_index("step")
    assert history.loc[metrics["best_step"], "correlation"] == metrics["correlation"] == history["correlation"].max()
    assert metrics.keys().isdisjoint({"stopped", "stopped_step", "learning_rate", "learning_rates_tried"})


@pytest.mark.usefixtures("project")
def test_every_input_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    for module in (pipeline.stage, stage):
        monkeypatch.setattr(module, "sha256_file", counted, raising=False)
    run_stage("one")
    assert sorted(name for name in hashed if name.startswith("shard-")) == ["shard-0.parquet", "shard-0.safetensors"]


@pytest.mark.usefixtures("project")
def test_runners_up_are_loaded_as_models() -> None:
    assert load_runners_up(run_stage("one")) == {}
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"preserve_n_best": 3}}))
    found = load_runners_up(run_stage("three"))
    history = pd.read_parquet("three/history.parquet").set_index("step")
    assert list(found) == history["correlation"].sort_values(ascending=False, kind="stable").index[1:3].tolist()
    store, params = GradientStore.open("store"), validate(Train, SETTINGS, "train")
    rows = RowSet.load(store, params, store.positions(split="validation", kind=TRAINING), torch.device("cpu"))
    for step, model in found.items():
        with torch.no_grad():
            encoded = model.encode(rows.source)[:, 0].double().numpy()
        mean = encoded[rows.labels > 0].mean()
        assert mean > encoded[rows.labels < 0].mean()
        assert history["mean_positive"].abs()[step] == pytest.approx(abs(mean), abs=1e-6)


# --- a learning rate that is searched for


TUNE = SETTINGS | {"learning_rate": "tune", "learning_rate_probe_steps": 5, "learning_rate_max_probes": 4}


@pytest.mark.usefixtures("project")
def test_tuned_rate_and_what_was_tried_are_recorded() -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": TUNE}))
    metrics = read_json(run_stage("tuned") / "metrics.json")
    tried = {line["learning_rate"]: line["score"] for line in metrics["learning_rates_tried"]}
    assert len(tried) == len(metrics["learning_rates_tried"]) == 4
    assert metrics["learning_rate"] in tried
    assert GradiendModel.from_pretrained("tuned").metadata["learning_rate"] == metrics["learning_rate"]
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"learning_rate": metrics["learning_rate"]}}))
    run_stage("given")
    for name in ("model.safetensors", "history.parquet"):
        assert Path("tuned", name).read_bytes() == Path("given", name).read_bytes()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("moment", [7, 4 * 17 + 3, 4 * 17 + 33])  # a probe is 12 steps of warm-up and 5 more
def test_interrupted_search_or_training_ends_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": TUNE}))
    expected = bytes_of(run_stage("whole"))
    with monkeypatch.context() as patch:
        stop_after(moment, patch)
        with pytest.raises(Stopped):
            run_stage("parts")
    taken = stop_after(1000, monkeypatch)
    assert bytes_of(run_stage("parts")) == expected
    assert len(taken) == (60 - 30 if moment == 4 * 17 + 33 else 4 * 17 + 60)


# --- TensorBoard


def events(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar that TensorBoard shows."""
    # Here, for every process that is killed below imports this module.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(folder, size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


@pytest.mark.usefixtures("project")
def test_event_files_hold_every_step_once_and_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bytes_of(run_stage("plain"))
    assert not Path("logs").exists()
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"report_to": ["tensorboard"]}}))
    with monkeypatch.context() as patch:
        stop_after(33, patch)
        with pytest.raises(Stopped):
            run_stage("shown")
    found = bytes_of(run_stage("shown"))
    assert {name: data for name, data in found.items() if name != "manifest"} == {
        name: data for name, data in expected.items() if name != "manifest"
    }
    scalars = events("logs/tensorboard/train/1")
    history = pd.read_parquet("shown/history.parquet").set_index("step")
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 61))
    assert dict(scalars["train/learning_rate"])[60] == pytest.approx(history.loc[60, "learning_rate"])
    assert np.mean([loss for step, loss in scalars["train/loss"] if step <= 7]) == pytest.approx(history.loc[7, "loss"])
    metrics = sorted(name for name in HISTORY if name not in {"step", "loss", "learning_rate"})
    assert sorted(scalars) == sorted(["train/loss", "train/learning_rate", *(f"eval/{name}" for name in metrics)])
    for name in metrics:
        assert [step for step, _ in scalars[f"eval/{name}"]] == history.index.tolist()
        values = [abs(value) for _, value in scalars[f"eval/{name}"]]  # written before the model is turned around
        assert values == pytest.approx(history[name].abs().tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("project")
def test_a_training_from_the_start_replaces_what_was_shown() -> None:
    for steps in (20, 10):
        changed = SETTINGS | {"max_steps": steps, "report_to": ["tensorboard"]}
        Path("params.yaml").write_text(yaml.safe_dump({"train": changed}))
        run_stage("shown")
    assert [step for step, _ in events("logs/tensorboard/train/1")["train/loss"]] == list(range(1, 11))


@pytest.mark.usefixtures("project")
def test_missing_tensorboard_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"report_to": ["tensorboard"]}}))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    taken = stop_after(1000, monkeypatch)
    with pytest.raises(GradiendError, match=r"tensorboard is not installed\. Run: python -m pip install"):
        run_stage("one")
    assert taken == []


# --- kills


def _train(folder: Path, name: str, log: Path) -> None:
    """Run the stage; `log` appears when training begins."""
    os.chdir(folder)
    original = loop.training_step

    def training_step(*arguments: Any, **options: Any) -> float:
        log.touch()
        return original(*arguments, **options)

    loop.training_step = training_step
    run_stage(name)


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random_moments_change_no_byte(project: Path, seed: int) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"train": SETTINGS | {"save_steps": 1, "max_steps": 200}}))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "safetensors.torch", "torch", "transformers"])
    moments, kills, log = random.Random(seed), 0, project / "log"

    def attempt(name: str, share: float | None, whole: float = 0.0) -> float:
        """Train for a share of the time that the whole takes; the time it took."""
        log.unlink(missing_ok=True)
        process = context.Process(target=_train, args=(project, name, log))
        process.start()
        while process.is_alive() and not log.exists():  # importing takes a while
            time.sleep(0.002)
        started = time.monotonic()
        process.join(None if share is None else share * whole)
        process.kill()
        process.join()
        nonlocal kills
        kills += process.exitcode != 0
        return time.monotonic() - started

    whole = attempt("whole", None)
    while kills < 3:  # on a busy machine some attempts are done before their moment
        attempt("parts", moments.uniform(0, 0.4), whole)
    attempt("parts", None)
    assert bytes_of(Path("parts")) == bytes_of(Path("whole"))
    assert not (Path("parts") / FOLDER).exists()
