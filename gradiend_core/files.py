"""Small files: content hashes, canonical JSON, and text that is there whole or not at all."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final

from gradiend_core.errors import GradiendError

MAX_JSON_BYTES: Final = 2**26
"""A hundred times what a stage writes; parsed, a document takes up to ten times its bytes of memory."""


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises `GradiendError` when it cannot be read."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading it might never end
        raise GradiendError(f"{path}: a device, pipe or socket. Only files are read: correct its path.")
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise GradiendError(f"{path}: cannot be read ({error.strerror}). Make it first, or correct its path.") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys and a final newline; NaN and infinity are refused (not JSON)."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a text file aside and rename it, its folder made when missing. Raises `GradiendError` when it cannot be."""
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, "utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        reason = f"{path}: cannot be written ({error.strerror}). Check free space and permissions there."
        raise GradiendError(reason) from None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `GradiendError` naming the file when it is missing, damaged or too large."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise damaged(path, f"{size} bytes of JSON, at most {MAX_JSON_BYTES} are read")
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise GradiendError(f"{path}: cannot be read ({error.strerror}). Run the stage that makes it first.") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({error})") from None


def damaged(path: Path, why: str) -> GradiendError:
    """The error for a file whose content is not what its name promises."""
    return GradiendError(f"{path}: damaged: {why}. Delete it and run the stage that makes it again.")
