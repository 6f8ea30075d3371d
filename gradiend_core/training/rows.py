"""The rows of a gradient store that a run trains and evaluates on, and the means of batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradiend_core.config.train import Train
from gradiend_core.gradients.store import GradientStore
from gradiend_core.training.batches import Positions


@dataclass(frozen=True)
class RowSet:
    """Source and target gradients [N, n] of some rows, the label of each source gradient, and position counts."""

    source: Tensor
    target: Tensor
    labels: np.ndarray  # +1: gradient of the first target class, -1: of the second, 0: neutral
    weights: Tensor  # masked positions per row: the share of a row in its batch's mean loss

    @classmethod
    def load(cls, store: GradientStore, params: Train, positions: Tensor, device: torch.device) -> "RowSet":
        """Rows of a store; the label is negated for source alternative (semantics 2.5)."""
        index = store.index.iloc[positions.numpy()]
        sign = -1.0 if params.source == "alternative" else 1.0
        return cls(
            store.rows(params.source, positions).to(device),
            store.rows(params.target, positions).to(device),
            sign * index["label"].to_numpy(dtype=np.float64) + 0.0,
            torch.tensor(index["n_positions"].to_numpy(), dtype=torch.float32, device=device),
        )

    def batch_means(self, batches: Sequence[Positions]) -> tuple[Tensor, Tensor]:
        """Source and target gradients [len(batches), n] of the mean loss over all masked positions of each batch.

        The matrices are read in place, and a mean does not depend on the other batches that are asked for with it.
        """
        rows = torch.from_numpy(np.concatenate(batches)).to(self.source.device)
        lengths = torch.tensor([len(batch) for batch in batches], device=rows.device)
        shares = torch.cat([part / part.sum() for part in torch.split(self.weights[rows], lengths.tolist())])
        starts = lengths.cumsum(0) - lengths
        source, target = (
            F.embedding_bag(rows, matrix, starts, mode="sum", per_sample_weights=shares)
            for matrix in (self.source, self.target)
        )
        return source, target
