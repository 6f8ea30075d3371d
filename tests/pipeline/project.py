"""A copy of the pipeline with stub stages, for tests of the two engines."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

from pipeline.imports import declared

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_COPIED = ["Snakefile", "dvc.yaml", ".dvc/config", ".dvc/plots", ".dvcignore", ".gitignore", "profiles", "workflow"]
_COPIED += ["pipeline/__init__.py", "pipeline/cached.py", "pipeline/dag.py", "pipeline/engine.py", "pipeline/gpus.py"]
_COPIED += ["pipeline/locks.py", "pipeline/objects.py", "gradiend_core/errors.py", "gradiend_core/files.py"]
_COPIED += ["versions.yaml"]
_CHECK = """
from pathlib import Path
from gradiend_core.errors import GradiendError

def check():
    if "bad_key" in Path("params.yaml").read_text():
        raise GradiendError("params.yaml: bad_key: unknown key")

check_for_engines = check

def write_checked(path=Path("artifacts/params_checked.txt")):
    path.parent.mkdir(exist_ok=True)
    path.write_text("checked")
"""


class Project:
    """One copy of the project: its folder, its engines, and what they have executed."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.folder = folder
        self._log = folder / "executed.log"
        self._environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        self._environment.pop("OMP_NUM_THREADS", None)
        self._environment |= {"DVC_SITE_CACHE_DIR": str(site), "XDG_CACHE_HOME": str(site), "SHELL": "/bin/sh"}

    def run(self, *command: str, succeeds: bool = True) -> str:
        """Run a command in the project; its output. Its failure (or success, if it should fail) fails the test."""
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert (done.returncode == 0) == succeeds, f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, *command: str, output: IO[str]) -> subprocess.Popen[str]:
        """Start a command in the project, in a session of its own; it writes to an open file."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment,
            text=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def snakemake(self, *arguments: str, succeeds: bool = True) -> str:
        return self.run("snakemake", "--cores", "2", "--nocolor", *arguments, succeeds=succeeds)

    def dvc(self, *arguments: str, succeeds: bool = True) -> str:
        return self.run("dvc", *arguments, succeeds=succeeds)

    def repro(self, *arguments: str, succeeds: bool = True) -> str:
        return self.dvc("repro", *arguments, succeeds=succeeds)

    def executed(self) -> list[str]:
        """The stages executed since the last call, sorted: `train/a-0`, from the manifests' paths."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return sorted(line.removeprefix("artifacts/manifests/").removesuffix(".json") for line in lines)

    def replace(self, file: str, old: str, new: str) -> None:
        """Replace the first `old` in a file."""
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def artifacts(self) -> dict[str, bytes]:
        """The content of every artifact by its path."""
        files = (path for path in (self.folder / "artifacts").rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}

    def copy(self, folder: Path) -> "Project":
        """A copy with everything made so far, modification times kept."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder, folder.with_name(f"{folder.name}-site"))


def create(folder: Path) -> Project:
    """The project's engines with stub stages, in a folder; nothing is made yet."""
    for name in _COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target)
        else:
            shutil.copy(ROOT / name, target)
    for path in {path for paths in declared((ROOT / "dvc.yaml").read_text()).values() for path in paths}:
        target = folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text('SALT = ""\n')
    here = Path(__file__).parent
    shutil.copy(here / "stub_stages.py", folder / "pipeline/__main__.py")
    shutil.copy(here / "stub_params.yaml", folder / "params.yaml")
    (folder / "pipeline/check_params.py").write_text(_CHECK)
    (folder / "words").mkdir()
    (folder / "words/nouns.txt").write_text("dog\n")
    (folder / "own.txt").write_text("A sentence.\n")
    project = Project(folder, folder.with_name(f"{folder.name}-site"))
    project.run("git", "init", "--quiet")
    return project
