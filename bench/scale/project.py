"""The project's own engines over any number of runs, with stages that sleep instead of computing."""

import shutil
from pathlib import Path

from bench.scale.study import params
from tests.pipeline.project import Project, create
from tests.pipeline.stub_stages import FILES


def make(folder: Path, runs: int) -> Project:
    """A copy of the pipeline in an empty folder, its stages replaced by sleeping ones; nothing is made yet."""
    project = create(folder)
    (folder / "params.yaml").write_text(params(runs))
    shutil.copy(Path(__file__).with_name("sleeping_stages.py"), folder / "pipeline/__main__.py")
    (folder / "pipeline/outputs.py").write_text(f"FILES = {FILES!r}\n")
    return project
