"""Draw the alternative word of a row (semantics 4.3)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd


def draw_alternatives(rows: pd.DataFrame, classes: Mapping[str, Sequence[str]], seed: int) -> pd.DataFrame:
    """Every row once per other class, with a word of that class as its alternative.

    Words are drawn by their frequency among the rows of the other class *in the same split*, so that no vocabulary
    crosses splits, and from the given seed, so that runs repeat (BUG-09, BUG-13).

    Args:
        rows: columns split, factual_class, factual and whatever else, which is kept.
        classes: class name to its words.
    """
    random = np.random.default_rng(seed)
    parts = []
    for (split, name), group in rows.groupby(["split", "factual_class"], sort=True):
        for other in classes:
            if other == name:
                continue
            pool = rows[(rows["split"] == split) & (rows["factual_class"] == other)]
            words, weights = _frequencies(pool["factual"], classes[other])
            drawn = random.choice(len(words), size=len(group), p=weights)
            alternatives = [copy_casing(factual, words[k]) for factual, k in zip(group["factual"], drawn, strict=True)]
            parts.append(group.assign(alternative_class=other, alternative=alternatives))
    joined = pd.concat(parts).sort_index(kind="stable", ignore_index=True)
    return joined.assign(transition=joined["factual_class"] + "->" + joined["alternative_class"])


def copy_casing(factual: str, word: str) -> str:
    """`word` in the casing of `factual` (upper, title, lower).

    A word that its class list writes with capitals of its own ("I", "NASA") keeps them, and a one-letter factual
    says nothing about casing.
    """
    if word != word.lower() or len(factual) < 2 or factual.islower():
        return word
    if factual.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if factual[:1].isupper() else word


def _frequencies(observed: pd.Series, words: Sequence[str]) -> tuple[list[str], np.ndarray]:
    counts = observed.str.casefold().value_counts()
    weights = np.array([counts.get(word.casefold(), 0) for word in words], dtype=np.float64)
    return list(words), weights / weights.sum()
