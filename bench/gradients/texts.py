"""The rows that both the reference package and we compute gradients of: words of one token, 32 tokens a row."""

import random
from collections.abc import Sequence

from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = {"M": "w0", "F": "w1"}
TOKENS = 32
Row = dict[str, object]


def some(values: Sequence[float]) -> list[float]:
    """A thousand of many values, to compare by."""
    return list(values[:: max(1, len(values) // 1000)])


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, … with as many entries as a model's vocabulary."""
    entries = [*SPECIALS, *(f"w{word}" for word in range(vocabulary - len(SPECIALS)))]
    ids = {token: number for number, token in enumerate(entries)}
    backend = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, model_max_length=512, **names
    )


def rows(count: int, vocabulary: int, classes: Sequence[str] = ("M", "F")) -> list[Row]:
    """`count` training rows of each class, in the columns that the reference trainer takes."""
    draw = random.Random(0)
    table: list[Row] = []
    for factual, other in (tuple(classes), tuple(reversed(classes))):
        for _ in range(count):
            words = [f"w{draw.randrange(2, vocabulary - len(SPECIALS))}" for _ in range(TOKENS - 2)]
            words[draw.randrange(len(words))] = "[MASK]"
            table.append(
                {
                    "masked": " ".join(words),
                    "split": "train",
                    "label_class": factual,
                    "label": WORDS[factual],
                    "alternative_class": other,
                    "alternative": WORDS[other],
                }
            )
    return table
