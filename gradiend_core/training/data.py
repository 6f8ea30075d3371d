"""What a training reads, loaded once, however often it is trained on."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradiend_core.config.train import Train
from gradiend_core.devices import pick_device
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.training.batches import Positions
from gradiend_core.training.evaluation import Validation
from gradiend_core.training.rows import RowSet

_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Data:
    """Rows of a store on the device, for one seed.

    Attributes:
        positions: of the training rows in the store [N].
        groups: for each transition where among the training rows its own stand.
        neutral: factual gradients of the neutral rows [M, n], whatever the source (semantics 7.1).
        source_scale, target_scale: what the model divides gradients by.
    """

    positions: Tensor
    groups: dict[str, Positions]
    training: RowSet
    validation: Validation
    neutral: Tensor
    source_scale: float
    target_scale: float

    @classmethod
    def load(cls, store: GradientStore, params: Train, seed: int) -> "Data":
        """Load what `params` asks for; raises `GradiendError` when training rows that set a scale are not finite."""
        device = pick_device()
        positions, groups = _training_rows(store, params, seed)
        training = RowSet.load(store, params, positions, device)
        validation = RowSet.load(store, params, store.positions(split="validation", kind=TRAINING), device)
        others = torch.from_numpy((store.index["type"] != TRAINING).to_numpy().nonzero()[0])
        source_scale = target_scale = 1.0
        if params.scaling == "scale_free":
            for rows, quantity in ((training.source, params.source), (training.target, params.target)):
                _check_finite(rows, positions, quantity)
            source_scale, target_scale = _typical_scale(training.source), _scale(training.target)
        neutral = store.rows("factual", others).to(device)
        return cls(positions, groups, training, Validation.of(validation), neutral, source_scale, target_scale)


def named_rows(rows: Tensor, most: int = 64) -> str:
    """Positions of rows in the store, for messages."""
    shown = ", ".join(map(str, rows[:most].tolist()))
    return f"rows {shown}" + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _training_rows(store: GradientStore, params: Train, seed: int) -> tuple[Tensor, dict[str, Positions]]:
    positions = store.positions(split="train", kind=TRAINING)
    transitions = store.index["transition"].to_numpy()[positions.numpy()]
    names = np.unique(transitions)
    if params.train_max_size is not None:
        random = np.random.default_rng([seed, len(names)])  # batches draw from [seed, 0 … len(names)-1]
        own = (np.flatnonzero(transitions == name) for name in names)
        kept = np.sort(np.concatenate([random.permutation(rows)[: params.train_max_size] for rows in own]))
        positions, transitions = positions[torch.from_numpy(kept)], transitions[kept]
    return positions, {name: np.flatnonzero(transitions == name) for name in names}


def _check_finite(rows: Tensor, positions: Tensor, quantity: str) -> None:
    finite = rows.isfinite().all(1)
    if not finite.all():
        raise GradiendError(
            f"training {named_rows(positions[~finite.cpu()])} of the gradient store hold {quantity} gradients that are"
            " not finite. Run cache_gradients again; if they are there again, load the base model in another dtype."
        )


def _scale(rows: Tensor) -> float:
    """Root mean square of training rows, the unit of the error; 1 if they are all zero."""
    return float(_rms(rows).square().mean().sqrt()) or 1.0


def _typical_scale(rows: Tensor) -> float:
    """Median over training rows of their root mean square, the unit of what is encoded.

    Factual gradients are next to nothing where the base model knows the word: a few large ones would make all others
    too small to be told apart.
    """
    return float(_rms(rows).median()) or _scale(rows)


def _rms(rows: Tensor) -> Tensor:
    """Root mean square of each row [N], in double precision; few rows at a time, because they are copied for it."""
    norms = [torch.linalg.vector_norm(some, dim=1, dtype=torch.float64) for some in torch.split(rows, _ROWS_AT_ONCE)]
    return torch.cat(norms) / math.sqrt(rows.shape[1])
