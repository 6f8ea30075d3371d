"""Change a base model by a decoded update: θ'_S = θ_S + η · decode(φ) (semantics, section 3)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection
from gradiend_core.model.gradiend import GradiendModel


def decoded_update(gradiend: GradiendModel, *, learning_rate: float, feature_factor: float) -> Tensor:
    """η · decode(φ) as a vector [n] in units of the base model's weights."""
    with torch.no_grad():
        factors = torch.full((1, gradiend.encoder.out_features), feature_factor)
        return learning_rate * gradiend.decode(factors)[0]


def rewrite(base_model: nn.Module, gradiend: GradiendModel, *, learning_rate: float, feature_factor: float) -> None:
    """Add a decoded update to the weights of `base_model`, in place."""
    update = decoded_update(gradiend, learning_rate=learning_rate, feature_factor=feature_factor)
    for flat, kept, part in list(_pieces(base_model, gradiend.selection, update)):  # all checked before any moves
        flat[kept] += part


@contextmanager
def rewritten(
    base_model: nn.Module, gradiend: GradiendModel, *, learning_rate: float, feature_factor: float
) -> Iterator[None]:
    """While active, `base_model` carries the update; afterwards its weights are bit for bit what they were."""
    pieces = list(_pieces(base_model, gradiend.selection, torch.zeros(gradiend.selection.n)))
    before = [flat[kept].clone() for flat, kept, _ in pieces]
    rewrite(base_model, gradiend, learning_rate=learning_rate, feature_factor=feature_factor)
    try:
        yield
    finally:
        for (flat, kept, _), original in zip(pieces, before, strict=True):
            flat[kept] = original


def _pieces(model: nn.Module, selection: Selection, update: Tensor) -> Iterator[tuple[Tensor, Tensor | slice, Tensor]]:
    """Per tensor: its weights as a flat view, the kept positions, and the part of the update that belongs there."""
    parameters = dict(model.named_parameters())
    parts = torch.split(update, selection.sizes)
    for name, shape, kept, part in zip(selection.names, selection.shapes, selection.kept, parts, strict=True):
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise GradiendError(f"{name} {list(shape)}: the base model has no such tensor; it is not the one studied")
        flat = parameters[name].data.view(-1)
        yield flat, slice(None) if kept is None else kept.to(flat.device), part.to(flat.device)
