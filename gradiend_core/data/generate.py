"""Training rows and neutral rows of one feature from a corpus (semantics 4)."""

import logging
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from gradiend_core.config.datasets import Dataset
from gradiend_core.data.alternatives import draw_alternatives
from gradiend_core.data.filters import maskable_words, match_text, word_pattern
from gradiend_core.data.tables import NEUTRAL, NEUTRAL_DATASET, NEUTRAL_TRAINING_MASKED, SLOT, TRAINING
from gradiend_core.errors import GradiendError

logger = logging.getLogger(__name__)


def training_rows(texts: pd.DataFrame, params: Dataset, *, where: str) -> pd.DataFrame:
    """The training table (`TRAINING`): every qualifying text of every class, once per other class.

    Args:
        texts: columns text and split.
        where: what to call the dataset in errors, e.g. `params.yaml: datasets.number`.

    Raises:
        GradiendError: a class has no row at all, or none in one of the corpus' splits.
    """
    random = np.random.default_rng(params.seed)
    splits = sorted(set(texts["split"]))
    found = []
    for name, words in params.classes.items():
        rows = _class_rows(texts, name, words, params)
        _require_rows(rows, name, splits, params, where)
        if params.max_size_per_class is not None and params.max_size_per_class < len(rows):
            rows = rows.iloc[np.sort(random.choice(len(rows), params.max_size_per_class, replace=False))]
            _require_rows(rows, name, splits, params, where)
        found.append(rows)
    factual = pd.concat(found).sort_index(kind="stable", ignore_index=True)
    rows = draw_alternatives(factual, params.classes, params.seed)
    for kind, group in rows.groupby(["split", "transition"]):
        logger.info("%s: %d training rows", " ".join(map(str, kind)), len(group))
    return rows.assign(row=np.arange(len(rows)))[list(TRAINING)]


def neutral_rows(texts: pd.DataFrame, training: pd.DataFrame, params: Dataset) -> pd.DataFrame:
    """The neutral table (`NEUTRAL`): held-out texts and training texts with one word masked that is no class word.

    The masked word is chosen without a tokenizer, so that every base model sees the same neutral rows. None of
    them comes from the train split.
    """
    words = [word for names in params.classes.values() for word in names]
    excluded = word_pattern([*words, *params.additional_excluded_words])
    held_out = texts[texts["split"] != "train"]
    neutral = held_out[~held_out["text"].str.contains(excluded)]
    used = training[training["split"] != "train"].drop_duplicates("text")
    random = np.random.default_rng(params.seed)
    rows = pd.concat(
        [
            _mask_one_word(neutral, NEUTRAL_DATASET, excluded, params, random),
            _mask_one_word(used, NEUTRAL_TRAINING_MASKED, excluded, params, random),
        ],
        ignore_index=True,
    )
    for kind, count in rows["type"].value_counts(sort=False).items():
        logger.info("%d rows of type %s", count, kind)
    return rows.assign(row=np.arange(len(rows)))[list(NEUTRAL)]


def _class_rows(texts: pd.DataFrame, name: str, words: Sequence[str], params: Dataset) -> pd.DataFrame:
    """One row per qualifying text, indexed like `texts`."""
    pattern = word_pattern(words)
    matches = {}
    for index, text in zip(texts.index, texts["text"], strict=True):
        match = match_text(text, pattern, min_left_context_words=params.min_left_context_words)
        if match is not None:
            matches[index] = match
    rows = pd.DataFrame(matches.values(), index=pd.Index(matches, dtype="int64"), columns=["masked", "factual"])
    return texts.loc[rows.index, ["text", "split"]].join(rows).assign(factual_class=name)


def _require_rows(rows: pd.DataFrame, name: str, splits: Sequence[str], params: Dataset, where: str) -> None:
    place, words = f"{where}.classes.{name}", params.classes[name]
    if rows.empty:
        raise GradiendError(
            f"{place}: none of the texts of corpus {params.corpus!r} qualifies for the words {words}. Check the words,"
            f" lower min_left_context_words (now {params.min_left_context_words}), or add texts."
        )
    missing = [split for split in splits if split not in set(rows["split"])]
    if missing:
        cap = (
            "" if params.max_size_per_class is None else f", or raise max_size_per_class ({params.max_size_per_class})"
        )
        raise GradiendError(
            f"{place}: {len(rows)} rows, but none in split {' or '.join(missing)}."
            f" Add texts with the words {words} there{cap}."
        )


def _mask_one_word(
    texts: pd.DataFrame, kind: str, excluded: re.Pattern[str], params: Dataset, random: np.random.Generator
) -> pd.DataFrame:
    """At most `neutral_max_size` of `texts`, each with one random word replaced by the slot marker."""
    order = np.sort(random.permutation(len(texts))[: params.neutral_max_size])
    return pd.DataFrame(_masked(texts.iloc[order], kind, excluded, params, random), columns=list(NEUTRAL)[1:])


def _masked(
    texts: pd.DataFrame, kind: str, excluded: re.Pattern[str], params: Dataset, random: np.random.Generator
) -> Iterator[tuple[str, str, str, str, str]]:
    for text, split in zip(texts["text"], texts["split"], strict=True):
        words = [] if SLOT in text else list(maskable_words(text, excluded))
        if words:
            word = words[random.integers(len(words))]
            masked = text[: word.start()] + SLOT + text[word.end() :]
            yield kind, text, masked, split, word.group()
