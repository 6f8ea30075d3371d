"""One engine at a time in a folder: Snakemake waits for its turn, and `dvc repro` refuses to start while it has it.

Snakemake's own lock outlives a Snakemake that was killed; this one does not, so that the same command always goes on.
"""

import atexit
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.rwlock import RWLOCK_FILE, RWLockFileCorruptedError, rwlock

from pipeline.locks import Lock

_LOCK = Path(".stages/engine.lock")
_SECONDS_BETWEEN_TRIES = 1


def take_turn(say: Callable[[str], None]) -> None:
    """Wait until no other engine is at work in this folder, then keep them out until this process ends.

    `say` gets one line for each that has to be waited for. Snakemakes on several hosts see each other where the file
    system has locks; DVC is seen on the same host only.
    """
    _wait_for_snakemake(say)
    _wait_for_dvc(say)


def _wait_for_snakemake(say: Callable[[str], None]) -> None:
    lock = Lock(_LOCK)  # never closed: held until this process ends, however it ends
    try:
        if not lock.take(wait=False):
            say("Another Snakemake is at work in this folder: waiting for its end.")
            lock.take(wait=True)
    except OSError as error:
        say(f"No locks on this file system ({error.strerror}): make sure that nothing else runs in this folder.")


def _wait_for_dvc(say: Callable[[str], None]) -> None:
    repo = Repo(config={"core": {"no_scm": True}})
    told = False
    while True:
        try:
            # DVC lets go of the first lock while a stage's program runs, and then holds the second one for its files.
            with lock_repo(repo):
                _keep_dvc_out(repo, say)
            return
        except LockError as error:
            if not told:
                say(f"DVC is at work in this folder: waiting for its end. {error}")
            told = True
            time.sleep(_SECONDS_BETWEEN_TRIES)


def _keep_dvc_out(repo: Repo, say: Callable[[str], None]) -> None:
    command, artifacts = " ".join(sys.argv), str(Path("artifacts").absolute())
    hardlink = repo.config["core"].get("hardlink_lock", False)
    with ExitStack() as held:
        try:
            held.enter_context(rwlock(repo.tmp_dir, repo.fs, command, [], [artifacts], hardlink))
        except RWLockFileCorruptedError:
            # It is written in place: somebody was killed meanwhile, and no DVC could read it any more.
            Path(repo.tmp_dir, RWLOCK_FILE).unlink()
            say("DVC's file of locks was cut off by a kill: removed.")
            held.enter_context(rwlock(repo.tmp_dir, repo.fs, command, [], [artifacts], hardlink))
        atexit.register(held.pop_all().close)
