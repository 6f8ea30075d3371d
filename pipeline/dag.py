"""What dvc.yaml says, for Snakemake: each stage's command, parameters, code and files, and whether it is up to date.

Two small files per stage lie under `.stages/`. The *receipt* is written when a stage is done: the command, parameter
values and hashes of code, inputs and outputs. The *spec* is an input of the stage's Snakemake rule and rewritten when
the receipt is not true (any more) of the files that are there. So it does not matter who wrote the files, in which
order, or what their modification times are: Snakemake runs (or restores) a stage again unless its receipt is true.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dvc.dvcfile import PROJECT_FILE, ProjectFile
from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo
from dvc.stage.loader import StageLoader
from dvc.utils.serialize import LOADERS, load_path, parse_yaml
from dvc.utils.serialize._common import _load_data
from dvc_data.hashfile.build import build
from dvc_data.hashfile.hash import hash_file

from gradiend_core.errors import GradiendError
from gradiend_core.files import write_whole

ARTIFACTS = "artifacts/"
_RECORDS = Path(".stages")


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, resolved with params.yaml; paths are relative to the repository.

    `files` maps code and other files from outside the pipeline to their MD5 (None: missing), `artifacts` are the files
    or folders of other stages that this one reads.
    """

    address: str
    command: str
    parameters: Mapping[str, Any]
    files: Mapping[str, str | None]
    artifacts: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def spec(self) -> dict[str, Any]:
        """What the stage depends on besides other stages' outputs."""
        return {"command": self.command, "parameters": dict(self.parameters), "files": dict(self.files)}

    def inputs(self, outputs: Sequence[str]) -> list[str]:
        """Those of all stages' `outputs` (sorted) that this stage reads, one by one where it reads a folder."""
        return sorted({path for artifact in self.artifacts for path in _at_or_below(artifact, outputs)})


class PrivateRepo(Repo):  # type: ignore[misc]
    """The DVC repository in the working directory, with locks of its own: jobs of different stages run side by side.

    Objects are content-addressed and written atomically, so only the locks need to be private. Git is not consulted.
    """

    def __init__(self, locks: str) -> None:
        self._locks = locks
        super().__init__(config={"core": {"no_scm": True}})

    @cached_property
    def tmp_dir(self) -> str:
        """Where the locks are."""
        return self._locks

    @cached_property
    def _btime(self) -> float:
        # Part of the name of DVC's table of known file hashes, which all jobs and the `dvc` command share.
        path = Path(self.root_dir, self.DVC_DIR, "tmp", "btime")
        path.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
        return path.stat().st_mtime


@contextlib.contextmanager
def private_repo() -> Iterator[PrivateRepo]:
    """Open the repository; what DVC has to say against it becomes a `GradiendError`."""
    LOADERS[".yaml"] = _load_yaml
    with tempfile.TemporaryDirectory(prefix="dvc-locks-") as locks:
        try:
            with PrivateRepo(locks) as repo, lock_repo(repo):
                yield repo
        except DvcException as error:
            raise GradiendError(str(error)) from None


# DVC parses params.yaml anew for every parameter that it reads, several times for each stage.
_parsed_once = lru_cache(maxsize=8)(parse_yaml)


def _load_yaml(path: str, fs: Any = None, **options: Any) -> Any:
    return _load_data(os.path.abspath(path), parser=_parsed_once, fs=fs, **options)


class Hashes:
    """MD5 of files, from DVC's table of known hashes where size, inode and modification time are the known ones."""

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self._known: dict[str, str | None] = {}

    def file(self, path: str) -> str | None:
        """MD5 of an output file; None when it does not exist."""
        if path not in self._known:
            absolute = os.path.join(self._repo.root_dir, path)
            exists = os.path.isfile(absolute)
            found = hash_file(absolute, self._repo.fs, "md5", self._repo.state)[1].value if exists else None
            self._known[path] = found
        return self._known[path]

    def dependency(self, path: str) -> str | None:
        """MD5 of a file or folder from outside the pipeline, as DVC computes it; None when it does not exist."""
        if path not in self._known:
            absolute = os.path.join(self._repo.root_dir, path)
            self._known[path] = self._built(absolute) if os.path.exists(absolute) else None
        return self._known[path]

    def _built(self, path: str) -> str | None:
        repo = self._repo
        _, _, built = build(repo.cache.local, path, repo.fs, "md5", ignore=repo.dvcignore, dry_run=True)
        return built.hash_info.value


def stage_loader(repo: Repo) -> StageLoader:
    """The stages of dvc.yaml by their addresses, each resolved when it is asked for.

    Without dvc.lock: it says what `dvc repro` did, not what a stage is, and reading it takes longer than all the rest.
    """
    project = ProjectFile(repo, os.path.join(repo.root_dir, PROJECT_FILE))
    return StageLoader(project, project.contents)


def read_stages(repo: Repo, hashes: Hashes) -> list[Stage]:
    """The stages of dvc.yaml, with their parameter values and the hashes of files from outside the pipeline.

    Without the check of the parameters, which Snakemake makes itself: as a job before all others it would have all of
    them listed as due whenever params.yaml has changed. So what it writes is in no stage's `inputs`.
    """
    # From the resolved YAML: an object of DVC's for each file of each stage would take ten times longer.
    loader = stage_loader(repo)
    paths = {name: os.path.join(repo.root_dir, name) for name in ("params.yaml", "versions.yaml")}
    files = {name: load_path(path, repo.fs) for name, path in paths.items() if os.path.exists(path)}
    return [
        _read_stage(address, loader.resolver.resolve_one(address)[address], files, hashes)
        for address in loader
        if address != "check_params"
    ]


def _read_stage(address: str, data: Mapping[str, Any], files: Mapping[str, Any], hashes: Hashes) -> Stage:
    parameters: dict[str, Any] = {}
    for entry in data.get("params", []):
        named = {"params.yaml": [entry]} if isinstance(entry, str) else entry
        for name, keys in named.items():
            parameters |= _values_at(keys, files.get(name))
    artifacts = tuple(path for path in data["deps"] if path.startswith(ARTIFACTS))
    outputs = [entry for kind in ("outs", "metrics", "plots") for entry in data.get(kind, [])]
    return Stage(
        address=address,
        command=data["cmd"],
        parameters=parameters,
        files={path: hashes.dependency(path) for path in data["deps"] if path not in artifacts},
        artifacts=artifacts,
        outputs=tuple(entry if isinstance(entry, str) else next(iter(entry)) for entry in outputs),
    )


def _values_at(keys: Iterable[str], data: Any) -> dict[str, Any]:
    """The values at those of the dotted keys that are there."""
    found = {}
    for key in keys:
        value = data
        with contextlib.suppress(KeyError, TypeError):
            for part in key.split("."):
                value = value[part]
            found[key] = value
    return found


def prepare() -> list[str]:
    """Bring the specs up to date; one line for each earlier result that is not up to date, saying why.

    Raises `GradiendError` when dvc.yaml cannot be resolved with params.yaml.
    """
    reasons = []
    with private_repo() as repo:
        hashes = Hashes(repo)
        stages = read_stages(repo, hashes)
        outputs = sorted(path for stage in stages for path in stage.outputs)
        for stage in stages:
            receipt = _read(receipt_path(stage.address))
            differences = list(_differences(receipt, stage, stage.inputs(outputs), hashes)) if receipt else []
            if differences or not receipt:
                _renew_spec(stage)
            if differences:
                more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
                reasons.append(f"{stage.address} is due: {'; '.join(differences[:3])}{more}")
    return reasons


def version(address: str) -> str:
    """SHA-256 of the stage's spec file."""
    return hashlib.sha256((_RECORDS / f"{address}.spec.json").read_bytes()).hexdigest()


def receipt_path(address: str) -> Path:
    """Where the stage's receipt is."""
    return _RECORDS / f"{address}.receipt.json"


def write_receipt(stage: Stage, inputs: Mapping[str, str | None], outputs: Mapping[str, str | None]) -> None:
    """Say that these outputs (path to MD5) were made from these inputs (path to MD5) as the stage says."""
    _write_json(receipt_path(stage.address), stage.spec | {"inputs": dict(inputs), "outputs": dict(outputs)})


def _at_or_below(path: str, outputs: Sequence[str]) -> Iterator[str]:
    exact = bisect_left(outputs, path)
    if exact < len(outputs) and outputs[exact] == path:
        yield path
    yield from outputs[bisect_left(outputs, f"{path}/") : bisect_left(outputs, f"{path}0")]  # 0 comes after /


def _renew_spec(stage: Stage) -> None:
    # With the time, so that the content differs from all that Snakemake has recorded, also when the stage is unchanged.
    _write_json(_RECORDS / f"{stage.address}.spec.json", stage.spec | {"renewed": time.time_ns()})


def _differences(receipt: Mapping[str, Any], stage: Stage, inputs: Iterable[str], hashes: Hashes) -> Iterator[str]:
    if receipt["command"] != stage.command:
        yield "its command changed"
    for key in sorted(receipt["parameters"].keys() | stage.parameters.keys()):
        yield from _changed_values(key, receipt["parameters"].get(key), stage.parameters.get(key))
    files = receipt["files"]
    yield from (
        f"{path} changed" for path in sorted(files.keys() | stage.files) if files.get(path) != stage.files.get(path)
    )
    # Inputs that are missing now are made first; Snakemake then compares them with what it has recorded.
    now = {path: md5 for path in inputs if (md5 := hashes.file(path)) is not None}
    yield from (f"{path} changed" for path, md5 in now.items() if receipt["inputs"].get(path) != md5)
    for path in stage.outputs:
        found = hashes.file(path)
        if found != receipt["outputs"].get(path):
            yield f"{path} is {'missing' if found is None else 'not as it was written'}"


def _changed_values(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _changed_values(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield f"{key} is {json.dumps(now, default=str)}, was {json.dumps(before, default=str)}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")
