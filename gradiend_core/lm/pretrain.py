"""Training a small masked language model from scratch, with Hugging Face's own trainer.

For demonstrations and tests: a model that is good at one small corpus after a minute on a CPU. The model and its
tokenizer are ordinary ones (`BertForMaskedLM`, WordPiece), so that everything else treats them like any other model.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradiend_core.errors import GradiendError

logger = logging.getLogger(__name__)

_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_IGNORED = -100


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
    training_arguments: Mapping[str, Any],
    mlm_probability: float = 0.15,
) -> BertForMaskedLM:
    """Train a BERT of `model_config` (the fields of `BertConfig`) on `texts`; returns it in evaluation mode.

    `training_arguments` are fields of `transformers.TrainingArguments`; its `seed` (default 0) fixes the initial
    weights, the order of the texts and the masks. Every token is masked with probability
    `mlm_probability`; of the masked ones 80 % become [MASK], 10 % a random token and 10 % stay (Devlin et al., 2019).
    Nothing is kept on disk.
    """
    seed = int(training_arguments.get("seed", 0))
    # The trainer seeds the global generators; the caller gets its own state back.
    with torch.random.fork_rng(), TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **model_config)
        model = BertForMaskedLM(config)
        probabilities = _mask_probabilities(tokenizer, mlm_probability)
        trainer = _MaskedTrainer(
            model=model,
            args=_arguments(training_arguments, folder),
            data_collator=_Masker(tokenizer, probabilities, seed),
            train_dataset=_Encoded(tokenizer, texts),
            callbacks=[_LogProgress()],
        )
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    logger.info("trained %d steps, mean loss %.3f", result.global_step, result.training_loss)
    model.eval()  # type: ignore[no-untyped-call]
    return model


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
        ids = _pad(rows[part], tokenizer.pad_token_id)
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
    probabilities = _mask_probabilities(tokenizer, 0.15)
    generator = torch.Generator().manual_seed(seed)
    rows = _Encoded(tokenizer, texts).ids
    right = total = 0
    for start in range(0, len(rows), batch_size):
        ids = _pad(rows[start : start + batch_size], tokenizer.pad_token_id)
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


def _arguments(training_arguments: Mapping[str, Any], folder: str) -> TrainingArguments:
    quiet: dict[str, Any] = {
        "output_dir": folder,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "steps",
        "logging_steps": 0.2,
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }
    return TrainingArguments(**(quiet | dict(training_arguments)))


def _mask_probabilities(tokenizer: PreTrainedTokenizerFast, mlm_probability: float) -> torch.Tensor:
    """The probability (vocabulary size,) with which each token is masked; 0 for special tokens."""
    probabilities = torch.full((len(tokenizer),), float(mlm_probability))
    probabilities[tokenizer.all_special_ids] = 0.0
    return probabilities


class _LogProgress(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            logger.info("step %d of %d: loss %s", state.global_step, state.max_steps, logs["loss"])


class _Encoded(Dataset[list[int]]):
    """The token ids of every text, encoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
        self.ids: list[list[int]] = tokenizer(list(texts), return_attention_mask=False)["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[index]


class _Masker:
    """Pads rows of token ids to the longest and masks tokens, from a random generator of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, probabilities: torch.Tensor, seed: int) -> None:
        self._tokenizer = tokenizer
        self._probabilities = probabilities
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        ids = _pad(rows, self._tokenizer.pad_token_id)
        chosen = self._uniform(ids) < self._probabilities[ids]
        fate = self._uniform(ids)
        others = torch.randint(len(self._tokenizer), ids.shape, generator=self._generator)
        masked = torch.where(chosen & (fate < 0.8), self._tokenizer.mask_token_id, ids)
        return {
            "input_ids": torch.where(chosen & (fate >= 0.9), others, masked),
            "attention_mask": (ids != self._tokenizer.pad_token_id).long(),
            "labels": torch.where(chosen, ids, _IGNORED),
        }

    def _uniform(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.rand(ids.shape, generator=self._generator)


class _MaskedTrainer(Trainer):
    """The usual loss, but the vocabulary is scored at masked positions only: the same number in half the time."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean cross entropy over the masked positions of the batch, a scalar."""
        masked = inputs["labels"] != _IGNORED
        hidden = model.bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        return torch.nn.functional.cross_entropy(model.cls(hidden[masked]), inputs["labels"][masked])


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


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
