"""What the tests of faults start from: a finished project in which every stage that works offline has run."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from damage import EVERYTHING, Trial, write_results

from project import Project
from real_project import TINY

# Beside the tiny run: a corpus from a user's text, a model trained by two processes, and a user's own model.
_TEXT = "notes.txt"
_MODEL = "my_model"
_TINY_MODEL: dict[str, Any] = TINY["base_models"]["trained"]["tiny"]
_PAIR = _TINY_MODEL | {"training": _TINY_MODEL["training"] | {"max_steps": 12, "processes": 2, "save_steps": 4}}
PARAMS: dict[str, Any] = TINY | {
    "corpora": TINY["corpora"] | {"text": {"notes": {"path": _TEXT}}},
    "base_models": {
        "trained": {"tiny": _TINY_MODEL, "pair": _PAIR},
        "local": {"copied": {"path": _MODEL}},
        "hub": {},
    },
}


@pytest.fixture(scope="session")
def finished(tiny_run: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Finished by Snakemake, then by `dvc repro`, which runs the stages beside and writes dvc.lock. Change copies."""
    project = tiny_run.copy(tmp_path_factory.mktemp("faults") / "finished")
    (project.folder / _TEXT).write_text("".join(f"Note {number} says nothing.\n" for number in range(500)))
    model = project.folder / "artifacts/base_models/tiny"
    shutil.copytree(model, project.folder / _MODEL, ignore=shutil.ignore_patterns("metrics.json"))
    (project.folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    project.repro()
    return project


@pytest.fixture(scope="session")
def trials() -> Iterator[list[Trial]]:
    """The trials of damage and disks, which the long campaign publishes."""
    made: list[Trial] = []
    yield made
    if EVERYTHING and made:
        write_results(made)
