"""An engine in a session of its own, whose processes can be found by what they do, and killed."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from project import Project

_LONGEST_RUN = 600.0
_SHELLS = ("/bin/sh", "sh", "bash", "/bin/bash", "/usr/bin/bash")


class Session:
    """A command of an engine that has been started in a project.

    Roles: `engine` is the process that was started, `all` the whole session, `cached` is pipeline.cached, `stage` the
    stage program and `child` one of those that train together.
    """

    def __init__(self, project: Project, command: Sequence[str]) -> None:
        # One for each session: an orphan of an earlier one may still write to its own.
        self._log = project.folder / f"engine-{len(list(project.folder.glob('engine-*.log')))}.log"
        with self._log.open("w") as log:
            self._engine = project.start(*command, output=log)

    def output(self) -> str:
        """All that the engine has said."""
        return self._log.read_text(errors="replace")

    def running(self) -> bool:
        """Whether the engine is."""
        return self._engine.poll() is None

    def wait(self) -> int:
        """The engine's exit status, minus the signal that ended it."""
        return self._engine.wait(_LONGEST_RUN)

    def find(self, role: str) -> int | None:
        """The process of a role; None when it is not there yet, or not any more."""
        if role in {"engine", "all"}:
            return self._engine.pid if self.running() else None
        return max((pid for pid, command in self._processes() if _plays(role, command)), default=None)

    def kill(self, role: str) -> bool:
        """SIGKILL; whether a process of this role was there."""
        pid = self.find(role)
        if pid is not None:
            os.killpg(pid, signal.SIGKILL) if role == "all" else os.kill(pid, signal.SIGKILL)
        return pid is not None

    def orphans(self) -> int:
        """How many processes live on without their engine."""
        return 0 if self.running() else len(self._processes())

    def end(self) -> None:
        """Leave no process behind."""
        for pid, _ in self._processes():
            os.kill(pid, signal.SIGKILL)
        self._engine.wait()

    def _processes(self) -> list[tuple[int, list[str]]]:
        """Number and command line of the session's processes that are alive."""
        found = []
        for folder in os.listdir("/proc"):
            if folder.isdecimal():
                with contextlib.suppress(OSError):  # it has just ended
                    state, _, _, session = Path("/proc", folder, "stat").read_text().rpartition(") ")[2].split()[:4]
                    if int(session) == self._engine.pid and state not in "ZX":
                        command = Path("/proc", folder, "cmdline").read_bytes().decode(errors="replace")
                        found.append((int(folder), command.split("\0")))
        return found


def await_condition(condition: Callable[[], bool], session: Session, seconds_between_looks: float) -> None:
    """Until the condition holds, or the engine has ended."""
    while session.running() and not condition():
        time.sleep(seconds_between_looks)


def _plays(role: str, command: list[str]) -> bool:
    words = " ".join(command)
    if role == "child":
        return "spawn_main" in words and "multiprocessing" in words
    program = " -m pipeline.cached " if role == "cached" else " -m pipeline "
    return program in words and command[0] not in _SHELLS
