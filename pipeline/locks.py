"""Locks that a job and the programs it starts hold together: free when the last of them has ended, however it ended."""

import fcntl
import os
from pathlib import Path


class Lock:
    """An exclusive lock on a file, which is made when it is missing and stays."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # A program started with open files holds the lock on when its parent is killed.
        os.set_inheritable(self._file, True)

    def take(self, *, wait: bool) -> bool:
        """Whether the lock is held now; with `wait` it always is. `OSError` where the file system has no locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Hold it no longer; programs that were started with it still do."""
        os.close(self._file)
