"""Safetensors files with one JSON document as their metadata."""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradiend_core.errors import GradiendError, out_of_memory
from gradiend_core.files import damaged

# The order of several metadata keys is random per process, so everything goes under one key.
METADATA_KEY = "gradiend"

# What safetensors calls the dtypes that `layout` may meet.
_DTYPE_NAMES: Final = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16"}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors (moved to the CPU, made contiguous) and a JSON-able `metadata` with byte-stable output.

    Raises `OSError` when the disk refuses.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    with disk_errors(path):
        save_file(plain, path, metadata=_document(metadata))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Have a disk that refuses `path` raise an `OSError` that names a file, also where a library hides it in a text."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:  # safetensors has one of its own, tokenizers a bare Exception, torch.save RuntimeError
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None and "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def layout(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file that `save_tensors` would write, and where each tensor's bytes start in it.

    For files written piece by piece; of the tensors only dtype and shape count, so they may be on the meta device.
    The returned names are in file order: wide dtypes first, equal ones by name.
    """
    entries: dict[str, Any] = {"__metadata__": _document(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        tensor, start, end = tensors[name], end, end + tensors[name].nbytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8 bytes
    first = len(header).to_bytes(8, "little") + header
    return first, {name: len(first) + entries[name]["data_offsets"][0] for name in entries if name in tensors}


def consecutive(positions: torch.Tensor) -> Iterator[slice]:
    """The longest slices of `positions` [m] (int64) in which each is the one before plus one, in order."""
    breaks = (positions.diff() != 1).nonzero()[:, 0] + 1
    for start, stop in pairwise([0, *breaks.tolist(), len(positions)]):
        if start < stop:
            yield slice(start, stop)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file written by `save_tensors`, without reading the tensors."""
    with open_tensors(path) as file:
        try:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})[METADATA_KEY])
        except (KeyError, ValueError, RecursionError):
            raise damaged(path, f"its header has no {METADATA_KEY!r} metadata") from None
    return metadata


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, memory-mapped on the CPU."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def open_tensors(path: Path) -> Any:
    """`safetensors.safe_open` on the CPU; a missing or damaged file raises `GradiendError` naming it."""
    if not path.is_file():
        raise GradiendError(f"{path}: no such file. Run the stage that makes it first.")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if out_of_memory(error):
            raise
        raise damaged(path, f"not readable as safetensors ({error})") from None


def _document(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {METADATA_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
