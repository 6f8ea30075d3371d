"""What several test files share: the tiny reference model, its rows, and the reference's values."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.lm.folder import load_masked_lm
from project import Project
from real_project import TINY, real_project

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Stages switch deterministic algorithms on for their process; a test must not leave that to the next."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """The folder of the tiny reference model."""
    return REFERENCE / "model"


@pytest.fixture
def reference_model(reference_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fresh copy of the tiny reference model and its tokenizer."""
    return load_masked_lm(reference_folder)


@pytest.fixture
def reference_rows() -> pd.DataFrame:
    """The 20 rows of the reference, in the schema of training.parquet."""
    return pd.DataFrame(json.loads((REFERENCE / "rows.json").read_text("utf-8")))


@pytest.fixture(scope="session")
def values() -> dict[str, Any]:
    """The reference's decisions and settings."""
    loaded: dict[str, Any] = json.loads((REFERENCE / "values.json").read_text("utf-8"))
    return loaded


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    """The reference's tensors."""
    loaded: dict[str, torch.Tensor] = load_file(REFERENCE / "values.safetensors")
    return loaded


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The real stages with tiny parameters, run once by Snakemake. Shared: change copies only."""
    project = real_project(tmp_path_factory.mktemp("tiny") / "run")
    (project.folder / "params.yaml").write_text(yaml.safe_dump(TINY))
    project.snakemake()
    return project
