"""The README and its neighbours say what is so."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from gradiend_core.config.params import validate_params
from gradiend_core.config.section import read_params
from pipeline.__main__ import STAGES

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page: str) -> list[list[str]]:
    """The command lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_stages_named_in_commands_exist(page: str) -> None:
    for command in commands(page):
        if command[0] == "make":
            assert command[1] in TARGETS
        if command[:3] == ["python", "-m", "pipeline"]:
            assert command[3] in STAGES


def test_every_stage_and_every_path_of_the_tables_exists() -> None:
    text = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", text, re.MULTILINE)
    paths = [path for cell in table for path in re.findall(r"`([^`]+)`", cell)]
    known = {stage for stage in STAGES} | {"_local", "_hub"}
    folders = [ROOT, ROOT / "pipeline", ROOT / "gradiend_core"]
    missing = [path for path in paths if path not in known and not any((folder / path).exists() for folder in folders)]
    assert missing == []
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].keys() - {"check_params"}
    named = {path for path in paths if path in STAGES} | {"base_model_local", "base_model_hub"}
    assert named == stages


@pytest.mark.parametrize("path", ["params.yaml", "configs/bring_your_own.yaml"])
def test_params_files_are_valid(path: str) -> None:
    assert validate_params(read_params(ROOT / path), where=path).runs
