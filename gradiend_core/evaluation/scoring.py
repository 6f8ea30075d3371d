"""Score a masked language model: probabilities of class words, and the language-modelling score (semantics 8).

Everything that does not depend on the model's weights (tokenisation, masks) is done once, so that many rewritten
models are scored on identical inputs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.data.tables import SLOT
from gradiend_core.gradients.losses import slot_logits
from gradiend_core.gradients.objectives import Example, encode, encode_unchecked, is_known


@dataclass(frozen=True)
class ClassScorer:
    """Probabilities of the words of each class in the slots of some templates."""

    inputs: list[Example]  # distinct masked inputs
    terms: dict[str, list[list[tuple[int, tuple[int, ...]]]]]
    """Per class and row: (position in `inputs`, labels) of each word that counts."""

    @classmethod
    def prepare(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        templates: Sequence[str],
        words: Mapping[str, Sequence[str]],
        *,
        max_length: int,
    ) -> Self:
        """Tokenise every word of every class into every template.

        A word counts in the casing given and in every other casing (lower, title, upper) that the tokenizer has as
        a single token. Casings that become the same tokens count once.
        """
        inputs: dict[Example, int] = {}
        terms: dict[str, list[list[tuple[int, tuple[int, ...]]]]] = {}
        examples: list[Example] = []
        for name, listed in words.items():
            per_row: list[dict[tuple[int, tuple[int, ...]], None]] = [{} for _ in templates]
            for word in listed:
                for row, example in _casings(tokenizer, templates, word, max_length):
                    key = example._replace(labels=())  # what the model sees
                    if key not in inputs:
                        inputs[key] = len(examples)
                        examples.append(example)
                    per_row[row][inputs[key], example.labels] = None
            terms[name] = [list(found) for found in per_row]
        return cls(examples, terms)

    def probabilities(self, model: PreTrainedModel, batch_size: int) -> dict[str, NDArray[np.float64]]:
        """Per class the probability of its words [rows].

        A word of several tokens has the product of their probabilities, each predicted with all of them masked; a
        template of several slots the mean over its slots; a class the sum over its words.
        """
        logs: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, len(self.inputs), batch_size):
                found = slot_logits(model, self.inputs[start : start + batch_size])
                logs.extend(logits.double().log_softmax(-1).cpu() for logits in found)
        return {
            name: np.array([sum(_word(logs[at], labels, self.inputs[at].slots) for at, labels in row) for row in rows])
            for name, rows in self.terms.items()
        }


def _casings(
    tokenizer: PreTrainedTokenizerFast, templates: Sequence[str], word: str, max_length: int
) -> Iterator[tuple[int, Example]]:
    """(row, example) of a word in each template, and of its other casings where they are a single known token."""
    yield from enumerate(encode(tokenizer, templates, [word] * len(templates), max_length=max_length))
    for variant in dict.fromkeys((word.lower(), word.capitalize(), word.upper())):
        # A single token is never longer than the word that fitted; longer variants are left out, not refused.
        examples = encode_unchecked(tokenizer, templates, [variant] * len(templates))
        for row, example in enumerate(examples):
            single = len(example.labels) <= templates[row].count(SLOT)
            if variant != word and single and is_known(tokenizer, example):
                yield row, example


def _word(log_probabilities: Tensor, labels: tuple[int, ...], slots: tuple[int, ...]) -> float:
    chosen = log_probabilities[torch.arange(len(labels)), torch.tensor(labels)]
    products: dict[int, float] = {}
    for slot, value in zip(slots, chosen.tolist(), strict=True):
        products[slot] = products.get(slot, 0.0) + value
    return sum(map(math.exp, products.values())) / len(products)


@dataclass(frozen=True)
class LanguageModelScorer:
    """Accuracy of re-predicting masked tokens of neutral texts: the LMS of a masked language model.

    Unlike the reference, special tokens are never masked, and the masks come from a generator of their own (BUG-18).
    """

    examples: list[Example]  # one per text

    @classmethod
    def prepare(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        texts: Sequence[str],
        *,
        mlm_probability: float,
        seed: int,
        max_length: int,
    ) -> Self:
        """Mask a share of each text's tokens (at least one), all replaced by the mask token."""
        random = np.random.default_rng(seed)
        encoding = tokenizer(list(texts), truncation=True, max_length=max_length, return_special_tokens_mask=True)
        examples = []
        for ids, special in zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True):
            eligible = np.flatnonzero(np.array(special) == 0)
            count = max(1, round(mlm_probability * len(eligible)))
            positions = sorted(int(p) for p in random.permutation(eligible)[:count])
            masked = list(ids)
            for position in positions:
                masked[position] = tokenizer.mask_token_id
            labels = tuple(ids[position] for position in positions)
            examples.append(Example(tuple(masked), tuple(positions), labels, tuple(range(len(positions)))))
        return cls(examples)

    def correct(self, model: PreTrainedModel, batch_size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Correctly predicted and masked tokens of every text, each [texts]."""
        correct = []
        with torch.no_grad():
            for start in range(0, len(self.examples), batch_size):
                chunk = self.examples[start : start + batch_size]
                for logits, example in zip(slot_logits(model, chunk), chunk, strict=True):
                    correct.append(int((logits.argmax(-1).cpu() == torch.tensor(example.labels)).sum()))
        return np.array(correct, dtype=np.float64), np.array([len(e.labels) for e in self.examples], dtype=np.float64)
