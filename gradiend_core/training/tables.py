"""Files that the training of one seed writes, besides the model."""

from typing import Final

import pyarrow as pa

from gradiend_core.tables import Schema

HISTORY_FILE: Final = "history.parquet"
METRICS_FILE: Final = "metrics.json"

HISTORY: Final[Schema] = {
    "step": pa.int64(),  # optimiser steps done
    "loss": pa.float64(),  # mean training loss since the last evaluation; null at step 0
    "learning_rate": pa.float64(),  # of the last step, in the last group of the optimiser; null at step 0
    "eval_loss": pa.float64(),  # the same loss on the validation rows
    "correlation": pa.float64(),  # Pearson of validation encodings and labels
    "r2": pa.float64(),  # R² of the reconstructed validation gradients
    "mean_positive": pa.float64(),  # mean encoding of rows labelled +1
    "mean_negative": pa.float64(),  # mean encoding of rows labelled -1
    "mean_neutral": pa.float64(),  # mean encoding of neutral rows
    "std_positive": pa.float64(),  # standard deviation of encodings of rows labelled +1
    "std_negative": pa.float64(),  # standard deviation of encodings of rows labelled -1
}
