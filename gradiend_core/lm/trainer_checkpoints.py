"""Checkpoints of `transformers.Trainer` that are there whole or not at all."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from gradiend_core.durable import make_durable, open_alone
from gradiend_core.errors import GradiendError
from gradiend_core.files import read_json, write_json

logger = logging.getLogger(__name__)

# Written last and removed first: a checkpoint without it was interrupted.
_COMPLETE: Final = "complete.json"


class TrainerCheckpoints:
    """The checkpoints of one training, in a folder that goes when the block is left without an error.

    Use as a context manager in the process that starts the training; others only save. The files are those of
    transformers, which loads them with `weights_only`, that is without executing anything.

    Args:
        folder: hidden, of this training alone.
        identity: JSON-able; everything that the result depends on. Checkpoints of another identity are never continued.

    Raises:
        GradiendError: another process is training into the same folder, or the disk refuses.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))

    def __enter__(self) -> Self:
        self._opened = open_alone(self.folder, "training this model")
        self._remove_unusable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or self.latest() is None:
            self._remove()
        os.close(self._opened)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = [path.parent for path in self.folder.glob(f"checkpoint-*/{_COMPLETE}")]
        return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def complete(self, checkpoint: Path) -> None:
        """Make a checkpoint durable and say that it is whole."""
        aside = checkpoint / f".partial-{_COMPLETE}"
        try:
            write_json(aside, self._identity)
            for path in [*checkpoint.iterdir(), checkpoint]:
                make_durable(path)
            aside.replace(checkpoint / _COMPLETE)
            make_durable(checkpoint)
            make_durable(self.folder)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise GradiendError(f"{self.folder}: cannot be written ({reason}). Check free space there.") from None

    def _remove(self) -> None:
        # First of all what says that they are whole: a kill in the middle must not leave a part that is continued.
        for path in self.folder.glob(f"checkpoint-*/{_COMPLETE}"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_unusable(self) -> None:
        for path in self.folder.glob("checkpoint-*"):
            reason = self._unusable(path / _COMPLETE)
            if reason:
                logger.info("%s: not continued (%s)", path, reason)
                shutil.rmtree(path)

    def _unusable(self, file: Path) -> str | None:
        if not file.is_file():
            return "it is not complete"
        try:
            other = read_json(file)
        except GradiendError as error:
            return str(error)
        keys = sorted(key for key in {*self._identity, *other} if self._identity.get(key) != other.get(key))
        return f"it was made with another {', '.join(keys)}" if keys else None
