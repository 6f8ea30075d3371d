"""The two tables of a dataset: training rows and neutral rows."""

from typing import Final

import pyarrow as pa

from gradiend_core.tables import Schema

TRAINING_FILE: Final = "training.parquet"
NEUTRAL_FILE: Final = "neutral.parquet"

SLOT: Final = "[MASK]"  # marks the place of the word in a template, whatever the tokenizer

# One row is one ordered transition of one template (semantics 4.2).
TRAINING: Final[Schema] = {
    "row": pa.int64(),  # 0 … n-1
    "text": pa.string(),
    "masked": pa.string(),  # the text with a slot for every occurrence of the factual word
    "split": pa.string(),  # inherited from the text
    "factual_class": pa.string(),
    "alternative_class": pa.string(),
    "factual": pa.string(),  # the word as it stands in the text
    "alternative": pa.string(),  # a word of the other class, drawn within the split, in the factual's casing
    "transition": pa.string(),  # "factual_class->alternative_class"
}

NEUTRAL_DATASET: Final = "neutral_dataset"  # a text without any class word, one random word masked
NEUTRAL_TRAINING_MASKED: Final = "neutral_training_masked"  # a training text, another random word masked

NEUTRAL: Final[Schema] = {
    "row": pa.int64(),
    "type": pa.string(),  # NEUTRAL_DATASET or NEUTRAL_TRAINING_MASKED
    "text": pa.string(),
    "masked": pa.string(),
    "split": pa.string(),  # never train
    "factual": pa.string(),  # the masked word
}
