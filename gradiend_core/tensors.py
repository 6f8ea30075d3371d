"""Safetensors files with one JSON document as their metadata."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradiend_core.errors import GradiendError
from gradiend_core.files import damaged

# The order of several metadata keys is random per process, so everything goes under one key.
METADATA_KEY = "gradiend"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors (moved to the CPU, made contiguous) and a JSON-able `metadata` with byte-stable output.

    Raises `OSError` when the disk refuses.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    try:
        save_file(plain, path, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)})
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise OSError(errno.EIO, str(error), str(path)) from error


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file written by `save_tensors`, without reading the tensors."""
    with open_tensors(path) as file:
        try:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})[METADATA_KEY])
        except (KeyError, ValueError):
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
        raise damaged(path, f"not readable as safetensors ({error})") from None
