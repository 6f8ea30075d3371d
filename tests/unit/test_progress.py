"""A loop shows how far it got, and what the caller says of it."""

import itertools
import logging
from types import SimpleNamespace

import pytest

from gradiend_core import progress
from gradiend_core.progress import track


class Terminal:
    """A stream that says it is a terminal and remembers what was written."""

    def __init__(self) -> None:
        self.written = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None: ...


def test_bar_on_a_terminal_ends_with_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    done: list[int] = []
    monkeypatch.setattr("sys.stderr", terminal)
    for item in track(range(5), "steps", lambda: f"loss {done[-1]}"):
        done.append(item)
    assert done == [0, 1, 2, 3, 4]
    assert "steps: 100%" in terminal.written
    assert terminal.written.rstrip().endswith("loss 4]")


def test_lines_elsewhere_say_the_status(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = itertools.count(step=20)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with caplog.at_level(logging.INFO):
        done: list[int] = []
        for item in track(range(3), "steps", lambda: f"loss {done[-1]}" if done else "nothing yet"):
            done.append(item)
        list(track(range(2), "plain"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("steps: 1 of 3, about ")
    assert lines[0].endswith(" s left, loss 0")
    assert lines[-1].endswith(" s left")
