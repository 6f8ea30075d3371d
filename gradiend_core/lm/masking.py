"""Masking tokens at random, and the texts they are masked in."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

IGNORED: Final = -100


# Token ids as the model sees them ("input_ids"), which of them are no padding ("attention_mask"), and the true id where
# a token was masked, IGNORED elsewhere ("labels"): all (batch, length), or (length,) for a single text.
Batch = dict[str, Tensor]


class Encoded(Dataset[list[int]]):
    """The token ids of every text, encoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
        self.ids: list[list[int]] = tokenizer(list(texts), return_attention_mask=False)["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[index]


class Masker:
    """Pads rows of token ids to the longest and masks tokens, from a random generator of its own.

    Every token is masked with probability `mlm_probability`; of the masked ones 80 % become [MASK], 10 % a random token
    and 10 % stay (Devlin et al., 2019).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mlm_probability: float, seed: int) -> None:
        self._tokenizer = tokenizer
        self._probabilities = mask_probabilities(tokenizer, mlm_probability)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: Sequence[Sequence[int]]) -> Batch:
        ids = pad(rows, self._tokenizer.pad_token_id)
        chosen = self._uniform(ids) < self._probabilities[ids]
        fate = self._uniform(ids)
        others = torch.randint(len(self._tokenizer), ids.shape, generator=self.generator)
        masked = torch.where(chosen & (fate < 0.8), self._tokenizer.mask_token_id, ids)
        return {
            "input_ids": torch.where(chosen & (fate >= 0.9), others, masked),
            "attention_mask": (ids != self._tokenizer.pad_token_id).long(),
            "labels": torch.where(chosen, ids, IGNORED),
        }

    def _uniform(self, ids: Tensor) -> Tensor:
        return torch.rand(ids.shape, generator=self.generator)


class MaskedOnce(Dataset[Batch]):
    """Texts that are masked once, each by itself, so that every evaluation asks for the same tokens."""

    def __init__(self, masker: Masker, texts: Encoded) -> None:
        self._rows = [{name: rows[0] for name, rows in masker([ids]).items()} for ids in texts.ids]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        return self._rows[index]


def share(batch: Batch, process: int, processes: int) -> Batch:
    """The rows of a batch that one of several processes computes; all of them together are the batch.

    Every process gets at least one row, so that all take part in each step: one without labels, if there are too few.
    """
    if process < len(batch["labels"]):
        return {name: rows[process::processes] for name, rows in batch.items()}
    first = {name: rows[:1] for name, rows in batch.items()}
    return first | {"labels": torch.full_like(first["labels"], IGNORED)}


def mask_probabilities(tokenizer: PreTrainedTokenizerFast, mlm_probability: float) -> Tensor:
    """The probability (vocabulary size,) with which each token is masked; 0 for special tokens."""
    probabilities = torch.full((len(tokenizer),), float(mlm_probability))
    probabilities[tokenizer.all_special_ids] = 0.0
    return probabilities


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """The rows as one tensor (rows, longest), filled up with `value`."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
