"""Small but real runs of the whole pipeline: both engines, the demo's kind of input and a user's own."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from own_input import write_model, write_reviews
from transformers import AutoModelForMaskedLM, AutoTokenizer

from gradiend_core import GradiendModel, GradientStore
from project import ROOT, Project

_REAL = [
    "Snakefile",
    "dvc.yaml",
    ".dvc/config",
    ".dvc/plots",
    ".dvcignore",
    ".gitignore",
    "profiles",
    "workflow",
    "pipeline",
]
_REAL += ["gradiend_core", "data", "versions.yaml"]

_TINY = {
    "seeds": [0, 1],
    "gradient_shards": [0, 1],
    "corpora": {"grammar": {"english": {"path": "data/english", "max_size": 2000}}, "text": {}},
    "base_models": {
        "trained": {
            "tiny": {
                "corpus": "english",
                "vocab_size": 600,
                "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
                "training": {"max_steps": 20, "learning_rate": 5.0e-3, "per_device_train_batch_size": 32},
                "probe_words": ["he", "she", "they"],
            }
        },
        "local": {},
        "hub": {},
    },
    "datasets": {
        "gender": {
            "corpus": "english",
            "classes": {"masculine": ["he"], "feminine": ["she"]},
            "min_left_context_words": 2,
            "max_size_per_class": 60,
            "neutral_max_size": 30,
        }
    },
    "runs": {
        "gender": {
            "base_model": "tiny",
            "dataset": "gender",
            "target_classes": ["masculine", "feminine"],
            "pre_prune": {"topk": 0.1},
            "cache_gradients": {},
            "train": {"max_steps": 20, "eval_steps": 5, "train_batch_size": 8},
            "select_seed": {"min_convergent_seeds": None},
            "post_prune": {"topk": 0.5},
            "evaluate_encoder": {"bootstrap_samples": 50},
            "evaluate_decoder": {"lrs": [1.0, 0.1], "bootstrap_samples": 50},
            "plot": {"dpi": 72},
        }
    },
}


def real_project(folder: Path) -> Project:
    """The project itself, without parameters."""
    for name in _REAL:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    project = Project(folder, folder.with_name(f"{folder.name}-site"))
    project.run("git", "init", "--quiet")
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Project]:
    """Two cold runs of the same parameters in folders of their own, one by each engine."""
    projects = []
    for engine in ("snakemake", "dvc"):
        project = real_project(tmp_path_factory.mktemp("whole") / engine)
        (project.folder / "params.yaml").write_text(yaml.safe_dump(_TINY))
        if engine == "snakemake":
            project.snakemake()
        else:
            project.repro()
        projects.append(project)
    return projects[0], projects[1]


def test_two_cold_runs_give_the_same_bytes_whatever_the_engine(finished: tuple[Project, Project]) -> None:
    first, second = (project.artifacts() for project in finished)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_every_artifact_has_one_manifest_that_says_what_made_it(finished: tuple[Project, Project]) -> None:
    artifacts = finished[0].artifacts()
    manifests = {name: json.loads(data) for name, data in artifacts.items() if "/manifests/" in name}
    listed = [(path, digest) for manifest in manifests.values() for path, digest in manifest["outputs"].items()]
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
    assert all(f'"seed": "{seed}", "step": "0"' in page for seed in _TINY["seeds"])
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
