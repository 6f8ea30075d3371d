"""The rows and the tiny masked language model that every reference value is computed on."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["him", "her", "##self", "rain", "snow"]
CLASSES = ("M", "F")
WORDS = {"M": "he", "F": "she"}
MAX_LENGTH = 14
WEIGHT_SEED = 7

# (factual class, split, template); the templates are distinct, so a template names its row.
TEMPLATES = [
    ("M", "train", "the doctor said that [MASK] was late ."),
    ("M", "train", "my friend thinks [MASK] is right ."),
    ("M", "train", "today [MASK] went home ."),
    ("M", "train", "the king knew [MASK] was old ."),
    ("M", "train", "when it was dark [MASK] slept ."),
    ("M", "train", "the baker hoped [MASK] sold the bread ."),
    ("M", "train", "after the game [MASK] was tired ."),
    ("M", "train", "i saw that [MASK] read a book ."),
    ("F", "train", "the nurse said that [MASK] was late ."),
    ("F", "train", "my sister thinks [MASK] is right ."),
    ("F", "train", "today [MASK] sang at home ."),
    ("F", "train", "the queen knew [MASK] was old ."),
    ("F", "train", "when it was cold [MASK] slept ."),
    ("F", "train", "the teacher hoped [MASK] sold the book ."),
    ("F", "train", "after the song [MASK] was tired ."),
    ("F", "train", "i heard that [MASK] read a poem ."),
    ("M", "validation", "the king said [MASK] slept ."),
    ("F", "validation", "the queen said [MASK] slept ."),
    ("M", "test", "my friend knew that [MASK] was tired ."),
    ("F", "test", "my sister knew that [MASK] was tired ."),
]


def make_rows() -> list[dict[str, object]]:
    """Return the rows in the project's training schema, with a running `row` number."""
    rows: list[dict[str, object]] = []
    for number, (factual_class, split, masked) in enumerate(TEMPLATES):
        other = CLASSES[1 - CLASSES.index(factual_class)]
        rows.append(
            {
                "row": number,
                "text": masked.replace("[MASK]", WORDS[factual_class]),
                "masked": masked,
                "split": split,
                "factual_class": factual_class,
                "alternative_class": other,
                "factual": WORDS[factual_class],
                "alternative": WORDS[other],
                "transition": f"{factual_class}->{other}",
            }
        )
    return rows


def reference_frame(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Return the rows as the merged table that the reference trainer accepts."""
    frame = pd.DataFrame(rows)
    return frame.rename(columns={"factual": "label", "factual_class": "label_class"})[
        ["masked", "split", "label_class", "label", "alternative_class", "alternative"]
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a lower-casing WordPiece tokenizer over the words of the rows."""
    words = {w for _, _, t in TEMPLATES for w in t.replace("[MASK]", " ").split()} | set(WORDS.values())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *sorted(words), *PIECES])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
    )


def write_model(folder: Path) -> None:
    """Write the seeded model and its tokenizer to `folder` (a normal `from_pretrained` folder)."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(WEIGHT_SEED)
    model = BertForMaskedLM(config).eval()
    generator = torch.Generator().manual_seed(WEIGHT_SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh biases are zero and layer-norm weights one; a mistake in either would stay invisible.
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_rows(path: Path) -> list[dict[str, object]]:
    """Write `rows.json` and return its content."""
    rows = make_rows()
    path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return rows
