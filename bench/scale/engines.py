"""What the engines add to each job: a graph of any size, run to its end with jobs that compute nothing.

Three parts, because they grow differently: Snakemake itself (its jobs only touch their outputs), `pipeline.cached` on
some stages of one run, and `dvc repro`. Processor seconds, which other programs change less than the time on the clock.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.scale.project import make
from bench.scale.study import runs_for, stages_of

_SHELL = re.compile(r'shell:\n( +)(?:"[^"\n]*"\s*)+')
_STAND_IN = r'shell:\n\1"touch {output} > {log} 2>&1"\n\n\n'
_WHOLE = 200  # `dvc repro` does not run larger graphs to their end
_TICKS = os.sysconf("SC_CLK_TCK")
# Stages of one run, of a kind each, in an order in which they can run; the first two are of all runs.
_ONE_RUN = ["corpus_grammar@english", "base_model_trained@tiny", "generate_data@{run}", "pre_prune@{run}"]
_ONE_RUN += ["cache_gradients@{run}-0", "train@{run}-0"]
# The stage that all others depend on.
_CHECK = [sys.executable, "-m", "pipeline", "check_params", "--output", "artifacts/params_checked.txt"]


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
        run = _measured(command, folder, environment, first="Job ")
        _done(folder, environment)
        again = _measured(command, folder, environment, first="Nothing to be done")
        prepare = _measured([sys.executable, "-c", "from pipeline.dag import prepare; prepare()"], folder, environment)
        sizes = {f"{name} MB": _megabytes(folder / name) for name in (".stages", ".snakemake")}
        return {
            "jobs": count,
            "first job": run.first,
            "per job": (run.total - run.first) / count,
            "wall per job": run.wall / count,
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
        python = sum(_measured(_CHECK, folder, environment).total for _ in range(5)) / 5
        mean = sum(run) / len(run)
        return {"jobs": count, "runs": mean - python, "restores": sum(restored) / len(restored), "the stage": python}


def dvc(stages: int) -> dict[str, Any]:
    """`dvc repro` on so many stages that sleep for no time; of a large graph, one stage when all are in dvc.lock."""
    with _project(stages) as (folder, environment, count):
        command = [_program("dvc"), "repro"]
        if count > _WHOLE:
            (folder / "dvc.lock").write_text(_whole_lock(runs_for(stages)), "utf-8")
            last = _measured([*command, "--single-item", "--force", _ONE_RUN[0]], folder, environment)
            return {"jobs": count, "one stage": last.total, "peak MB": last.peak_mb, **_dvc_sizes(folder)}
        run = _measured(command, folder, environment, first="Running stage")
        again = _measured(command, folder, environment)
        last = _measured([*command, "--single-item", "--force", _ONE_RUN[0]], folder, environment)
        return {
            "jobs": count,
            "first job": run.first,
            "per job": (run.total - run.first) / count,
            "one stage": last.total,
            "wall per job": run.wall / count,
            "nothing to do": again.total,
            "peak MB": run.peak_mb,
            **_dvc_sizes(folder),
        }


def _dvc_sizes(folder: Path) -> dict[str, float]:
    return {"dvc.lock MB": (folder / "dvc.lock").stat().st_size / 1e6, ".dvc MB": _megabytes(folder / ".dvc")}


def _whole_lock(runs: int) -> str:
    """The dvc.lock of so many runs, with the entries of a project that was run to its end for each."""
    with _project(stages_of(1)) as (folder, environment, _):
        _measured([_program("dvc"), "repro"], folder, environment)
        lock = yaml.safe_load((folder / "dvc.lock").read_text("utf-8"))
    of_run = {name: entry for name, entry in lock["stages"].items() if "feature_0" in name}
    for run in range(1, runs):
        lock["stages"] |= json.loads(json.dumps(of_run).replace("feature_0", f"feature_{run}"))
    return yaml.dump(lock, Dumper=yaml.CSafeDumper, sort_keys=False)


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
        subprocess.run(_CHECK, cwd=folder, env=os.environ | own, check=True)
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


def _measured(command: list[str], folder: Path, environment: Mapping[str, str], first: str | None = None) -> Cost:
    """Run a command to its end; its first job is when a line begins with `first`."""
    start = time.perf_counter()
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=folder, env=dict(environment), stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    until_first, said = 0.0, deque[str](maxlen=30)
    for line in process.stdout:
        said.append(line)
        if first is not None and not until_first and line.startswith(first):
            until_first = _processor_seconds(process.pid)
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}\n{''.join(said)}")
    wall = time.perf_counter() - start
    return Cost(until_first, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1000)


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text("ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS  # user and system, its own and its children's


def _program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed beside {sys.executable}"
    return found


def _megabytes(folder: Path) -> float:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) / 1e6
