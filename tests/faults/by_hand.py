"""Stages run by hand, many times in a row: each in a process forked from one that has imported the stage already.

With `Hands(..., mounts=True)` they run in a mount namespace of their own, where disks can be small or read-only; what
lies on such a disk is seen below `root`, and all of it is gone with the process.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


class Done(NamedTuple):
    """How a program ended: its exit status (minus the signal that killed it) and all that it said."""

    status: int
    output: str


class Hands:
    """A process in a project's folder that runs stages and shell commands, one at a time.

    Args:
        folder: the project.
        stages: what is imported before forking: the one stage as its own program would, or all that are refused early.
        mounts: whether in a mount namespace.
    """

    def __init__(self, folder: Path, *stages: str, mounts: bool = False) -> None:
        command = [*(NAMESPACE if mounts else []), sys.executable, __file__, *stages]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        site = str(folder.with_name(f"{folder.name}-site"))
        environment |= {"DVC_SITE_CACHE_DIR": site, "XDG_CACHE_HOME": site}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.folder = folder
        """The project as the process sees it, small disks included."""
        if mounts:
            self.folder = Path(f"/proc/{self._process.pid}/root", *folder.absolute().parts[1:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def stage(self, arguments: Sequence[str], memory: int | None = None) -> Done:
        """Run `python -m pipeline ARGUMENTS`, with at most `memory` bytes more than what the imports have taken."""
        return self._ask({"stage": list(arguments), "memory": memory})

    def shell(self, command: str) -> Done:
        """Run a shell command."""
        return self._ask({"shell": command})

    def _ask(self, request: dict[str, Any]) -> Done:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(*json.loads(self._process.stdout.readline()))


def _serve() -> None:
    import importlib

    from pipeline.__main__ import _ENVIRONMENT

    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    for stage in sys.argv[1:]:
        importlib.import_module(f"pipeline.{stage}")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if not child:
                _become(request, said.fileno())
            _, status = os.waitpid(child, 0)
            said.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")]), flush=True)


def _become(request: dict[str, Any], output: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if "shell" in request:
        os.execvp("sh", ["sh", "-c", request["shell"]])
    if request["memory"] is not None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + request["memory"],) * 2)
    from pipeline.__main__ import main

    status = 1
    try:
        status = main(request["stage"])
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
