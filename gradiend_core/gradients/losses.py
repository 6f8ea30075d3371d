"""The scalars whose gradients are studied: per-example losses of the base model's own cross-entropy (semantics 2)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradiend_core.gradients.objectives import Example, pad


def slot_logits(model: PreTrainedModel, examples: Sequence[Example]) -> list[Tensor]:
    """For each example the logits at its scored positions [positions, vocabulary], from one forward pass."""
    logits = _logits(model, examples)
    return [logits[row, : len(example.positions)] for row, example in enumerate(examples)]


def example_losses(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Cross-entropy of each example [N], the mean over its scored positions."""
    return _cross_entropies(_logits(model, examples), examples)


def paired_losses(
    model: PreTrainedModel, factual: Sequence[Example], alternative: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Alternative loss and loss difference (factual - alternative), each [N], of pairs that share their input.

    The difference is taken between logits, where the common normaliser cancels exactly: its gradient is
    onehot(alternative) - onehot(factual), without the rounding of a subtraction of two gradients.
    """
    logits = _logits(model, factual)
    known, share = _labels(factual, logits.device)
    other, _ = _labels(alternative, logits.device)
    taken = [logits.gather(2, labels[:, :, None]).squeeze(2) for labels in (other, known)]
    return _cross_entropies(logits, alternative), (share * (taken[0] - taken[1])).sum(1)


def share_input(factual: Example, alternative: Example) -> bool:
    """Whether two examples differ only in their labels, so that one forward pass serves both."""
    return factual.input_ids == alternative.input_ids and factual.positions == alternative.positions


def _logits(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Logits at the scored positions [N, L, vocabulary] in float32; shorter examples repeat their first position."""
    input_ids, attention_mask = (part.to(model.device) for part in pad(examples, int(model.config.pad_token_id or 0)))
    most = max(len(example.positions) for example in examples)
    positions = torch.tensor(
        [[*example.positions, *example.positions[:1] * (most - len(example.positions))] for example in examples]
    )
    with _head_at(model, positions) as done:
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return (logits if done else _at(logits, positions)).float()


@contextmanager
def _head_at(model: PreTrainedModel, positions: Tensor) -> Iterator[list[nn.Module]]:
    """Let the model's head see, of every example, only the hidden states at its positions [N, L].

    The head acts on every position alone, and is the dearest part of a small model: its vocabulary is large. The
    list given holds the module whose output was cut down, once it has been: the backbone, or the decoder in it where
    the model calls that directly (OPT).
    """
    done: list[nn.Module] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        if done:
            return output
        done.append(module)
        if isinstance(output, tuple):
            return (_at(output[0], positions), *output[1:])
        output.last_hidden_state = _at(output.last_hidden_state, positions)
        return output

    backbone = model.base_model
    modules = [backbone, *(getattr(backbone, name) for name in ("decoder",) if hasattr(backbone, name))]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield done
    finally:
        for handle in handles:
            handle.remove()


def _at(tensor: Tensor, positions: Tensor) -> Tensor:
    """[N, T, …] at positions [N, L]: [N, L, …]."""
    rows = torch.arange(len(positions), device=tensor.device)[:, None]
    return tensor[rows, positions.to(tensor.device)]


def _cross_entropies(logits: Tensor, examples: Sequence[Example]) -> Tensor:
    labels, share = _labels(examples, logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (share * losses.view_as(share)).sum(1)


def _labels(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels [N, L] and the share of each in its example's mean [N, L]: zero where an example has fewer positions."""
    most = max(len(example.labels) for example in examples)
    labels = torch.zeros(len(examples), most, dtype=torch.int64)
    share = torch.zeros(len(examples), most)
    for row, example in enumerate(examples):
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
        share[row, : len(example.labels)] = 1 / len(example.labels)
    return labels.to(device), share.to(device)
