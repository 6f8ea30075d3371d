"""Results are keyed by the releases of the packages that make them."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gradiend_core.errors import GradiendError
from pipeline import versions
from pipeline.imports import closure
from project import ROOT, Project, create


def imported(stage: str) -> set[str]:
    """The recorded packages that a stage's code imports."""
    found: set[str] = set()
    for file in closure(stage, ROOT):
        for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found & set(versions.PACKAGES)


def test_every_stage_names_the_packages_that_it_imports() -> None:
    for name, stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"].items():
        params = stage.get("do", stage).get("params", [])
        named = {package for entry in params if isinstance(entry, dict) for package in entry["versions.yaml"]}
        assert named == imported(name), name


def test_installed_required_and_recorded_releases_agree() -> None:
    versions.check()
    required = (ROOT / "pyproject.toml").read_text("utf-8")
    assert [name for name, release in versions.installed().items() if f'"{name}=={release}"' not in required] == []


def test_another_release_is_refused_until_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "FILE", tmp_path / "versions.yaml")
    versions.FILE.write_text("# A remark.\ntorch: 1.0.0\n")
    with pytest.raises(GradiendError, match=r"torch .*, not 1\.0\.0"):
        versions.check()
    versions.record()
    versions.check()
    assert versions.FILE.read_text().startswith("# A remark.\n")


@pytest.mark.parametrize("engine", ["snakemake", "dvc"])
def test_a_recorded_upgrade_executes_the_stages_that_import_it(tmp_path: Path, engine: str) -> None:
    project: Project = create(tmp_path / "project")
    model, corpus = "artifacts/base_models/tiny/model.safetensors", "artifacts/corpora/own/texts.parquet"
    make = project.snakemake if engine == "snakemake" else project.repro
    targets = [model, corpus] if engine == "snakemake" else ["base_model_trained@tiny", "corpus_text@own"]
    make(*targets)
    project.executed()
    project.replace("versions.yaml", "torch: 2", "torch: 3")
    output = make(*targets)
    assert project.executed() == ["base_models/tiny"]
    assert engine == "dvc" or "base_model_trained@tiny is due: torch is" in output
