"""What files need that outlive a kill: one writer at a time, and names and bytes that are on the disk."""

import fcntl
import logging
import os
from pathlib import Path

from gradiend_core.errors import GradiendError

logger = logging.getLogger(__name__)


def lock_alone(opened: int, path: Path, work: str) -> None:
    """Lock an open file or folder until it is closed, however its process ends; without a word where no locks exist.

    Raises:
        GradiendError: another process holds the lock; `work` says what it does, e.g. "training this seed".
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise GradiendError(f"{path}: another process is {work}. Wait until it is done, or end it.") from None
    except OSError as error:
        logger.debug("%s: no lock on this file system (%s)", path, error.strerror)


def open_alone(folder: Path, work: str) -> int:
    """Make a folder if it is missing, open it and lock it; see `lock_alone`."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        lock_alone(opened, folder, work)
    except GradiendError:
        os.close(opened)
        raise
    return opened


def make_durable(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
