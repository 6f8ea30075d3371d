"""The label of a row: which class its gradient stands for."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

Source = Literal["factual", "alternative", "diff"]


def class_label(rows: pd.DataFrame, target_classes: Sequence[str], source: Source) -> np.ndarray:
    """+1 or -1 for the class whose gradient `source` stands for, 0 for others (semantics 2.5).

    +1 when the factual class is the first target class, -1 when it is the second; negated for source alternative.
    """
    signs = {target_classes[0]: 1.0, target_classes[1]: -1.0}
    labels = rows["factual_class"].map(signs).fillna(0.0).to_numpy(dtype=np.float64)
    return -labels + 0.0 if source == "alternative" else labels
