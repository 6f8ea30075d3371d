"""A corpus from a user's own file: what is kept, how it is split, what is said about files that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradiend_core.config.corpora import TextCorpus
from gradiend_core.corpus.texts import TEXTS
from gradiend_core.corpus.user_text import read_texts
from gradiend_core.errors import GradiendError
from gradiend_core.tables import read_table
from pipeline.corpus_text import main

WRITERS: dict[str, Callable[[Path, pd.DataFrame], object]] = {
    ".txt": lambda path, frame: path.write_text("\n".join(frame["text"]) + "\n", "utf-8"),
    ".csv": lambda path, frame: frame.to_csv(path, index=False),
    ".parquet": lambda path, frame: frame.to_parquet(path),
}
TEXTS_100 = [f"Text number {i}, with a comma." for i in range(100)]


def read(path: Path, **params: Any) -> pd.DataFrame:
    return read_texts(path, TextCorpus(path=str(path), **params))


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., Path]:
    def write(**columns: list[Any]) -> Path:
        pd.DataFrame(columns).to_csv(tmp_path / "own.csv", index=False)
        return tmp_path / "own.csv"

    return write


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_yields_the_same_corpus(tmp_path: Path, suffix: str) -> None:
    texts = [*TEXTS_100, " Text number 3, with a comma. ", "", "   ", "None", "NA", "é"]
    WRITERS[suffix](tmp_path / f"own{suffix}", pd.DataFrame({"text": texts}))
    frame = read(tmp_path / f"own{suffix}")
    assert frame["text"].tolist() == [*TEXTS_100, "None", "NA", "é"], "unique, stripped, in file order"
    assert frame["split"].value_counts().to_dict() == {"train": 82, "validation": 10, "test": 11}
    WRITERS[".csv"](tmp_path / "other.csv", pd.DataFrame({"text": texts}))
    pd.testing.assert_frame_equal(frame, read(tmp_path / "other.csv"))


def test_csv_cells_are_taken_as_they_are_written(csv: Callable[..., Path]) -> None:
    assert read(csv(text=[f"{i}.50" for i in range(20)]))["text"].tolist()[:2] == ["0.50", "1.50"]


def test_text_file_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS_100).encode())
    assert read(path)["text"].tolist() == TEXTS_100


def test_parquet_index_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    pd.DataFrame({"text": ["", *TEXTS_100]}, index=[0] * 101).to_parquet(path)
    assert read(path)["text"].tolist() == TEXTS_100


def test_splits_repeat_and_depend_on_the_seed_alone(csv: Callable[..., Path]) -> None:
    path = csv(text=TEXTS_100)
    splits = read(path, seed=1)["split"]
    np.random.seed(7)
    assert read(path, seed=1)["split"].tolist() == splits.tolist()
    other = csv(body=[text.upper() for text in TEXTS_100], noise=range(100))
    assert read(other, seed=1, text_column="body")["split"].tolist() == splits.tolist()
    assert read(path, seed=2, text_column="body", split_column=None)["split"].tolist() != splits.tolist()


def test_ratios(csv: Callable[..., Path]) -> None:
    counts = read(csv(text=TEXTS_100), split_ratios=[0.5, 0.3, 0.2])["split"].value_counts().to_dict()
    assert counts == {"train": 50, "validation": 30, "test": 20}
    assert set(read(csv(text=TEXTS_100), split_ratios=[0.9, 0.1, 0.0])["split"]) == {"train", "validation"}


def test_max_size_draws_from_the_whole_file_and_keeps_its_order(csv: Callable[..., Path]) -> None:
    path = csv(text=TEXTS_100)
    drawn = read(path, max_size=40)["text"].tolist()
    positions = [TEXTS_100.index(text) for text in drawn]
    assert positions == sorted(set(positions))
    assert len(positions) == 40
    assert max(positions) > 80
    assert read(path, max_size=40)["text"].tolist() == drawn
    assert read(path, max_size=40, seed=1)["text"].tolist() != drawn
    assert len(read(path, max_size=1000)) == 100


def test_split_column_in_any_writing(csv: Callable[..., Path]) -> None:
    path = csv(text=["a", "b", "c", "a"], fold=["train", " Val ", "TEST", "test"])
    frame = read(path, split_column="fold")
    assert frame.to_dict("list") == {"text": ["a", "b", "c"], "split": ["train", "validation", "test"]}
    path = csv(text=["a", "b", "c"], fold=["train", "validation", "test"])
    assert read(path, split_column="fold")["split"].tolist() == ["train", "validation", "test"]


def test_unknown_split_is_named_by_its_row(csv: Callable[..., Path]) -> None:
    path = csv(text=["a", "b", "c"], fold=["train", "dev", "test"])
    says = r"own\.csv: row 1 \(the first is 0\): unknown split 'dev'; allowed: train, validation, test"
    with pytest.raises(GradiendError, match=says):
        read(path, split_column="fold")


def test_named_splits_must_all_have_texts(csv: Callable[..., Path]) -> None:
    path = csv(text=["a", "b"], fold=["train", "test"])
    with pytest.raises(GradiendError, match=r"own\.csv: no text in split 'validation' of 2 texts\. Add texts or"):
        read(path, split_column="fold")


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_texts_for_the_splits(csv: Callable[..., Path], n: int) -> None:
    with pytest.raises(GradiendError, match=rf"own\.csv: no text in split '\w+' of {n} texts"):
        read(csv(text=TEXTS_100[:n]))


@pytest.mark.parametrize("value", [None, 3, b"bytes"])
def test_row_without_text_is_named_by_its_number(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "own.parquet"
    pd.DataFrame({"text": pd.Series([value, value, value], dtype="object")}).to_parquet(path)
    with pytest.raises(
        GradiendError, match=r"own\.parquet: row 0 \(the first is 0\): column 'text' holds .*, not text"
    ):
        read(path)
    pd.DataFrame({"text": ["a", "b", None]}).to_parquet(path)
    with pytest.raises(GradiendError, match=r"own\.parquet: row 2 "):
        read(path)


@pytest.mark.parametrize(("params", "missing"), [({"text_column": "body"}, "body"), ({"split_column": "fold"}, "fold")])
def test_missing_column_is_named_with_those_there_are(
    csv: Callable[..., Path], params: dict[str, str], missing: str
) -> None:
    path = csv(text=["a"], id=[1])
    with pytest.raises(GradiendError, match=rf"own\.csv: no column '{missing}'; it has text, id\. Set text_column or"):
        read(path, **params)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("own.txt", None, r"cannot be read \(No such file or directory\)\. Check corpora\.text"),
        ("own.csv", None, r"cannot be read \(No such file or directory\)\. Check corpora\.text"),
        ("own.parquet", None, r"cannot be read \(No such file or directory\)\. Check corpora\.text"),
        ("own.json", b"[]", r"unknown kind of file '\.json'; allowed: \.txt, \.csv, \.parquet"),
        ("own.txt", b"\xff", r"not a readable \.txt file: 'utf-8"),
        ("own.csv", b"\xff", r"not a readable \.csv file"),
        ("own.csv", b"", r"not a readable \.csv file"),
        ("own.csv", b"text\na\nb, and c\n", r"not a readable \.csv file"),
        ("own.csv", b"text\nb, and c\n", r"rows have more cells than the header\. Quote texts that hold commas"),
        ("own.parquet", b"text", r"not a readable \.parquet file"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GradiendError, match=rf"^{path}: {says}"):
        read(path)


def test_text_file_has_no_split_column(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("\n".join(TEXTS_100))
    with pytest.raises(GradiendError, match=r"own\.txt: a \.txt file has no columns\. Set split_column to null"):
        read(path, split_column="split")


def test_stage_writes_the_table_and_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("corpora: {text: {own: {path: own.txt, seed: 3}}}\n")
    Path("own.txt").write_text("\n".join(TEXTS_100))
    arguments = ["--params", "corpora.text.own", "--text", "own.txt", "--output", "corpus"]
    main([*arguments, "--manifest", "a.json"])
    content = Path("corpus/texts.parquet").read_bytes()
    main([*arguments, "--manifest", "b.json"])
    assert Path("corpus/texts.parquet").read_bytes() == content
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert read_table(Path("corpus/texts.parquet"), TEXTS)["text"].tolist() == TEXTS_100
