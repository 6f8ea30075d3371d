"""What the collector is measured against: the same losses by plain torch, without per-example gradients.

One forward pass with the head at the labelled positions, then one backward pass for each of the two quantities: to
the parameters of the backbone (`parameter_backwards`, the sum over the batch), or to the activations only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.selection import backbone_parameters

Receiver = Callable[[Sequence[Tensor]], object]


class Labelled(NamedTuple):
    """A batch of rows of equal length; one entry per labelled position, except for the input."""

    input_ids: Tensor  # [N, T]
    row: Tensor
    position: Tensor
    factual: Tensor
    alternative: Tensor
    weight: Tensor  # 1 / labelled positions of the row


def labelled(factual: Sequence[Example], alternative: Sequence[Example]) -> Labelled:
    """The rows as tensors; each pair of examples must share its input."""
    lines = [
        (row, position, plus, minus, 1 / len(one.positions))
        for row, (one, other) in enumerate(zip(factual, alternative, strict=True))
        for position, plus, minus in zip(one.positions, one.labels, other.labels, strict=True)
    ]
    columns = [torch.tensor(column) for column in zip(*lines, strict=True)]
    return Labelled(torch.tensor([example.input_ids for example in factual]), *columns)


def losses(model: PreTrainedModel, rows: Labelled) -> tuple[Tensor, Tensor]:
    """Sums over the batch of the alternative loss and of the loss difference factual - alternative."""
    with _head_at(model, rows):
        output = model(input_ids=rows.input_ids, attention_mask=torch.ones_like(rows.input_ids))
    logits = output.logits.flatten(0, 1)
    alternative = F.cross_entropy(logits, rows.alternative, reduction="none")
    chosen = (logits.gather(1, labels[:, None])[:, 0] for labels in (rows.alternative, rows.factual))
    minus, plus = chosen
    return (rows.weight * alternative).sum(), (rows.weight * (minus - plus)).sum()


def parameter_backwards(model: PreTrainedModel, rows: Labelled, receive: Receiver = lambda gradients: None) -> None:
    """Hand over the alternative gradient of all parameters of the backbone, in order, and then the diff gradient.

    By default each is dropped at once, so that the second one finds the memory of the first.
    """
    model.requires_grad_(False)
    parameters = list(backbone_parameters(model).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    alternative, diff = losses(model, rows)
    receive(torch.autograd.grad(alternative, parameters, retain_graph=True, materialize_grads=True))
    receive(torch.autograd.grad(diff, parameters, materialize_grads=True))
    model.requires_grad_(False)


def activation_backwards(model: PreTrainedModel, rows: Labelled) -> tuple[Tensor, Tensor]:
    """The two gradients of the token embeddings' output, with every parameter frozen."""
    model.requires_grad_(False)
    embedded: list[Tensor] = []

    def require(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        embedded.append(output.requires_grad_(True))

    handle = model.get_input_embeddings().register_forward_hook(require)
    try:
        alternative, diff = losses(model, rows)
    finally:
        handle.remove()
    (first,) = torch.autograd.grad(alternative, embedded, retain_graph=True)
    (second,) = torch.autograd.grad(diff, embedded)
    return first, second


@contextmanager
def _head_at(model: PreTrainedModel, rows: Labelled) -> Iterator[None]:
    """While active, the head sees the labelled positions only, as one row [1, positions, features]."""

    def gather(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][rows.row, rows.position][None]
        return output

    handle = model.base_model.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
