"""Small but real runs of the whole pipeline: both engines, the demo's kind of input and a user's own."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from own_input import write_model, write_reviews
from transformers import AutoModelForMaskedLM, AutoTokenizer

from gradiend_core import GradiendModel, GradientStore
from pipeline.check_params import CHECKED
from project import ROOT, Project
from real_project import TINY, real_project


@pytest.fixture(scope="module")
def finished(tiny_run: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Project]:
    """Two cold runs of the same parameters in folders of their own, one by each engine."""
    folder = tmp_path_factory.mktemp("whole")
    by_dvc = real_project(folder / "dvc")
    (by_dvc.folder / "params.yaml").write_text(yaml.safe_dump(TINY))
    by_dvc.repro()
    return tiny_run.copy(folder / "snakemake"), by_dvc


def test_two_cold_runs_give_the_same_bytes_whatever_the_engine(finished: tuple[Project, Project]) -> None:
    first, second = (project.artifacts() for project in finished)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_every_artifact_has_one_manifest_that_says_what_made_it(finished: tuple[Project, Project]) -> None:
    artifacts = finished[0].artifacts()
    manifests = {name: json.loads(data) for name, data in artifacts.items() if "/manifests/" in name}
    listed = [(path, digest) for manifest in manifests.values() for path, digest in manifest["outputs"].items()]
    del artifacts[str(CHECKED)]  # always the same
    made = {path: hashlib.sha256(data).hexdigest() for path, data in artifacts.items() if path not in manifests}
    assert sorted(listed) == sorted(made.items())
    for manifest in manifests.values():
        assert {"stage", "params", "inputs", "outputs", "versions"} <= manifest.keys()
        for path, digest in manifest["inputs"].items():
            assert hashlib.sha256((finished[0].folder / path).read_bytes()).hexdigest() == digest


def test_results_open_with_ordinary_tools(finished: tuple[Project, Project]) -> None:
    run = finished[0].folder / "artifacts/runs/gender"
    for target in ("masculine", "feminine"):
        folder = run / "rewritten" / target
        model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model(**tokenizer("[MASK] left.", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
        assert f"**{target}**" in (folder / "README.md").read_text()
    store = GradientStore.open(run / "gradients")
    model = GradiendModel.from_pretrained(run / "model")
    assert len(store.positions(kind="training")) == 60 * 2
    assert 0 < len(store.index) - 60 * 2 <= 30 * 2
    assert model.selection.n == -(-store.n // 2)
    encodings = pd.read_parquet(run / "encoder/encodings.parquet")
    assert len(encodings) == len(store.index)
    assert encodings["encoded"].abs().max() <= 1


def test_metrics_plots_and_reports_are_shown(finished: tuple[Project, Project]) -> None:
    project = finished[1]
    metrics = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert "artifacts/runs/gender/encoder/metrics.json" in metrics
    project.dvc("plots", "show")
    page = (project.folder / "dvc_plots/index.html").read_text()
    assert "training.png" in page
    assert all(f'"seed": "{seed}", "step": "0"' in page for seed in TINY["seeds"])
    finished[0].snakemake("--report", "report.html")
    assert "encoder" in (finished[0].folder / "report.html").read_text()


def test_the_commands_and_snippets_of_the_pages_work(finished: tuple[Project, Project]) -> None:
    project = finished[0]
    for page in ("README.md", "docs/engines.md", "docs/files.md", "docs/gradient-store.md"):
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
            if language == "python":
                project.run("python", "-c", block.replace("pronoun_number", "gender").replace("3PL", "feminine"))
            for line in block.splitlines():
                if language in {"", "bash"} and line.startswith(("snakemake ", "dvc ")):
                    project.run(*shlex.split(line, comments=True))


def test_a_changed_value_runs_what_it_affects_and_changing_it_back_restores(finished: tuple[Project, Project]) -> None:
    project, _ = finished
    params, before = project.folder / "params.yaml", project.artifacts()
    original = params.read_text()
    project.replace("params.yaml", "dpi: 72", "dpi: 80")
    planned = project.snakemake("--dry-run")
    assert "plot@gender is due: runs.gender.plot.dpi is 80, was 72" in planned
    assert planned.count(" is due:") == 1
    project.snakemake()
    changed = {name for name, data in project.artifacts().items() if data != before[name]}
    figures = {f"artifacts/runs/gender/plots/{figure}.png" for figure in ("training", "encoder", "decoder")}
    assert changed == figures | {"artifacts/manifests/plot/gender.json"}
    params.write_text(original)
    project.snakemake()
    assert project.artifacts() == before
    assert "Nothing to be done" in project.snakemake()


def test_damaged_artifacts_are_named_and_never_used(finished: tuple[Project, Project], tmp_path: Path) -> None:
    project = finished[0].copy(tmp_path / "damaged")
    shard = project.folder / "artifacts/runs/gender/gradients/shard-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    model = project.folder / "artifacts/runs/gender/seeds/0/model.safetensors"
    before = model.read_bytes()
    command = "python -m pipeline train --params runs.gender.train --seed 0 --gradients artifacts/runs/gender/gradients"
    command += " --output artifacts/runs/gender/seeds/0 --manifest artifacts/manifests/train/gender-0.json"
    message = project.run(*command.split(), succeeds=False)
    assert "error: artifacts/runs/gender/gradients/shard-1.safetensors: damaged" in message
    assert "Traceback" not in message
    assert model.read_bytes() == before
    project.snakemake()  # the damaged file is noticed by its content and restored
    assert project.artifacts() == finished[0].artifacts()


def test_other_instructions_change_results_by_their_rounding_only(
    finished: tuple[Project, Project], tmp_path: Path
) -> None:
    """What another processor or a GPU does: the same sums in another order."""
    usual = finished[0]
    other = usual.copy(tmp_path / "other")
    run = Path("artifacts/runs/gender")
    for made in (".dvc/cache", run / "gradients", run / "seeds"):
        shutil.rmtree(other.folder / made)
    other._environment |= {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    other.snakemake(*(str(run / f"seeds/{seed}/model.safetensors") for seed in TINY["seeds"]))
    stores = [GradientStore.open(project.folder / run / "gradients") for project in (usual, other)]
    everything = torch.arange(len(stores[0].index))
    for quantity in ("factual", "alternative"):
        mine, theirs = (store.rows(quantity, everything).double() for store in stores)
        error = (mine - theirs).norm(dim=1) / mine.norm(dim=1)
        assert error.max() < 1e-4
    for seed in TINY["seeds"]:
        history = run / f"seeds/{seed}/history.parquet"
        first, second = (pd.read_parquet(project.folder / history) for project in (usual, other))
        pd.testing.assert_frame_equal(first, second, rtol=1e-3, atol=1e-4)
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT" or error.max() > 0


def test_own_text_and_own_model(tmp_path: Path) -> None:
    project = real_project(tmp_path / "own")
    (project.folder / "my_data").mkdir()
    write_reviews(project.folder / "my_data/reviews.csv")
    write_model(project.folder / "my_data/model", project.folder / "my_data/reviews.csv")
    shutil.copy(ROOT / "configs/bring_your_own.yaml", project.folder / "params.yaml")
    project.snakemake()
    run = project.folder / "artifacts/runs/sentiment"
    index = pd.read_parquet(run / "gradients/shard-0.parquet")
    assert set(index["transition"].dropna()) == {"positive->negative", "negative->positive"}
    metrics = json.loads((run / "encoder/metrics.json").read_text())
    assert metrics["correlation"] > 0.9
    decoder = json.loads((run / "decoder/metrics.json").read_text())["classes"]
    for target in ("positive", "negative"):
        assert decoder[target]["value"] > decoder[target]["base_value"]
    base = AutoModelForMaskedLM.from_pretrained(project.folder / "my_data/model").state_dict()
    changed = AutoModelForMaskedLM.from_pretrained(run / "rewritten/positive").state_dict()
    assert any((changed[name] != tensor).any() for name, tensor in base.items())


def test_a_run_on_a_missing_model_says_so_before_anything_else(tmp_path: Path) -> None:
    project = real_project(tmp_path / "missing")
    (project.folder / "my_data").mkdir()
    write_reviews(project.folder / "my_data/reviews.csv")
    shutil.copy(ROOT / "configs/bring_your_own.yaml", project.folder / "params.yaml")
    message = project.snakemake(succeeds=False)
    assert "my_data/model" in message
    assert not (project.folder / "artifacts").exists()
