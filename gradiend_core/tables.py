"""Parquet tables whose columns are known, with byte-stable output."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gradiend_core.errors import GradiendError
from gradiend_core.files import damaged

Schema = Mapping[str, pa.DataType]
"""Column name to Arrow type, in file order."""


def write_table(path: Path, frame: pd.DataFrame, schema: Schema) -> None:
    """Write `frame` as Parquet with exactly the columns of `schema`; nulls stay nulls, the index is dropped.

    The file holds no pandas metadata and no timestamps, so that equal tables have equal bytes.
    """
    table = pa.Table.from_pandas(frame[list(schema)], schema=pa.schema(list(schema.items())), preserve_index=False)
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd", store_schema=False)


def read_table(path: Path, schema: Schema) -> pd.DataFrame:
    """Read the columns of `schema` from a Parquet file.

    Raises `GradiendError` when the file is missing, damaged, or lacks a column or has one of another type.
    """
    try:
        table = pq.read_table(path)
    except OSError as error:
        if not path.exists():
            raise GradiendError(f"{path}: no such file. Run the stage that makes it first.") from None
        raise damaged(path, f"not readable as Parquet ({error})") from None
    except pa.ArrowException as error:
        raise damaged(path, f"not readable as Parquet ({error})") from None
    for column, kind in schema.items():
        if column not in table.column_names:
            raise damaged(path, f"column {column!r} is missing (it has {', '.join(table.column_names)})")
        if table.schema.field(column).type != kind:
            raise damaged(path, f"column {column!r} has type {table.schema.field(column).type}, not {kind}")
    frame: pd.DataFrame = table.select(list(schema)).to_pandas()
    return frame
