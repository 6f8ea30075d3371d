"""Training a small masked language model from scratch, with Hugging Face's own trainer.

For demonstrations and tests a model that is good at one small corpus after a minute on a CPU; docs/base-models.md says
how to train larger ones. The model and its tokenizer are ordinary ones (`BertForMaskedLM`, WordPiece), so that
everything else treats them like any other model.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from gradiend_core.config.base_models import MaskedLMTraining
from gradiend_core.errors import GradiendError
from gradiend_core.lm.masking import Encoded, mask_probabilities, pad
from gradiend_core.lm.processes import run_processes
from gradiend_core.lm.trainer_checkpoints import TrainerCheckpoints
from gradiend_core.lm.training_job import TrainedMaskedLM, TrainingJob, check_job, read_result, train_share

_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


class Accuracy(TypedDict):
    """The share of right guesses among `n`; None when there were none."""

    accuracy: float | None
    n: int


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing WordPiece tokenizer with at most `vocab_size` tokens, laid out like BERT's.

    The vocabulary is smaller when `texts` have fewer words and pieces than that. The same texts give the same
    vocabulary in every process. Raises `GradiendError` when `vocab_size` is too small for the characters of `texts`.
    """
    tokenizer = _blank_tokenizer(models.WordPiece(unk_token=_SPECIALS["unk_token"]))
    # The trainer numbers the pieces "##a" in the order of a randomly seeded hash map, and breaks ties by number. The
    # same texts would give another vocabulary every time, were these pieces not numbered here.
    characters = sorted({mark for text in texts for mark in tokenizer.normalizer.normalize_str(text) if mark.strip()})
    first = [*_SPECIALS.values(), *(f"##{mark}" for mark in characters)]
    if vocab_size < len(first) + len(characters):
        raise GradiendError(
            f"vocab_size: {vocab_size} is too small for the {len(characters)} characters of the texts. "
            f"Use at least {len(first) + len(characters)}."
        )
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    trained = _blank_tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token=_SPECIALS["unk_token"]))
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, trained.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained, **_SPECIALS)  # type: ignore[no-untyped-call]


def train_masked_lm(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    model_config: Mapping[str, Any],
    training: MaskedLMTraining,
    validation: Sequence[str] = (),
    checkpoints: TrainerCheckpoints | None = None,
    events: Path | None = None,
) -> TrainedMaskedLM:
    """Train a BERT of `model_config` (the fields of `BertConfig`) on `texts`; see docs/base-models.md.

    The seed of `training` fixes the initial weights, the order of the texts and the masks; the caller's random state
    stays as it is.

    Args:
        validation: texts to evaluate on, when `training` says so.
        checkpoints: where an interrupted training is continued from; without it, a training begins anew.
        events: folder for what `training.report_to` asks for.

    Raises:
        GradiendError: a setting that this machine or this model cannot honour; weights that are not finite.
    """
    with ExitStack() as stack:
        if checkpoints is None:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            checkpoints = stack.enter_context(TrainerCheckpoints(folder / "checkpoints", {}))
        job = TrainingJob(texts, validation, tokenizer, model_config, training, checkpoints, events)
        check_job(job)
        run_processes(train_share, job, training.processes)
        return read_result(job)


def masked_word_accuracy(
    model: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    words: Sequence[str],
    batch_size: int = 256,
) -> dict[str, Accuracy]:
    """How often the model's best guess is right where one of `words` stands, per word and "overall".

    Every occurrence in `texts` is masked alone. A word of several tokens counts as right when all of them are the most
    probable ones, masked together. `accuracy` is None for a word that does not occur.
    """
    spellings = {tuple(tokenizer(word, add_special_tokens=False)["input_ids"]): word for word in words}
    rows, spans, found = _occurrences(tokenizer, texts, spellings)
    right: dict[str, int] = dict.fromkeys(words, 0)
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        ids = pad(rows[part], tokenizer.pad_token_id)
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        for row, span in enumerate(spans[part]):
            hidden[row, span] = True
        equal = _guesses(model, tokenizer, ids, hidden) == ids
        for row, (span, word) in enumerate(zip(spans[part], found[part], strict=True)):
            right[word] += bool(equal[row, span].all())
    counts = {word: found.count(word) for word in words}
    result = {word: _accuracy(right[word], counts[word]) for word in words}
    return {"overall": _accuracy(sum(right.values()), len(found)), **result}


def masked_token_accuracy(
    model: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    seed: int,
    batch_size: int = 256,
) -> float:
    """The share of right best guesses at a random 15 % of all tokens, all replaced by [MASK].

    NaN when no token was drawn. The draw depends on `seed`, `texts` and the tokenizer, not on the model.
    """
    probabilities = mask_probabilities(tokenizer, 0.15)
    generator = torch.Generator().manual_seed(seed)
    rows = Encoded(tokenizer, texts).ids
    right = total = 0
    for start in range(0, len(rows), batch_size):
        ids = pad(rows[start : start + batch_size], tokenizer.pad_token_id)
        hidden = torch.rand(ids.shape, generator=generator) < probabilities[ids]
        right += int((_guesses(model, tokenizer, ids, hidden) == ids)[hidden].sum())
        total += int(hidden.sum())
    return right / total if total else float("nan")


def _blank_tokenizer(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _occurrences(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], spellings: Mapping[tuple[int, ...], str]
) -> tuple[list[list[int]], list[slice], list[str]]:
    """One row of token ids per occurrence of a word, with the positions of its tokens and the word."""
    rows: list[list[int]] = []
    spans: list[slice] = []
    found: list[str] = []
    for encoding in tokenizer(list(texts)).encodings or ():
        for word in sorted({index for index in encoding.word_ids if index is not None}):
            start, stop = encoding.word_to_tokens(word) or (0, 0)
            spelling = spellings.get(tuple(encoding.ids[start:stop]))
            if spelling is not None:
                rows.append(encoding.ids)
                spans.append(slice(start, stop))
                found.append(spelling)
    return rows, spans, found


def _guesses(
    model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """The most probable token at every position of `ids` (batch, length) when those in `hidden` are masked."""
    with torch.no_grad():
        masked = ids.masked_fill(hidden, tokenizer.mask_token_id).to(model.device)
        attended = (ids != tokenizer.pad_token_id).long().to(model.device)
        guesses: torch.Tensor = model(input_ids=masked, attention_mask=attended).logits.argmax(-1)
    return guesses.cpu()


def _accuracy(right: int, n: int) -> Accuracy:
    return {"accuracy": right / n if n else None, "n": n}
