"""The self-check of the gradient stage: collected rows against plain autograd."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.collector import Rows, loop_rows
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.selection import Selection

# Float32 rounding gives about 1e-6; a wrong rule or mixed-up examples give 1e-2 and more.
TOLERANCE = 1e-4


def verify_rows(
    model: PreTrainedModel,
    selection: Selection,
    rows: Rows,
    factual: Sequence[Example],
    alternative: Sequence[Example],
) -> float:
    """The largest relative error of the first and the last row, each recomputed alone; raises above `TOLERANCE`.

    Raises:
        GradiendError: the rows are wrong, which no parameter can mend.
    """
    ends = sorted({0, len(factual) - 1})
    exact = loop_rows(model, selection, [factual[row] for row in ends], [alternative[row] for row in ends])
    errors = []
    for ours, reference in zip(rows, exact, strict=True):
        scale = torch.linalg.vector_norm(reference, dim=1).clamp_min(1e-12)
        errors.append(torch.linalg.vector_norm(ours[ends] - reference, dim=1) / scale)
    worst = float(torch.cat(errors).max())
    if not worst <= TOLERANCE:  # NaN fails too
        raise GradiendError(
            f"self-check failed: batched gradients differ from plain autograd by {worst:.1e} (allowed {TOLERANCE:.0e})"
            f" for {type(model).__name__}. Nothing was written. Please report this model's architecture."
        )
    return worst
