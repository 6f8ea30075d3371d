"""The table that every corpus stage writes."""

from typing import Final

import pyarrow as pa

from gradiend_core.tables import Schema

TEXTS_FILE: Final = "texts.parquet"
SPLITS: Final = ("train", "validation", "test")

TEXTS: Final[Schema] = {
    "text": pa.string(),  # unique
    "split": pa.string(),  # one of SPLITS; every row made from the text inherits it
}
