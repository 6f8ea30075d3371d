"""Parquet tables whose columns are known, with byte-stable output."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gradiend_core.errors import GradiendError, out_of_memory
from gradiend_core.files import damaged

Schema = Mapping[str, pa.DataType]
"""Column name to Arrow type, in file order."""

# What a file may say of itself before any of it is read. All three are far beyond a table that can be worked with,
# and cost little memory: a footer is parsed whole, and describes about 100 000 columns in 16 MiB.
MAX_FOOTER_BYTES: Final = 2**24
MAX_ROWS: Final = 10**8
MAX_TABLE_BYTES: Final = 2**35  # of decompressed columns


def write_table(path: Path, frame: pd.DataFrame, schema: Schema) -> None:
    """Write `frame` as Parquet with exactly the columns of `schema`; nulls stay nulls, the index is dropped.

    The file holds no pandas metadata and no timestamps, so that equal tables have equal bytes.
    """
    table = pa.Table.from_pandas(frame[list(schema)], schema=pa.schema(list(schema.items())), preserve_index=False)
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd", store_schema=False)


def open_table(path: Path) -> pq.ParquetFile:
    """Open a Parquet file of which nothing but the footer is read, once its length is known to be sensible.

    Raises `OSError` or `ArrowException` when it cannot be read, `GradiendError` when it is too large.
    """
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8))
        length, mark = stream.read(4), stream.read(4)
    if mark == b"PAR1":  # else it is no Parquet file, as pyarrow says
        _limit(path, "a footer of {} bytes", int.from_bytes(length, "little"), MAX_FOOTER_BYTES)
    file = pq.ParquetFile(path)
    groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
    _limit(path, "{} rows", file.metadata.num_rows, MAX_ROWS)
    _limit(path, "{} bytes of data", sum(group.total_byte_size for group in groups), MAX_TABLE_BYTES)
    return file


def read_table(path: Path, schema: Schema) -> pd.DataFrame:
    """Read the columns of `schema` from a Parquet file; others are not looked at.

    Raises `GradiendError` when the file is missing, damaged, too large, or lacks a column or has one of another type.
    """
    try:
        with open_table(path) as file:
            names = file.schema_arrow.names
            table = file.read(columns=[column for column in schema if column in names])
    except (OSError, pa.ArrowException) as error:
        if out_of_memory(error):
            raise
        if not path.exists():
            raise GradiendError(f"{path}: no such file. Run the stage that makes it first.") from None
        raise damaged(path, f"not readable as Parquet ({error})") from None
    for column, kind in schema.items():
        if column not in names:
            raise damaged(path, f"column {column!r} is missing (it has {', '.join(names)})")
        if table.schema.field(column).type != kind:
            raise damaged(path, f"column {column!r} has type {table.schema.field(column).type}, not {kind}")
    frame: pd.DataFrame = table.select(list(schema)).to_pandas()
    return frame


def _limit(path: Path, what: str, found: int, most: int) -> None:
    if found > most:
        raise GradiendError(f"{path}: it says that it has {what.format(found)}; at most {most} are read. Use a part.")
