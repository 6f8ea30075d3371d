"""Restore one stage of dvc.yaml from DVC's run-cache, or run it: `python -m pipeline.cached train@number-0`.

This is how Snakemake runs a stage. Unlike `dvc repro` it runs exactly this stage, leaves dvc.lock alone, takes no lock
that another stage's job could wait for (but for a GPU, pipeline/gpus.py), and does not remove earlier outputs first: a
stage program replaces them itself when it has succeeded. It relies on internals of DVC, whose version is pinned for
that reason.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from difflib import get_close_matches
from pathlib import Path

from dvc.dependency import Dependency
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.cache import _get_stage_hash
from dvc_data.hashfile.tree import Tree

from gradiend_core.errors import GradiendError, killed_by
from pipeline.dag import ARTIFACTS, Stage, private_repo, receipt_path, stage_loader, write_receipt
from pipeline.gpus import taken
from pipeline.locks import Lock
from pipeline.objects import drop_damaged_entries, drop_damaged_objects, restorable

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run or restore the stage; its exit status, or 1 with one line when DVC or the user's files stand against it."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.cached", description=__doc__)
    parser.add_argument("address", help="a stage of dvc.yaml, e.g. train@pronoun_number-0")
    parser.add_argument("--threads", type=int, help="threads for the stage's numerical libraries (default: theirs)")
    parser.add_argument("--gpus", type=int, help="GPUs of this machine that only this stage may use (default: all)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("dvc_data").propagate = False  # DVC prints its errors, without a traceback
    try:
        with private_repo() as repo:
            return _make(repo, arguments.address, _environment(arguments.threads), arguments.gpus)
    except GradiendError as error:
        print(f"error: {arguments.address}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or "DVC's cache"
        why = f"{where}: {error.strerror}. Check free space and permissions there, then run it again."
        print(f"error: {arguments.address}: {why}", file=sys.stderr)
        return 1


@contextmanager
def _alone(address: str) -> Iterator[None]:
    """Wait until no other job makes this stage, e.g. one that a killed Snakemake has left running on a cluster."""
    with closing(Lock(receipt_path(address).with_name(f"{address}.lock"))) as lock:
        try:
            if not lock.take(wait=False):
                print(f"{address}: waiting for another job that makes it", flush=True)
                lock.take(wait=True)
        except OSError as error:
            logger.warning("%s: no locks on this file system (%s)", address, error.strerror)
        yield


def _make(repo: Repo, address: str, environment: Mapping[str, str], gpus: int | None) -> int:
    stages = stage_loader(repo)
    if address not in stages:
        near = get_close_matches(address, stages, n=1)
        hint = f"Did you mean {near[0]}?" if near else "`dvc stage list` shows what there is."
        raise GradiendError(f"no such stage in dvc.yaml. {hint}")
    with _alone(address):
        return _restore_or_run(repo, stages[address], environment, gpus)


def _restore_or_run(repo: Repo, stage: PipelineStage, environment: Mapping[str, str], gpus: int | None) -> int:
    receipt_path(stage.addressing).unlink(missing_ok=True)
    _hash_dependencies(stage)
    spec = _described(stage)
    made = _restored(repo, stage)
    if made is None:
        with taken(gpus, environment) as gpus_seen:
            status = _run(spec.command, {**environment, **gpus_seen}, repo.root_dir)
        if status < 0:
            print(f"error: {stage.addressing}: {killed_by(-status)}", file=sys.stderr)
            return 128 - status
        if status != 0:
            return status
        made = _stored(stage)
    else:
        print(f"{stage.addressing}: restored from the cache", flush=True)
    inputs = {path: md5 for dependency in _artifacts(stage) for path, md5 in _files(dependency)}
    outputs = {output.def_path: output.hash_info.value for output in made.outs}
    write_receipt(spec, inputs, outputs)
    return 0


def _artifacts(stage: PipelineStage) -> list[Dependency]:
    return [dependency for dependency in stage.deps if dependency.def_path.startswith(ARTIFACTS)]


def _files(dependency: Dependency) -> Iterator[tuple[str, str]]:
    """The hashed dependency's file, or the files in its folder, with their MD5."""
    if not isinstance(dependency.obj, Tree):
        yield dependency.def_path, dependency.hash_info.value
        return
    for key, _, hash_info in dependency.obj:
        yield "/".join((dependency.def_path, *key)), hash_info.value


def _described(stage: PipelineStage) -> Stage:
    """What is hashed already, in the terms of a receipt."""
    artifacts = _artifacts(stage)
    code = [dependency for dependency in stage.deps if dependency not in artifacts and dependency not in stage.params]
    return Stage(
        address=stage.addressing,
        command=stage.cmd,
        parameters={key: value for dependency in stage.params for key, value in dependency.hash_info.value.items()},
        files={dependency.def_path: dependency.hash_info.value for dependency in code},
        artifacts=tuple(dependency.def_path for dependency in artifacts),
        outputs=tuple(output.def_path for output in stage.outs),
    )


def _hash_dependencies(stage: PipelineStage) -> None:
    missing = [dependency.def_path for dependency in stage.deps if not dependency.exists]
    if missing:
        raise GradiendError(f"{', '.join(missing)}: does not exist. Make it first, or check its path in params.yaml.")
    stage.save_deps()


def _restored(repo: Repo, stage: PipelineStage) -> PipelineStage | None:
    drop_damaged_entries(repo.stage_cache, _get_stage_hash(stage))
    entry = repo.stage_cache._load(stage)
    if entry is None:
        return None
    cached = repo.stage_cache._create_stage(entry, wdir=stage.wdir)
    # What lies in a shared cache may be anybody's: only this stage's own outputs are put in place.
    same = {output.def_path for output in cached.outs} == {output.def_path for output in stage.outs}
    if not same or not cached.outs_cached() or not all([restorable(output) for output in cached.outs]):
        return None
    cached.checkout(force=True)
    return cached


def _stored(stage: PipelineStage) -> PipelineStage:
    before = {dependency.def_path: dependency.hash_info for dependency in stage.deps}
    stage.save_deps()
    changed = [dependency.def_path for dependency in stage.deps if dependency.hash_info != before[dependency.def_path]]
    if changed:
        raise GradiendError(
            f"{', '.join(changed)}: changed while the stage ran, whose result is not kept. Run it again."
        )
    missing = [output.def_path for output in stage.outs if not output.exists]
    if missing:
        raise GradiendError(f"{', '.join(missing)}: declared in dvc.yaml but not written by the stage.")
    stage.save()
    drop_damaged_objects(stage.outs)
    stage.commit(relink=False)
    if not stage.outs_cached():  # DVC takes that for no failure
        raise GradiendError(
            f"its result cannot be stored in {stage.repo.cache.local.path}. Check free space and permissions there,"
            " then run it again."
        )
    return stage


def _run(command: str, environment: Mapping[str, str], folder: str) -> int:
    # `exec`: the shell becomes the stage program, so that a signal reaches the program itself.
    # Open files: those that locks are held with, see pipeline/locks.py; others are not inherited.
    process = subprocess.Popen(["/bin/sh", "-c", f"exec {command}"], cwd=folder, env=environment, close_fds=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    return process.wait()


def _environment(threads: int | None) -> dict[str, str]:
    # `python` in a stage's command means this one, also when its environment was not activated.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return environment | ({"OMP_NUM_THREADS": str(threads)} if threads is not None else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
