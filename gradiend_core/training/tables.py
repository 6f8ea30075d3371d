"""Files that the training of one seed writes, besides the model."""

from typing import Final

import pyarrow as pa

from gradiend_core.tables import Schema

HISTORY_FILE: Final = "history.parquet"
METRICS_FILE: Final = "metrics.json"
RUNNERS_UP_FILE: Final = "runners_up.safetensors"

HISTORY: Final[Schema] = {
    "step": pa.int64(),  # optimiser steps done
    # The next two are null at step 0, and where a training that has stopped looked at the weights that it keeps.
    "loss": pa.float64(),  # mean training loss since the last evaluation
    "learning_rate": pa.float64(),  # of the last step, in the last group of the optimiser
    "eval_loss": pa.float64(),  # the same loss on the validation rows
    "correlation": pa.float64(),  # Pearson of validation encodings and labels
    "r2": pa.float64(),  # R² of the reconstructed validation gradients
    "mean_positive": pa.float64(),  # mean encoding of rows labelled +1
    "mean_negative": pa.float64(),  # mean encoding of rows labelled -1
    "mean_neutral": pa.float64(),  # mean encoding of neutral rows
    "std_positive": pa.float64(),  # standard deviation of encodings of rows labelled +1
    "std_negative": pa.float64(),  # standard deviation of encodings of rows labelled -1
}
