"""Processes that train together end with the one that started them, however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import signal, sys, time
from gradiend_core.lm.processes import run_processes

def work(seconds):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in a wait outside Python
    print("working", flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    run_processes(work, 90, 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent has ended")
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == ["working\n"] * 2
        parent.kill()
        parent.communicate(timeout=20)  # until nobody can write to it any more


def test_a_process_whose_parent_has_ended_before_it_began_ends() -> None:
    code = "import os; from gradiend_core.lm.processes import _end_with; _end_with(os.getppid() + 1); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "has ended" in done.stderr
