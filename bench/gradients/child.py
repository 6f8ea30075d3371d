"""Python processes of their own (threads, wait policy, packages), asked and answering in lines of JSON."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]

# Waiting threads sleep instead of spinning (OpenMP reads this when a process starts); no GPU, no network.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


class Child:
    """`python -m <module>` in the repository, answering what `serve` there does with each request.

    An environment value of None removes the variable.
    """

    def __init__(
        self, module: str, *, python: str = sys.executable, environment: Mapping[str, str | None] | None = None
    ) -> None:
        settings = {**os.environ, **QUIET, **(environment or {})}
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env={key: value for key, value in settings.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def ask(self, **request: Any) -> Any:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: the missing answer says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a benchmark process ended with status {self._process.wait()}; its error is above")
        return json.loads(line)


def serve(answer: Callable[..., Any]) -> None:
    """Answer every request on standard input by `answer(**request)`; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)
