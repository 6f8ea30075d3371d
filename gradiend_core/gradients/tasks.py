"""Which rows a gradient store holds, in which order."""

import logging
from collections.abc import Sequence

import pandas as pd
from transformers import PreTrainedTokenizerFast

from gradiend_core.gradients.labels import class_label
from gradiend_core.gradients.objectives import encode_unchecked, is_known
from gradiend_core.gradients.store import INDEX, TRAINING

logger = logging.getLogger(__name__)


def usable_neutral(neutral: pd.DataFrame, tokenizer: PreTrainedTokenizerFast, max_length: int) -> pd.DataFrame:
    """The neutral rows that a model can take: their word was drawn blindly and may be unknown, or the text too long."""
    examples = encode_unchecked(tokenizer, list(neutral["masked"]), list(neutral["factual"]))
    usable = [is_known(tokenizer, example) and len(example.input_ids) <= max_length for example in examples]
    left_out = usable.count(False)
    if left_out:
        logger.info("%d of %d neutral rows are left out: word unknown or text too long", left_out, len(usable))
    return neutral[usable]


def store_index(training: pd.DataFrame, neutral: pd.DataFrame, target_classes: Sequence[str]) -> pd.DataFrame:
    """The index of the whole store (`INDEX`; n_positions not yet known): rows of the target pair, then neutral rows.

    Neutral rows have their own word as alternative, so that their alternative gradient is the factual one.
    """
    pair = training["factual_class"].isin(target_classes) & training["alternative_class"].isin(target_classes)
    chosen = training[pair].assign(type=TRAINING)
    chosen["label"] = class_label(chosen, target_classes, "factual")
    others = neutral.assign(alternative=neutral["factual"], label=0.0)
    return pd.concat([chosen, others], ignore_index=True).reindex(columns=list(INDEX))
