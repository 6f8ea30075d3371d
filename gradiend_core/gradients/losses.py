"""The scalars whose gradients are studied: per-example losses of the base model's own cross-entropy (semantics 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradiend_core.gradients.objectives import Example, pad


def slot_logits(model: PreTrainedModel, examples: Sequence[Example]) -> list[Tensor]:
    """For each example the logits at its masked positions [positions, vocabulary], from one forward pass."""
    input_ids, attention_mask = pad(examples, int(model.config.pad_token_id or 0))
    logits = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)).logits
    return [logits[row, list(example.positions)] for row, example in enumerate(examples)]


def example_losses(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Cross-entropy of each example [N], the mean over its masked positions."""
    losses = [
        F.cross_entropy(logits, torch.tensor(example.labels, device=logits.device))
        for logits, example in zip(slot_logits(model, examples), examples, strict=True)
    ]
    return torch.stack(losses)


def paired_losses(
    model: PreTrainedModel, factual: Sequence[Example], alternative: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Alternative loss and loss difference (factual - alternative), each [N], of pairs that share their input.

    The difference is taken between logits, where the common normaliser cancels exactly: its gradient is
    onehot(alternative) - onehot(factual), without the rounding of a subtraction of two gradients.
    """
    losses, differences = [], []
    for logits, plus, minus in zip(slot_logits(model, factual), factual, alternative, strict=True):
        labels = torch.tensor(minus.labels, device=logits.device)
        losses.append(F.cross_entropy(logits, labels))
        known = torch.tensor(plus.labels, device=logits.device)
        positions = torch.arange(len(labels), device=logits.device)
        differences.append((logits[positions, labels] - logits[positions, known]).mean())
    return torch.stack(losses), torch.stack(differences)


def share_input(factual: Example, alternative: Example) -> bool:
    """Whether two examples differ only in their labels, so that one forward pass serves both."""
    return factual.input_ids == alternative.input_ids and factual.positions == alternative.positions
