"""A stage ends when the `dvc repro` that has started it is killed; one that was started by hand goes on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The parent's only child reads its parameters from a pipe, so that the test says when it may go on.
_PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-m", "pipeline", "check_params", sys.argv[1]]).wait()
"""


def open_for_writing(pipe: Path) -> int:
    """Open a pipe as soon as somebody reads from it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
@pytest.mark.parametrize(("variables", "goes_on"), [({"DVC_STAGE": "check_params"}, False), ({}, True)])
def test_a_stage_ends_with_the_dvc_that_started_it(tmp_path: Path, variables: dict[str, str], goes_on: bool) -> None:
    pipe = tmp_path / "params.yaml"
    os.mkfifo(pipe)
    environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"} | variables
    command = [sys.executable, "-c", _PARENT, str(pipe)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as parent:
        writer = open_for_writing(pipe)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        with suppress(BrokenPipeError):  # it has ended already
            os.write(writer, b"no_such_key: 1")
        os.close(writer)
        said, _ = parent.communicate(timeout=60)  # until the child has ended, too
    assert ("no_such_key" in said) == goes_on
