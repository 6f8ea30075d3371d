"""Which positions of which input are scored against which labels, for masked language models.

A word is placed into the slots of its template *before* tokenisation, and the tokens that cover it are then
replaced by mask tokens. So the label is the variant of the word that the tokenizer uses at this place ("Ġhe" after
a space in byte-level BPE; BUG-26), a word of k tokens gets k masks in every slot (BUG-10), and nothing is assumed
about how the tokenizer treats spaces around its mask token.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerFast

from gradiend_core.data.tables import SLOT
from gradiend_core.errors import GradiendError


class Example(NamedTuple):
    """A tokenised template: the input, the positions whose logits are scored, each one's expected token and slot."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]  # the masked ones; of a causal model each would be the one before the expected token
    labels: tuple[int, ...]
    slots: tuple[int, ...]  # 0, 1, …: a word may have more tokens in one slot than in another


def encode(
    tokenizer: PreTrainedTokenizerFast,
    templates: Iterable[str],
    words: Iterable[str],
    *,
    max_length: int,
    rows: Iterable[str] | None = None,
) -> list[Example]:
    """One `Example` per template, with the word of the same position in its slots.

    Args:
        rows: what to call each row in errors; by default its position.

    Raises:
        GradiendError: naming the row, when a template has no slot or is too long for the model, or a word has no
            token or none that the model knows.
    """
    pairs = list(zip(templates, words, strict=True))
    names = [f"row {row}" for row in range(len(pairs))] if rows is None else list(rows)
    examples = encode_unchecked(tokenizer, [template for template, _ in pairs], [word for _, word in pairs])
    for row, example, (template, word) in zip(names, examples, pairs, strict=True):
        if SLOT not in template:
            raise GradiendError(f"{row}: template {template!r} has no slot {SLOT!r}")
        if len(example.input_ids) > max_length:
            raise GradiendError(
                f"{row}: template {template!r} has {len(example.input_ids)} tokens, the base model takes"
                f" {max_length}; its slot could be cut off. Shorten or remove the text."
            )
        if not is_known(tokenizer, example):
            raise GradiendError(
                f"{row}: the word {word!r} in {template!r} has no token in the base model's vocabulary."
                " Remove it from the class, or use a base model that knows it."
            )
    return examples


def encode_unchecked(
    tokenizer: PreTrainedTokenizerFast, templates: Sequence[str], words: Sequence[str]
) -> list[Example]:
    """Like `encode`, but nothing is refused: see `is_known`, and compare lengths with what the model takes."""
    if not templates:
        return []
    texts, spans = zip(*map(fill, templates, words), strict=True)
    encoding = tokenizer(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True)
    return [_mask_word(int(tokenizer.mask_token_id), encoding, row, spans[row]) for row in range(len(texts))]


def is_known(tokenizer: PreTrainedTokenizerFast, example: Example) -> bool:
    """Whether the word of an example has tokens, none of them the unknown token."""
    return bool(example.labels) and tokenizer.unk_token_id not in example.labels


def fill(template: str, word: str) -> tuple[str, list[tuple[int, int]]]:
    """The template with `word` in every slot, and where the word stands: [start, end) in characters."""
    before, *rest = template.split(SLOT)
    text, spans = before, []
    for part in rest:
        spans.append((len(text), len(text) + len(word)))
        text += word + part
    return text, spans


def padded_length(examples: Sequence[Example]) -> int:
    """Tokens of the longest example, to which a batch is padded."""
    return max(len(example.input_ids) for example in examples)


def pad(examples: Sequence[Example], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask, both [N, T] int64, padded on the right to the longest example."""
    length = padded_length(examples)
    rows = [[*example.input_ids, *[pad_token_id] * (length - len(example.input_ids))] for example in examples]
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    return torch.tensor(rows), (torch.arange(length) < lengths[:, None]).long()


class Slots(NamedTuple):
    """The P scored positions of a batch of N examples, of which none has more than L: example by example, in order."""

    row: Tensor  # [P], the example of each
    position: Tensor  # [P], its place in the input
    places: Tensor  # [N, L], where the positions of each example stand among the P; its first one where it has fewer
    present: Tensor  # [N, L], whether it has so many

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        counts = torch.tensor([len(example.positions) for example in examples])
        present = torch.arange(int(counts.max())) < counts[:, None]
        first = (counts.cumsum(0) - counts)[:, None]
        return cls(
            row=torch.repeat_interleave(counts),
            position=torch.tensor([position for example in examples for position in example.positions]),
            places=torch.where(present, first + torch.arange(present.shape[1]), first),
            present=present,
        )

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(*(tensor.to(device) for tensor in self))


def _mask_word(mask_token_id: int, encoding: BatchEncoding, row: int, spans: list[tuple[int, int]]) -> Example:
    ids: list[int] = list(encoding["input_ids"][row])
    tokens = zip(encoding["offset_mapping"][row], encoding["special_tokens_mask"][row], strict=True)
    slot_of: dict[int, int] = {}
    for position, ((start, end), special) in enumerate(tokens):
        covered = [slot for slot, (first, last) in enumerate(spans) if start < last and end > first]
        if covered and not special:
            slot_of[position] = covered[0]
    labels = tuple(ids[position] for position in slot_of)
    for position in slot_of:
        ids[position] = mask_token_id
    return Example(tuple(ids), tuple(slot_of), labels, tuple(slot_of.values()))
