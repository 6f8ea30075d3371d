"""What an interrupted training continues from: safetensors files that are there whole or not at all."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from gradiend_core.durable import make_durable, open_alone
from gradiend_core.errors import GradiendError
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.tensors import load_tensors, read_metadata, save_tensors
from gradiend_core.training.tune import Tuned

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 2


@dataclass
class Progress:
    """How far a training has got.

    Attributes:
        step: steps done.
        best: the weights that are kept so far by their step, the best first.
        history: the evaluations.
        losses: of the steps since the last evaluation.
        tuned: the learning rates that were tried before, if any.
    """

    step: int = 0
    best: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tuned: Tuned | None = None


class Checkpoints:
    """The saves of one training, in a folder that goes when the block is left without an error.

    Use as a context manager. A save is written aside, made durable and renamed, so that a kill or a power cut at any
    moment leaves the one before it. Rows are not saved: their order follows from the seed.

    Args:
        folder: hidden, of this training alone.
        identity: JSON-able; everything that the result depends on. Saves of another identity are never continued.
        limit: saves kept, the newest ones.

    Raises:
        GradiendError: another process is training into the same folder, or the disk refuses.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, limit: int = 1) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._limit = limit

    def __enter__(self) -> Self:
        self._opened = open_alone(self.folder, "training this seed")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or not self.saves():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._opened)

    def saves(self) -> list[Path]:
        """The files, the newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def save(
        self, model: GradiendModel, optimizer: torch.optim.Optimizer, schedule: LRScheduler, progress: Progress
    ) -> None:
        """Make durable all that the next step depends on."""
        columns = list(progress.history[-1]) if progress.history else []
        lines = [[line[column] for column in columns] for line in progress.history]
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {
            f"best.{step}.{name}": tensor for step, kept in progress.best.items() for name, tensor in kept.items()
        }
        tensors |= {
            f"optimizer.{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        tensors["history"] = torch.tensor(lines, dtype=torch.float64)
        tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
        metadata = {
            "format_version": FORMAT_VERSION,
            "identity": self._identity,
            "step": progress.step,
            "best_steps": list(progress.best),
            "columns": columns,
            "schedule": schedule.state_dict(),
            "tuned": progress.tuned and progress.tuned.to_json(),
        }
        final = self.folder / f"step-{progress.step:012}.safetensors"
        aside = self.folder / "writing"
        try:
            save_tensors(aside, tensors, metadata)
            make_durable(aside)
            aside.replace(final)
            os.fsync(self._opened)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise GradiendError(f"{self.folder}: cannot be written ({reason}). Check free space there.") from None
        for old in self.saves()[self._limit :]:
            old.unlink()

    def restore(self, model: GradiendModel, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> Progress | None:
        """Put model, optimiser and schedule back to the newest usable save; None when there is none, with all as is."""
        for file in self.saves():
            try:
                found = _read(file, self._identity, model)
            except (GradiendError, KeyError, ValueError, TypeError) as error:
                logger.info("%s: not continued (%s)", file, error)
                file.unlink()
                continue
            metadata, tensors = found
            model.load_state_dict(_below("model.", tensors))
            for name, parameter in model.named_parameters():
                state = _below(f"optimizer.{name}.", tensors)
                if state:
                    optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
            schedule.load_state_dict(metadata["schedule"])
            for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
            lines = [dict(zip(metadata["columns"], line, strict=True)) for line in tensors["history"].tolist()]
            logger.info("continued after step %d", metadata["step"])
            device = model.encoder.weight.device
            return Progress(
                metadata["step"],
                {
                    step: {name: value.to(device) for name, value in _below(f"best.{step}.", tensors).items()}
                    for step in metadata["best_steps"]
                },
                [line | {"step": int(line["step"])} for line in lines],
                tensors["losses"].tolist(),
                metadata["tuned"] and Tuned.from_json(metadata["tuned"]),
            )
        return None


def _read(file: Path, identity: Any, model: GradiendModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a save, copied from the file; raises when it is damaged or of another training."""
    metadata = read_metadata(file)
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {metadata['format_version']}")
    if metadata["identity"] != identity:
        mine, other = identity, metadata["identity"]
        keys = sorted(key for key in {*mine, *other} if mine.get(key) != other.get(key))
        raise ValueError(f"it was made with another {', '.join(keys)}")
    tensors = {name: tensor.clone() for name, tensor in load_tensors(file).items()}
    shapes = {f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensors[name].shape for name in shapes} != shapes:
        raise ValueError("it is of a model of another size")
    return metadata, tensors


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
