"""Where to compute, and how reproducibly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

# A model that takes more of a GPU's free memory than this leaves no room for activations and rows.
_SHARE_OF_MEMORY = 0.6


def pick_device() -> torch.device:
    """The first CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place_model(weights: Path) -> torch.device | Literal["auto"]:
    """Where a model with this weights file goes: the usual device, or "auto" when it is too large for the first GPU.

    The file's size is taken for the model's.
    """
    device = pick_device()
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        free, _ = torch.cuda.mem_get_info(device)
        if weights.stat().st_size > _SHARE_OF_MEMORY * free:
            return "auto"
    return device


def describe_device(device: torch.device) -> str:
    """A name for manifests: results are byte-identical only on the same kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def use_deterministic_algorithms() -> None:
    """Refuse operations whose result depends on timing."""
    # As torch.use_deterministic_algorithms(True), which would import the compiler first: 1.5 s in every stage.
    torch.set_deterministic_debug_mode("error")
    # Otherwise every new tensor is filled with NaN first, which shows reads of what was never written, at a price.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices as `torch.set_float32_matmul_precision` has it, inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
