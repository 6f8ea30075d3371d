"""The scalars whose gradients are studied: per-example losses of the base model's own cross-entropy (semantics 2)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gradiend_core.gradients.objectives import Example, Slots, pad


def slot_logits(model: PreTrainedModel, examples: Sequence[Example]) -> list[Tensor]:
    """For each example the logits at its scored positions [positions, vocabulary], from one forward pass."""
    logits = _logits(model, examples, Slots.of(examples))
    return list(torch.split(logits, [len(example.positions) for example in examples]))


def example_losses(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Cross-entropy of each example [N], the mean over its scored positions."""
    slots = Slots.of(examples)
    logits = _logits(model, examples, slots)
    return _mean(F.cross_entropy(logits, _labels(examples, logits), reduction="none"), slots)


def paired_losses(
    model: PreTrainedModel, factual: Sequence[Example], alternative: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Alternative loss and loss difference (factual - alternative), each [N], of pairs that share their input.

    The difference is taken between logits, where the common normaliser cancels exactly: its gradient is
    onehot(alternative) - onehot(factual), without the rounding of a subtraction of two gradients.
    """
    slots = Slots.of(factual)
    logits = _logits(model, factual, slots)
    known, other = _labels(factual, logits), _labels(alternative, logits)
    minus, plus = logits.gather(1, torch.stack([other, known], 1)).unbind(1)
    return _mean(F.cross_entropy(logits, other, reduction="none"), slots), _mean(minus - plus, slots)


def share_input(factual: Example, alternative: Example) -> bool:
    """Whether two examples differ only in their labels, so that one forward pass serves both."""
    return factual.input_ids == alternative.input_ids and factual.positions == alternative.positions


def _logits(model: PreTrainedModel, examples: Sequence[Example], slots: Slots) -> Tensor:
    """Logits at the scored positions [P, vocabulary], float32."""
    input_ids, attention_mask = (part.to(model.device) for part in pad(examples, int(model.config.pad_token_id or 0)))
    with _head_at(model, slots) as done:
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return (logits if done else _at(logits, slots)).flatten(0, 1).float()


@contextmanager
def _head_at(model: PreTrainedModel, slots: Slots) -> Iterator[list[nn.Module]]:
    """Let the model's head see only the hidden states at the scored positions, all in one row [1, P, …].

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
            return (_at(output[0], slots), *output[1:])
        output.last_hidden_state = _at(output.last_hidden_state, slots)
        return output

    backbone = model.base_model
    modules = [backbone, *(getattr(backbone, name) for name in ("decoder",) if hasattr(backbone, name))]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield done
    finally:
        for handle in handles:
            handle.remove()


def _at(tensor: Tensor, slots: Slots) -> Tensor:
    """[N, T, …] at the scored positions: [1, P, …]."""
    return tensor[slots.row.to(tensor.device), slots.position.to(tensor.device)][None]


def _labels(examples: Sequence[Example], logits: Tensor) -> Tensor:
    """The expected tokens [P]."""
    return torch.tensor([label for example in examples for label in example.labels], device=logits.device)


def _mean(losses: Tensor, slots: Slots) -> Tensor:
    """Losses [P] of positions, averaged over those of each example [N]."""
    slots = slots.to(losses.device)
    return (losses[slots.places] * slots.present).sum(1) / slots.present.sum(1)
