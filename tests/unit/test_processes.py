"""Processes that train together end with the one that started them, however it ends."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from gradiend_core.lm.processes import run_processes

def work(folder):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in a wait outside Python
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    run_processes(work, sys.argv[1], 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent has ended")
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program, seen = tmp_path / "program.py", tmp_path / "seen"
    program.write_text(PROGRAM)
    seen.mkdir()
    parent = subprocess.Popen([sys.executable, str(program), str(seen)], stderr=subprocess.DEVNULL)
    await_that(lambda: len(list(seen.iterdir())) == 2, 120)
    parent.kill()
    parent.wait()
    await_that(lambda: not any(alive(int(file.name)) for file in seen.iterdir()), 20)


def test_a_process_whose_parent_has_ended_before_it_began_ends() -> None:
    code = "import os; from gradiend_core.lm.processes import _end_with; _end_with(os.getppid() + 1); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "has ended" in done.stderr


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def await_that(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
