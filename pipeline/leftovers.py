"""What a killed stage program leaves: files it was writing aside, which the next one that makes them removes."""

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from pipeline.locks import Lock

logger = logging.getLogger(__name__)

_LOCKS = Path(".stages")


@contextmanager
def alone(manifest: Path) -> Iterator[bool]:
    """Wait until no other process makes the outputs of this manifest, e.g. one whose engine was killed.

    Whether that is certain: not on a file system without locks.
    """
    try:
        lock = Lock(_LOCKS / f"{quote(manifest.as_posix(), safe='')}.lock")
    except OSError:  # a folder that cannot be written: the outputs say so themselves
        yield False
        return
    with closing(lock):
        try:
            if not lock.take(wait=False):
                logger.warning("%s: waiting for another process that makes it", manifest)
                lock.take(wait=True)
            held = True
        except OSError:
            held = False
        yield held


def remove_asides(finals: Iterable[Path]) -> None:
    """Remove what stands aside for these files and folders, whoever wrote it; what is resumed stays.

    Only for the one process that makes them, see `alone`.
    """
    for final in finals:
        for aside in final.parent.glob(".partial-*"):
            number = aside.name.removeprefix(".partial-").removesuffix(f"-{final.name}")
            if number.isdecimal():
                _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
