"""What every stage program shares: its arguments, and outputs that appear whole or not at all."""

import argparse
import errno
import hashlib
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import gradiend_core
from gradiend_core.errors import GradiendError
from gradiend_core.files import sha256_file, write_json

# What an OSError of a full, over-quota, broken or read-only disk says; others may be about a file that is read.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

# Packages whose version may change a result; a manifest records those that its stage imported.
_PACKAGES = ("matplotlib", "numpy", "pandas", "pyarrow", "safetensors", "tokenizers", "torch", "transformers")


def stage_parser(name: str, description: str | None, *, params: bool = True) -> argparse.ArgumentParser:
    """The parser of a stage: `--params` (dotted key of its section, if it has one) and `--manifest`, plus its own."""
    parser = argparse.ArgumentParser(prog=f"python -m pipeline {name}", description=description)
    if params:
        section = "section of params.yaml, e.g. runs.number.train"
        parser.add_argument("--params", required=True, metavar="KEY", help=section)
    parser.add_argument("--manifest", required=True, type=Path, help="where to write what made the outputs")
    return parser


T = TypeVar("T")


class Outputs:
    """Files written aside and renamed together once all are complete, with a manifest that says what made them.

    Use as a context manager, which waits until no other process makes the same; `path(final)` gives the name to write
    to. When the block raises, the asides are deleted, with those that a killed process has left for the same outputs,
    and earlier files stay as they were. The manifest holds the stage, its resolved parameters, the SHA-256
    of inputs and outputs, threads, package versions and facts from `record`: no timestamps, no host names.
    """

    def __init__(self, stage: str, manifest: Path, params: Mapping[str, Any], inputs: Sequence[Path]) -> None:
        self._manifest = manifest
        self._asides: dict[Path, Path] = {}
        self._folders: dict[Path, Path] = {}
        self._resumable: set[Path] = set()
        self._held = ExitStack()
        self._facts: dict[str, Any] = {"stage": stage, "params": dict(params)}
        self._facts["inputs"] = {path.as_posix(): sha256_file(path) for path in _files(inputs)}
        # By name, so that no stage depends on them: they can refuse a damaged input, wait for another process and
        # tidy up after it, but never change a result.
        self._leftovers = importlib.import_module("pipeline.leftovers")
        importlib.import_module("pipeline.manifests").refuse_damaged(self._facts["inputs"])

    @property
    def inputs(self) -> Mapping[str, str]:
        """SHA-256 of the input files by their paths."""
        found: dict[str, str] = self._facts["inputs"]
        return found

    def path(self, final: Path) -> Path:
        """The aside path for `final`, in the same folder (created when missing); the suffix stays the same."""
        aside = _aside(final)
        self._asides[final] = aside
        return aside

    def resumable(self, final: Path) -> Path:
        """The aside path for a `final` that is continued after an interruption: always the same, and not deleted."""
        aside = _aside(final, "resume")
        self._asides[final] = aside
        self._resumable.add(aside)
        return aside

    def hold(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that is left only after the outputs have been put in place, or the block has failed."""
        return self._held.enter_context(context)

    def folder(self, final: Path, names: Sequence[str]) -> Path:
        """An aside folder for code that writes whole folders; of its files the named ones go to `final`."""
        aside = _aside(final)
        shutil.rmtree(aside, ignore_errors=True)  # of a killed process that had the same number
        aside.mkdir()
        self._folders[final] = aside
        self._asides |= {final / name: aside / name for name in names}
        return aside

    def record(self, **facts: Any) -> None:
        """Add facts to the manifest (a seed, a device, …)."""
        self._facts.update(facts)

    def __enter__(self) -> Self:
        self._alone = self._held.enter_context(self._leftovers.alone(self._manifest))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = (kind, error, traceback)
        try:
            self._end(error)
        except BaseException as failure:  # what is held must not take a failed commit for a success
            outcome = (type(failure), failure, failure.__traceback__)
            raise
        finally:
            for aside in {*self._asides.values()} - self._resumable:
                aside.unlink(missing_ok=True)
            for folder in self._folders.values():
                shutil.rmtree(folder, ignore_errors=True)
            if self._alone:
                self._leftovers.remove_asides({*self._asides, *self._folders, self._manifest})
            self._held.__exit__(*outcome)

    def _end(self, error: BaseException | None) -> None:
        try:
            if error is None:
                self._commit()
            elif isinstance(error, OSError):
                self._explain(error)
        except OSError as failure:
            self._explain(failure)
            raise

    def _commit(self) -> None:
        outputs = {final.as_posix(): sha256_file(aside) for final, aside in self._asides.items()}
        manifest = self._facts | environment() | {"outputs": outputs}
        write_json(self.path(self._manifest), manifest)
        for aside in self._asides.values():
            with aside.open("rb") as stream:
                os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        # What can be resumed goes last: a kill before it costs nothing that took long to compute.
        for final, aside in sorted(self._asides.items(), key=lambda names: names[1] in self._resumable):
            aside.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
            final.parent.mkdir(exist_ok=True)
            aside.replace(final)

    def _explain(self, error: OSError) -> None:
        """Raise the `GradiendError` for an output that cannot be written; return when another file is at fault."""
        finals = {str(aside): final for final, aside in self._asides.items()}
        if str(error.filename) in finals or error.errno in _DISK_ERRORS:
            name = error.filename or next(iter(self._asides.values()), self._manifest)
            raise _unwritable(finals.get(str(name), Path(name)), error) from None


def _aside(final: Path, mark: str | int | None = None) -> Path:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(final.parent, error) from None
    if not os.access(final.parent, os.W_OK):
        raise GradiendError(f"{final.parent}: folder is not writable. Give yourself write permission on it.")
    aside = final.with_name(f".partial-{mark or os.getpid()}-{final.name}")
    if aside.is_symlink():  # not ours: writing would go to where it points
        aside.unlink()
    return aside


def _files(paths: Sequence[Path]) -> list[Path]:
    """The paths, folders replaced by the files in them, sorted."""
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if not file.is_dir()]
    return sorted(file for file in found if not any(part.startswith(".partial-") for part in file.parts))


def code_digest() -> str:
    """SHA-256 over the source files of both packages: what an interrupted computation has to have been made by."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(gradiend_core.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package.parent).as_posix()} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What the last digits of a result may depend on besides code and inputs: threads and package versions."""
    return {"threads": os.environ.get("OMP_NUM_THREADS"), "versions": _versions()}


def _versions() -> dict[str, str]:
    imported = {name: version(name) for name in _PACKAGES if name in sys.modules}
    return imported | {"python": platform.python_version()}


def _unwritable(path: Path, error: OSError) -> GradiendError:
    return GradiendError(f"{path}: cannot be written ({error.strerror}). Check free space and permissions there.")
