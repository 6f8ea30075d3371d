"""Event files for TensorBoard. What is written there changes no result, and is no result."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gradiend_core.errors import GradiendError


class TensorBoard:
    """The event files of one training: scalars by their step. Use as a context manager.

    Raises:
        GradiendError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, for an optional package
        except ImportError:
            raise GradiendError(
                'report_to: tensorboard is not installed. Run: python -m pip install --editable ".[tensorboard]"'
            ) from None
        self._folder = folder
        self._open: Any = SummaryWriter
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Go on with this step; what an earlier training wrote from there on is not shown."""
        self._writer = self._open(str(self._folder), purge_step=step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
