"""What the engines add to each job: a graph of any size, run to its end with jobs that compute nothing.

Three parts, because they grow differently: Snakemake itself (its jobs only touch their outputs), `pipeline.cached` on
some stages of one run, and `dvc repro`. Processor seconds, which other programs change less than the time on the clock.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.scale.project import make
from bench.scale.study import runs_for, stages_of

_SHELL = re.compile(r'shell:\n( +)(?:"[^"\n]*"\s*)+')
_STAND_IN = r'shell:\n\1"touch {output} > {log} 2>&1"\n\n\n'
_WHOLE, _SAMPLE = 2000, 100  # larger graphs are not run to their end: so many of their jobs
_TICKS = os.sysconf("SC_CLK_TCK")
# Stages of one run, of a kind each, in an order in which they can run; the first two are of all runs.
_ONE_RUN = ["corpus_grammar@english", "base_model_trained@tiny", "generate_data@{run}", "pre_prune@{run}"]
_ONE_RUN += ["cache_gradients@{run}-0", "train@{run}-0"]


@dataclass(frozen=True)
class Cost:
    """What one command took: processor seconds of it and its children until its first job, and in all; peak memory."""

    first: float
    total: float
    wall: float
    peak_mb: float


def snakemake(stages: int, scheduler: str) -> dict[str, Any]:
    """Snakemake alone on so many stages: its own time to the first job and per job, of a run with nothing to do."""
    with _project(stages) as (folder, environment, count):
        snakefile = folder / "Snakefile"
        text, jobs = _SHELL.subn(_STAND_IN, snakefile.read_text("utf-8"))
        assert jobs == text.count("shell:"), "a rule without a command of one or more strings"
        snakefile.write_text(text, "utf-8")
        command = [_program("snakemake"), "--cores", "2", "--nocolor", "--scheduler", scheduler]
        sample = None if count < _WHOLE else _SAMPLE
        run = _measured(command, folder, environment, first="Job ", most=sample)
        if sample:  # it was killed
            shutil.rmtree(folder / ".snakemake")
        _done(folder, environment)
        again = _measured(command, folder, environment, first="Nothing to be done")
        prepare = _measured([sys.executable, "-c", "from pipeline.dag import prepare; prepare()"], folder, environment)
        sizes = {f"{name} MB": _megabytes(folder / name) for name in (".stages", ".snakemake")}
        return {
            "jobs": count,
            "first job": run.first,
            "per job": (run.total - run.first) / (sample or count),
            "wall per job": run.wall / (sample or count),
            "nothing to do": again.total,
            "prepare": prepare.total,
            "peak MB": run.peak_mb,
            **sizes,
        }


def cached(stages: int) -> dict[str, Any]:
    """`pipeline.cached` on stages of one run among so many: mean of running and of restoring, Python's start off."""
    with _project(stages) as (folder, environment, count):
        addresses = [address.format(run="feature_3") for address in _ONE_RUN]
        command = [sys.executable, "-m", "pipeline.cached"]
        run, restored = ([_measured([*command, a], folder, environment).total for a in addresses] for _ in range(2))
        stage = [sys.executable, "-m", "pipeline", "check_params"]
        python = sum(_measured(stage, folder, environment).total for _ in range(5)) / 5
        mean = sum(run) / len(run)
        return {"jobs": count, "runs": mean - python, "restores": sum(restored) / len(restored), "the stage": python}


def dvc(stages: int) -> dict[str, Any]:
    """`dvc repro` on so many stages that sleep for no time."""
    with _project(stages) as (folder, environment, count):
        run = _measured([_program("dvc"), "repro"], folder, environment, first="Running stage")
        again = _measured([_program("dvc"), "repro"], folder, environment)
        return {
            "jobs": count,
            "first job": run.first,
            "per job": (run.total - run.first) / count,
            "wall per job": run.wall / count,
            "nothing to do": again.total,
            "peak MB": run.peak_mb,
            "dvc.lock MB": (folder / "dvc.lock").stat().st_size / 1e6,
            ".dvc MB": _megabytes(folder / ".dvc"),
        }


PARTS = {
    "snakemake": lambda stages: snakemake(stages, "greedy"),
    "ilp": lambda stages: snakemake(stages, "ilp"),
    "cached": cached,
    "dvc": dvc,
}


@contextmanager
def _project(stages: int) -> Iterator[tuple[Path, dict[str, str], int]]:
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder, runs = Path(name, "project"), runs_for(stages)
        make(folder, runs)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # A short name for the shell: Snakemake runs one for each job, and bash reads more than sh when it starts.
        own = {"PATH": path, "SHELL": "/bin/sh", "DVC_SITE_CACHE_DIR": f"{name}/site", "XDG_CACHE_HOME": f"{name}/site"}
        yield folder, os.environ | own, stages_of(runs)


def _done(folder: Path, environment: Mapping[str, str]) -> None:
    """Write all outputs, and the receipts of `pipeline.cached` by which the next run knows that all is done."""
    script = (
        "from pathlib import Path\n"
        "from pipeline.dag import *\n"
        "with private_repo() as repo:\n"
        "    hashes = Hashes(repo)\n"
        "    stages = read_stages(repo, hashes)\n"
        "    outputs = sorted(path for stage in stages for path in stage.outputs)\n"
        "    for path in map(Path, outputs):\n"
        "        path.parent.mkdir(parents=True, exist_ok=True)\n"
        "        path.touch()\n"
        "    for stage in stages:\n"
        "        inputs = {path: hashes.file(path) for path in stage.inputs(outputs)}\n"
        "        write_receipt(stage, inputs, {path: hashes.file(path) for path in stage.outputs})\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=dict(environment), check=True)


def _measured(
    command: list[str],
    folder: Path,
    environment: Mapping[str, str],
    first: str | None = None,
    most: int | None = None,
) -> Cost:
    """Run a command to its end, or until it has finished `most` jobs."""
    start = time.perf_counter()
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=folder, env=dict(environment), stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    until_first, finished, said = 0.0, 0, []
    for line in process.stdout:
        said = [*said[-30:], line]
        if first is not None and not until_first and line.startswith(first):
            until_first = _processor_seconds(process.pid)
        finished += line.startswith("Finished jobid")
        if finished == most:
            break
    total, wall = _processor_seconds(process.pid), time.perf_counter() - start
    if finished == most:
        process.kill()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 and finished != most:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}\n{''.join(said)}")
    if finished != most:
        total, wall = usage.ru_utime + usage.ru_stime, time.perf_counter() - start
    return Cost(until_first, total, wall, usage.ru_maxrss / 1000)


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text("ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS  # user and system, its own and its children's


def _program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed beside {sys.executable}"
    return found


def _megabytes(folder: Path) -> float:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) / 1e6
