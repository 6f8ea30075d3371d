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

from dvc.repo import Repo
from dvc.stage import PipelineStage

from gradiend_core.errors import GradiendError
from pipeline.dag import Hashes, private_repo, read_stage, receipt_path, write_receipt
from pipeline.gpus import taken
from pipeline.locks import Lock

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run or restore the stage; its exit status, or 1 with one line when DVC or the user's files stand against it."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.cached", description=__doc__)
    parser.add_argument("address", help="a stage of dvc.yaml, e.g. train@pronoun_number-0")
    parser.add_argument("--threads", type=int, help="threads for the stage's numerical libraries (default: theirs)")
    parser.add_argument("--gpus", type=int, help="GPUs of this machine that only this stage may use (default: all)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        with private_repo() as repo:
            return _make(repo, arguments.address, _environment(arguments.threads), arguments.gpus)
    except (GradiendError, OSError) as error:
        print(f"error: {arguments.address}: {error}", file=sys.stderr)
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
    stages = {stage.addressing: stage for stage in repo.index.stages}
    if address not in stages:
        near = get_close_matches(address, stages, n=1)
        hint = f"Did you mean {near[0]}?" if near else "`dvc stage list` shows what there is."
        raise GradiendError(f"no such stage in dvc.yaml. {hint}")
    with _alone(address):
        return _restore_or_run(repo, stages[address], environment, gpus)


def _restore_or_run(repo: Repo, stage: PipelineStage, environment: Mapping[str, str], gpus: int | None) -> int:
    receipt_path(stage.addressing).unlink(missing_ok=True)
    _hash_dependencies(stage)
    hashes = Hashes(repo)
    spec = read_stage(stage, hashes)
    made = _restored(repo, stage)
    if made is None:
        with taken(gpus, environment) as gpus_seen:
            status = _run(spec.command, {**environment, **gpus_seen}, repo.root_dir)
        if status != 0:
            return status
        made = _stored(stage)
    else:
        print(f"{stage.addressing}: restored from the cache", flush=True)
    inputs = spec.inputs(output.def_path for other in repo.index.stages for output in other.outs)
    outputs = {output.def_path: output.hash_info.value for output in made.outs}
    write_receipt(spec, {path: hashes.file(path) for path in inputs}, outputs)
    return 0


def _hash_dependencies(stage: PipelineStage) -> None:
    missing = [dependency.def_path for dependency in stage.deps if not dependency.exists]
    if missing:
        raise GradiendError(f"{', '.join(missing)}: does not exist. Make it first, or check its path in params.yaml.")
    stage.save_deps()


def _restored(repo: Repo, stage: PipelineStage) -> PipelineStage | None:
    entry = repo.stage_cache._load(stage)
    if entry is None:
        return None
    cached = repo.stage_cache._create_stage(entry, wdir=stage.wdir)
    # What lies in a shared cache may be anybody's: only this stage's own outputs are put in place.
    same = {output.def_path for output in cached.outs} == {output.def_path for output in stage.outs}
    if not same or not cached.outs_cached():
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
    stage.commit(relink=False)
    return stage


def _run(command: str, environment: Mapping[str, str], folder: str) -> int:
    # `exec`: the shell becomes the stage program, so that a signal reaches the program itself.
    # Open files: those that locks are held with, see pipeline/locks.py; others are not inherited.
    process = subprocess.Popen(["/bin/sh", "-c", f"exec {command}"], cwd=folder, env=environment, close_fds=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    status = process.wait()
    return status if status >= 0 else 128 - status


def _environment(threads: int | None) -> dict[str, str]:
    # `python` in a stage's command means this one, also when its environment was not activated.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return environment | ({"OMP_NUM_THREADS": str(threads)} if threads is not None else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
