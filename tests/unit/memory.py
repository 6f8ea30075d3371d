"""How much memory a piece of code needs: the resident set at its peak, as Linux counts it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PROCESS = Path("/proc/self")


def _can_be_reset() -> bool:
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


needs_peak_memory = pytest.mark.skipif(not _can_be_reset(), reason="needs Linux, whose peak of memory can be reset")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Call what it gives after the block: bytes of memory at the peak of the block beyond those at its start."""
    before = _bytes("VmRSS")
    (_PROCESS / "clear_refs").write_text("5")  # the peak is now what is resident
    peak: list[int] = []
    yield lambda: peak[0] - before
    peak.append(_bytes("VmHWM"))


def _bytes(name: str) -> int:
    lines = (_PROCESS / "status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
