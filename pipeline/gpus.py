"""Which of this machine's GPUs a stage may use: every job gets its own, or waits for it.

Snakemake counts GPUs (`--resources gpu=2`) but gives no job a device. Here a job locks one file per device, in the
machine's folder for temporary files, so that all pipelines of a user on one machine share its GPUs.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import takewhile
from pathlib import Path
from urllib.parse import quote

from gradiend_core.errors import GradiendError
from pipeline.locks import Lock

VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS_BETWEEN_TRIES = 0.2


@contextmanager
def taken(count: int | None, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """What to add to a stage's environment so that it sees `count` GPUs that no other job has; for 0 it sees none.

    Nothing is added for None, where a cluster's scheduler has given the job its GPUs (the Snakefile then sets
    GRADIEND_GPUS_GIVEN), and on a machine without GPUs, where everything is computed on the CPU. Waits until
    enough are free. Raises `GradiendError` when there are fewer than `count` in all.
    """
    if count == 0:
        yield {VISIBLE: ""}
        return
    if count is None or environment.get("GRADIEND_GPUS_GIVEN") or not (devices := _devices(environment)):
        yield {}
        return
    if len(devices) < count:
        raise GradiendError(
            f"{count} GPUs asked for by the stage's rule (resource gpu), {len(devices)} on this machine: "
            f"{', '.join(devices)}. Give it fewer, e.g. `set-resources` in a profile (profiles/README.md)."
        )
    with ExitStack() as held:
        yield {VISIBLE: ",".join(_wait_for(count, devices, held))}


def _devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The names of this machine's GPUs: those in CUDA_VISIBLE_DEVICES when it is set, else all."""
    if VISIBLE in environment:
        names = (name.strip() for name in environment[VISIBLE].split(","))
        return tuple(takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA reads it
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(listed.stdout.split())


def _wait_for(count: int, devices: tuple[str, ...], held: ExitStack) -> list[str]:
    folder = Path(tempfile.gettempdir(), f"gradiend-gpus-{os.getuid()}")
    while True:
        # All or none: two jobs that keep one device each, and wait for a second, would wait for ever.
        with ExitStack() as attempt:
            free = []
            for device in devices:
                lock = attempt.enter_context(closing(Lock(folder / f"{quote(device, safe='')}.lock")))
                if lock.take(wait=False):
                    free.append(device)
                if len(free) == count:
                    held.push(attempt.pop_all())
                    return free
        time.sleep(_SECONDS_BETWEEN_TRIES)
