"""Where to compute, and how reproducibly."""

import torch


def pick_device() -> torch.device:
    """The first CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """A name for manifests: results are byte-identical only on the same kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def use_deterministic_algorithms() -> None:
    """Refuse operations whose result depends on timing."""
    torch.use_deterministic_algorithms(True)
