"""Tables and files that the evaluation stages write."""

from typing import Final

import pyarrow as pa

from gradiend_core.tables import Schema

ENCODINGS_FILE: Final = "encodings.parquet"
GRID_FILE: Final = "grid.parquet"
METRICS_FILE: Final = "metrics.json"  # the numbers one looks at first
DETAILS_FILE: Final = "details.json"  # every encoder metric of every split

BASE_ID: Final = "base"  # the grid's entry for the unmodified model

ENCODINGS: Final[Schema] = {
    "type": pa.string(),  # training, neutral_training_masked or neutral_dataset
    "row": pa.int64(),  # row of training.parquet or neutral.parquet
    "split": pa.string(),
    "masked": pa.string(),
    "factual_class": pa.string(),  # null for neutral rows, like the next
    "alternative_class": pa.string(),
    "factual": pa.string(),
    "alternative": pa.string(),
    "transition": pa.string(),
    "source_id": pa.string(),  # class whose gradient was encoded; the transition for source diff; null if neutral
    "label": pa.float64(),  # +1 first target class, -1 second, 0 neutral
    "encoded": pa.float64(),
}

GRID: Final[Schema] = {
    "id": pa.string(),  # BASE_ID, or "<feature_factor>, <learning_rate>"
    "feature_factor": pa.float64(),  # null for the base
    "learning_rate": pa.float64(),  # null for the base
    "dataset_class": pa.string(),  # factual class of the rows scored
    "scored_class": pa.string(),  # class whose words' probability is given
    "probability": pa.float64(),  # mean over the rows, with its bootstrap interval
    "probability_low": pa.float64(),
    "probability_high": pa.float64(),
    "lms": pa.float64(),  # language-modelling score of the candidate, with its bootstrap interval
    "lms_low": pa.float64(),
    "lms_high": pa.float64(),
}
