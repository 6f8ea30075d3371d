"""Which rows a gradient store holds, in which order."""

from collections.abc import Sequence

import pandas as pd

from gradiend_core.gradients.importance import class_label
from gradiend_core.gradients.store import INDEX, TRAINING


def store_index(training: pd.DataFrame, neutral: pd.DataFrame, target_classes: Sequence[str]) -> pd.DataFrame:
    """The index of the whole store (`INDEX`; n_positions not yet known): rows of the target pair, then neutral rows.

    Neutral rows have their own word as alternative, so that their alternative gradient is the factual one.
    """
    pair = training["factual_class"].isin(target_classes) & training["alternative_class"].isin(target_classes)
    chosen = training[pair].assign(type=TRAINING)
    chosen["label"] = class_label(chosen, target_classes, "factual")
    others = neutral.assign(alternative=neutral["factual"], label=0.0)
    return pd.concat([chosen, others], ignore_index=True).reindex(columns=list(INDEX))
