"""DVC's cache by content: DVC itself takes a read-only object for whole, and puts a damaged one in place."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.schema import COMPILED_LOCK_FILE_STAGE_SCHEMA
from dvc.stage.cache import StageCache, _get_cache_hash
from dvc.utils.serialize import load_yaml
from voluptuous import Invalid

from gradiend_core.errors import GradiendError


def md5_file(path: Path | str) -> str:
    """The MD5 of a file's bytes, always read: DVC's table of known hashes may be wrong about a damaged file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def whole(path: Path | str, md5: str) -> bool:
    """Whether an object is there and is what its name says; a damaged one is removed, with a line that says so.

    Raises `GradiendError` when a damaged one cannot be removed, `OSError` when one may not be read: that of another
    user in a shared cache is not damaged.
    """
    try:
        found = md5_file(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return _removed(Path(path), f"cannot be read ({error.strerror})")
    return found == md5.partition(".")[0] or _removed(Path(path), "its content is not what its name says")


def restorable(output: Output) -> bool:
    """Whether an output is in place as it should be, or can be put there from a whole object of the cache."""
    path, md5 = Path(output.fs_path), output.hash_info.value
    if path.is_file() and not path.is_symlink():
        if md5_file(path) == md5:
            return True
        os.utime(path)  # DVC reads a file again only when its size, inode or time has changed
    return whole(output.cache.oid_to_path(md5), md5)


def whole_entry(path: Path) -> bool:
    """Whether an entry of the run-cache is what its name and its folder's name say; a damaged one is removed."""
    try:
        entry = COMPILED_LOCK_FILE_STAGE_SCHEMA(load_yaml(path))
        names = _get_cache_hash(entry), _get_cache_hash(entry, key=True)  # the second changes the entry
    except (DvcException, Invalid, ValueError, RecursionError):
        return _removed(path, "not an entry of the run-cache")
    return names == (path.name, path.parent.name) or _removed(path, "its content is not what its name says")


def drop_damaged_entries(cache: StageCache, key: str) -> None:
    """Remove what is damaged among the entries for a stage with its present inputs (`key`)."""
    folder = Path(cache._get_cache_dir(key))
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        whole_entry(path)
    drop_empty(folder)


def drop_empty(folder: Path) -> None:
    """Remove a folder of the run-cache in which nothing is left: DVC cannot read it."""
    with suppress(OSError):
        folder.rmdir()


def drop_damaged_objects(outputs: list[Output]) -> None:
    """Remove damaged objects under the names of these outputs, which DVC would otherwise leave as they are."""
    for output in outputs:
        whole(output.cache.oid_to_path(output.hash_info.value), output.hash_info.value)


def _removed(path: Path, why: str) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise GradiendError(
            f"{path}: damaged: {why}; it cannot be removed ({error.strerror}). Remove it, or ask its owner to."
        ) from None
    print(f"{path}: damaged: {why}. Removed from the cache.", flush=True)
    return False
