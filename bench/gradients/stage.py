"""The gradient stage of the demo from end to end (part `stage`)."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.gradients.child import ROOT
from bench.gradients.report import Line
from bench.gradients.timing import interleave, spread
from gradiend_core.gradients.store import GradientStore

RUN = "pronoun_number"
SELECTION = ROOT / "artifacts" / "runs" / RUN / "selection.safetensors"
ROUNDS = 3


def run() -> Iterator[list[Line]]:
    """Wall time of the stage's command as the engines run it, start of Python and all, with one thread."""
    if not SELECTION.exists():
        print(f"{SELECTION.relative_to(ROOT)} is not there: left out; `make run` makes it")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipeline", "cache_gradients", "--params", f"runs.{RUN}.cache_gradients"]
        command += ["--shards", "gradient_shards", "--shard", "0", "--selection", str(SELECTION.relative_to(ROOT))]
        command += ["--output", f"{folder}/gradients", "--manifest", f"{folder}/manifest.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}

        def stage() -> None:
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)

        seconds = interleave({"stage": stage}, ROUNDS)["stage"]
        store = GradientStore.open(Path(folder) / "gradients")
        size = f"{len(store.index)} rows of {store.n} entries"
    yield [Line(f"cache_gradients of {RUN}, {size}", "s", spread(seconds))]
