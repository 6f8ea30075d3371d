"""Files pinned by content: a selection names the very model and data it was made for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradiend_core.errors import GradiendError
from gradiend_core.files import sha256_file


def pin(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """The folder and the SHA-256 of the named files in it, JSON-able."""
    return {"path": folder.as_posix(), "files": {name: sha256_file(folder / name) for name in files}}


def pinned_folder(pinned: dict[str, Any]) -> Path:
    """The folder of a pin, once its files are known to be the pinned ones; raises `GradiendError` otherwise."""
    folder = Path(pinned["path"])
    for name, digest in pinned["files"].items():
        if sha256_file(folder / name) != digest:
            raise GradiendError(
                f"{folder / name}: not the file that the selection was made for. Run pre_prune again for this run."
            )
    return folder
