"""A corpus from a user's own file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa

from gradiend_core.config.corpora import TextCorpus
from gradiend_core.corpus.texts import SPLITS
from gradiend_core.errors import GradiendError, out_of_memory
from gradiend_core.tables import open_table

# Read whole, a file takes several times its size of memory; a .csv has few columns of which one or two are read.
MAX_FILE_BYTES: Final = 2**33
MAX_COLUMNS: Final = 10_000

_NAMED: Final = 50  # columns in an error message

_SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation"}


def read_texts(path: Path, params: TextCorpus) -> pd.DataFrame:
    """The texts of a file: columns text (stripped, unique, in file order) and split.

    Raises `GradiendError` when the file cannot be read, is too large, lacks a named column, holds a row without text
    or with an unknown split, or yields too few texts to fill three splits.
    """
    frame = _read(path, params)
    frame = frame.assign(text=frame["text"].str.strip())
    frame = frame[frame["text"] != ""].drop_duplicates("text", ignore_index=True)
    random = np.random.default_rng(params.seed)
    if params.max_size is not None and params.max_size < len(frame):
        kept = np.sort(random.choice(len(frame), params.max_size, replace=False))
        frame = frame.iloc[kept].reset_index(drop=True)
    if params.split_column is None:
        frame["split"] = _draw_splits(len(frame), params.split_ratios, random)
    for split, ratio in zip(SPLITS, params.split_ratios, strict=True):
        if not (frame["split"] == split).any() and (ratio > 0 or params.split_column is not None):
            raise GradiendError(
                f"{path}: no text in split {split!r} of {len(frame)} texts. Add texts or change the splits."
            )
    return frame[["text", "split"]]


def _read(path: Path, params: TextCorpus) -> pd.DataFrame:
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise GradiendError(f"{path}: {size} bytes; at most {MAX_FILE_BYTES} are read. Use a part of the texts.")
        if path.suffix == ".txt":
            return _read_lines(path, params)
        if path.suffix == ".csv":
            frame = _read_csv(path, params)
        elif path.suffix == ".parquet":
            with open_table(path) as file:
                frame = file.read(columns=_wanted(path, file.schema_arrow.names, params)).to_pandas()
        else:
            raise GradiendError(f"{path}: unknown kind of file {path.suffix!r}; allowed: .txt, .csv, .parquet")
    except OSError as error:
        raise GradiendError(f"{path}: cannot be read ({error.strerror}). Check corpora.text.*.path.") from None
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError, pa.ArrowException) as error:
        if out_of_memory(error):
            raise
        raise GradiendError(f"{path}: not a readable {path.suffix} file: {error}") from None
    texts = frame[params.text_column]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            place = f"{path}: row {row} (the first is 0)"
            raise GradiendError(f"{place}: column {params.text_column!r} holds {text!r}, not text")
    splits = [""] * len(frame) if params.split_column is None else _named_splits(path, frame[params.split_column])
    return pd.DataFrame({"text": pd.Series(list(texts), dtype="str"), "split": splits})


def _read_csv(path: Path, params: TextCorpus) -> pd.DataFrame:
    header = pd.read_csv(path, dtype="str", nrows=0)
    if len(header.columns) > MAX_COLUMNS:
        raise GradiendError(f"{path}: {len(header.columns)} columns; at most {MAX_COLUMNS} are read. Leave some out.")
    wanted = _wanted(path, list(header.columns), params)
    # Every cell as it is written: a text "None" or "1.0" is a text.
    frame = pd.read_csv(path, dtype="str", keep_default_na=False)
    if not isinstance(frame.index, pd.RangeIndex):
        raise GradiendError(f"{path}: rows have more cells than the header. Quote texts that hold commas.")
    return frame[wanted]


def _wanted(path: Path, names: Sequence[str], params: TextCorpus) -> list[str]:
    """The columns to read, all of them among `names`."""
    columns = dict.fromkeys((params.text_column, params.split_column))
    wanted = [column for column in columns if column is not None]
    for column in wanted:
        if column not in names:
            some = ", ".join(map(str, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
            raise GradiendError(f"{path}: no column {column!r}; it has {some}. Set text_column or split_column.")
    return wanted


def _read_lines(path: Path, params: TextCorpus) -> pd.DataFrame:
    if params.split_column is not None:
        raise GradiendError(f"{path}: a .txt file has no columns. Set split_column to null, or use .csv or .parquet.")
    # utf-8-sig: editors on Windows begin a file with a mark that would stick to the first text.
    return pd.DataFrame({"text": pd.Series(path.read_text("utf-8-sig").splitlines(), dtype="str"), "split": ""})


def _named_splits(path: Path, splits: pd.Series) -> list[str]:
    named = []
    for row, name in enumerate(splits):
        split = _SPLIT_NAMES.get(str(name).strip().lower())
        if split is None:
            place = f"{path}: row {row} (the first is 0)"
            raise GradiendError(f"{place}: unknown split {name!r}; allowed: {', '.join(SPLITS)}")
        named.append(split)
    return named


def _draw_splits(n: int, ratios: list[float], random: np.random.Generator) -> list[str]:
    """Each text's split: the rounding of the reference (train and validation rounded, test the rest)."""
    n_train, n_validation = round(n * ratios[0]), round(n * ratios[1])
    names = [SPLITS[0]] * n_train + [SPLITS[1]] * n_validation + [SPLITS[2]] * (n - n_train - n_validation)
    return [names[position] for position in random.permutation(n)]
