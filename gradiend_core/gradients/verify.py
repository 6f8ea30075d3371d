"""The self-check of the gradient stage: collected rows against plain autograd."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.collector import Rows, loop_rows, summed_rows
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.selection import Selection

# What rounding explains of a row, by the model's number format; wrong rules and mixed-up examples give 1e-2 and more.
TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# A single tensor may be off by so much more; one that holds less than this share of a row's norm is measured against
# that share, for some gradients (of key biases) are zero in theory, and all that is left of them is rounding.
_TENSOR_FACTOR = 10
_SMALL_SHARE = 1e-2


def verify_rows(
    model: PreTrainedModel,
    selection: Selection,
    rows: Rows,
    factual: Sequence[Example],
    alternative: Sequence[Example],
) -> float:
    """The largest relative error of a batch's rows; raises above `TOLERANCE`.

    Compared are the sum of the rows with one plain backward pass of the batch (every rule, every example), and the
    first and the last row with the same example alone (the sum cannot see rows that are mixed up), whole and tensor
    by tensor.

    Raises:
        GradiendError: the rows are wrong, which no parameter can mend.
    """
    ends = sorted({0, len(factual) - 1})
    alone = loop_rows(model, selection, [factual[row] for row in ends], [alternative[row] for row in ends])
    summed = summed_rows(model, selection, factual, alternative)
    whole, by_tensor = [], []
    for ours, exact, total in zip(rows, alone, summed, strict=True):
        # The sum is measured against rows that do not cancel, whether these do or not.
        for found, expected, size in (
            (ours[ends], exact, torch.linalg.vector_norm(exact, dim=1)),
            (ours.sum(0, keepdim=True), total, torch.linalg.vector_norm(ours)[None]),
        ):
            size = size.clamp_min(1e-12)
            whole.append((torch.linalg.vector_norm(found - expected, dim=1) / size).max())
            by_tensor.append(_tensor_errors(selection, found, expected, size))
    error, tensor_error = torch.stack(whole).max(), torch.stack(by_tensor).amax(0)  # NaN is the largest of all
    allowed = TOLERANCE[model.dtype]
    if not (error <= allowed and tensor_error.max() <= _TENSOR_FACTOR * allowed):
        worst = f"{selection.names[int(tensor_error.argmax())]} ({tensor_error.max():.1e})"
        raise GradiendError(
            f"self-check failed: batched gradients of {type(model).__name__} differ from plain autograd by {error:.1e}"
            f" (allowed {allowed:.0e}), most in {worst}. Nothing was written. Please report this model's architecture."
        )
    return float(error)


def _tensor_errors(selection: Selection, ours: Tensor, exact: Tensor, size: Tensor) -> Tensor:
    """The largest relative error over rows [N, n] of every tensor's part [tensors]; `size` is a row's norm [N]."""
    errors = []
    for found, expected in zip(*(torch.split(rows, selection.sizes, dim=1) for rows in (ours, exact)), strict=True):
        norm = torch.maximum(torch.linalg.vector_norm(expected, dim=1), _SMALL_SHARE * size)
        errors.append((torch.linalg.vector_norm(found - expected, dim=1) / norm).max())
    return torch.stack(errors)
