"""Which texts become rows, which words stand against each other, and what is neutral."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradiend_core.config.datasets import Dataset
from gradiend_core.corpus.texts import SPLITS, TEXTS
from gradiend_core.data.alternatives import copy_casing, draw_alternatives
from gradiend_core.data.filters import maskable_words, match_text, word_pattern
from gradiend_core.data.generate import neutral_rows, training_rows
from gradiend_core.data.tables import NEUTRAL, TRAINING
from gradiend_core.errors import GradiendError
from gradiend_core.tables import write_table
from pipeline.generate_data import main

NUMBER = {"3SG": ["he", "she", "it"], "3PL": ["they", "these"]}
WHERE = "params.yaml: datasets.number"


def dataset(classes: dict[str, list[str]] = NUMBER, **params: Any) -> Dataset:
    return Dataset(corpus="own", classes=classes, **{"min_left_context_words": 0, **params})


def corpus(*sentences: str, n: int = 6) -> pd.DataFrame:
    """`n` numbered copies of every sentence in each split, interleaved."""
    rows = [(f"{text} ({i} {split})", split) for i in range(n) for split in SPLITS for text in sentences]
    return pd.DataFrame(rows, columns=["text", "split"])


def rows_of(texts: pd.DataFrame, params: Dataset) -> pd.DataFrame:
    return training_rows(texts, params, where=WHERE)


@pytest.fixture
def texts() -> pd.DataFrame:
    return corpus("Then he left", "Then She left", "Then it left", "Then they left", "Then these left", "Nobody left")


def matched(text: str, words: Sequence[str], least: int = 0) -> tuple[str, str] | None:
    return match_text(text, word_pattern(words), min_left_context_words=least)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("so HE left", ["he"], ("so [MASK] left", "HE")),
        ("the hero, she", ["he"], None),
        ("its cat", ["it"], None),
        ("its cat saw it.", ["it"], ("its cat saw [MASK].", "it")),
        ("is it's or it?", ["it"], ("is [MASK]'s or [MASK]?", "it")),
        ("été", ["t"], None),
        ("we saw each other", ["each", "each other"], ("we saw [MASK]", "each other")),
        ("they or them", ["they", "them"], None),
        ("they, They", ["they"], None),
        ("they, they", ["they"], ("[MASK], [MASK]", "they")),
        ("a [MASK] for they", ["they"], None),
        ("a.b axb", ["a.b"], ("[MASK] axb", "a.b")),
        ("anything", [], None),
    ],
)
def test_text_becomes_a_template(text: str, words: list[str], expected: tuple[str, str] | None) -> None:
    assert matched(text, words) == expected


def test_early_occurrence_leaves_the_text_out() -> None:
    """WEAK-12: the reference keeps the text and masks later occurrences only, which tells the answer."""
    assert matched("one two they four they", ["they"], 2) == ("one two [MASK] four [MASK]", "they")
    assert matched("one two they four they", ["they"], 3) is None
    assert matched("one -- 2, they", ["they"], 2) is not None, "punctuation is no word, a number is"


def test_rows_are_every_qualifying_text_in_order(texts: pd.DataFrame) -> None:
    rows = rows_of(texts, dataset())
    assert list(rows.columns) == list(TRAINING)
    assert rows["row"].tolist() == list(range(len(rows)))
    assert rows["text"].tolist() == [text for text in texts["text"] if "Nobody" not in text]
    assert rows["split"].tolist() == texts.set_index("text")["split"].loc[rows["text"]].tolist()
    for row in rows.to_dict("records"):
        assert row["masked"].replace("[MASK]", row["factual"]) == row["text"]
        assert row["transition"] == row["factual_class"] + "->" + row["alternative_class"]
        assert row["factual"].lower() in NUMBER[row["factual_class"]]
        assert row["alternative"].lower() in NUMBER[row["alternative_class"]]
        assert row["factual_class"] != row["alternative_class"]


def test_every_transition_once_per_text_for_three_classes(texts: pd.DataFrame) -> None:
    rows = rows_of(texts, dataset({"a": ["he"], "b": ["she", "it"], "c": ["they"]}))
    for _, group in rows.groupby("text"):
        found = {(row["factual_class"], row["alternative_class"]) for row in group.to_dict("records")}
        assert len(group) == len(found) == 2
        assert len({factual for factual, _ in found}) == 1
    assert set(rows["transition"]) == {"a->b", "a->c", "b->a", "b->c", "c->a", "c->b"}


def test_text_with_words_of_two_classes_is_a_row_of_each() -> None:
    rows = rows_of(corpus("so he and they left"), dataset())
    first = rows[rows["text"] == rows["text"][0]]
    assert sorted(zip(first["factual_class"], first["masked"], strict=True)) == [
        ("3PL", "so he and [MASK] left (0 train)"),
        ("3SG", "so [MASK] and they left (0 train)"),
    ]


def test_alternatives_never_cross_splits(texts: pd.DataFrame) -> None:
    planted = pd.DataFrame([(f"Then those left {i}", "test") for i in range(50)], columns=["text", "split"])
    rows = rows_of(
        pd.concat([texts, planted], ignore_index=True),
        dataset({"3SG": NUMBER["3SG"], "3PL": ["they", "these", "those"]}),
    )
    splits = set(rows.loc[rows["alternative"].str.lower() == "those", "split"])
    assert splits == {"test"}


def test_alternatives_are_seeded_and_deaf_to_the_global_generator(texts: pd.DataFrame) -> None:
    """BUG-13."""
    first = rows_of(texts, dataset(seed=1))
    np.random.seed(3)
    pd.testing.assert_frame_equal(first, rows_of(texts, dataset(seed=1)))
    assert first["alternative"].tolist() != rows_of(texts, dataset(seed=2))["alternative"].tolist()


def test_alternatives_are_drawn_by_frequency() -> None:
    """BUG-09: the reference always takes the first word of a merged table."""
    words = ["he"] * 600 + ["she"] * 300 + ["It"] * 100 + ["they"] * 1000
    texts = pd.DataFrame({"text": [f"then {word} {i}" for i, word in enumerate(words)], "split": "train"})
    rows = rows_of(texts, dataset())
    drawn = rows.loc[rows["factual_class"] == "3PL", "alternative"].value_counts()
    expected = pd.Series({"he": 600, "she": 300, "it": 100})
    chi_square = float(((drawn.reindex(expected.index).fillna(0) - expected) ** 2 / expected).sum())
    assert drawn.sum() == 1000
    assert chi_square < 13.8, "exceeded once in a thousand by chance (2 degrees of freedom)"


def test_word_that_never_occurs_is_never_an_alternative(texts: pd.DataFrame) -> None:
    rows = rows_of(texts, dataset({"3SG": ["xe", *NUMBER["3SG"]], "3PL": NUMBER["3PL"]}))
    assert "xe" not in set(rows["alternative"])


def test_other_columns_are_kept() -> None:
    frame = pd.DataFrame({"split": "train", "factual_class": ["a", "b"], "factual": ["x", "y"], "extra": [1, 2]})
    drawn = draw_alternatives(frame, {"a": ["x"], "b": ["y"]}, 0)
    assert drawn["extra"].tolist() == [1, 2]
    assert drawn["alternative"].tolist() == ["y", "x"]


@pytest.mark.parametrize(
    ("factual", "word", "expected"),
    [
        ("he", "they", "they"),
        ("He", "they", "They"),
        ("HE", "they", "THEY"),
        ("I", "they", "they"),
        ("they", "I", "I"),
        ("They", "NASA", "NASA"),
        ("Each other", "one another", "One another"),
        ("iPhone", "they", "they"),
    ],
)
def test_alternative_copies_the_casing(factual: str, word: str, expected: str) -> None:
    assert copy_casing(factual, word) == expected


def test_casing_reaches_the_rows(texts: pd.DataFrame) -> None:
    rows = rows_of(texts, dataset())
    assert set(rows.loc[rows["factual"] == "She", "alternative"]) <= {"They", "These"}
    assert set(rows.loc[rows["factual"] == "he", "alternative"]) <= {"they", "these"}


def test_class_without_rows_is_named(texts: pd.DataFrame) -> None:
    says = r"^params.yaml: datasets\.number\.classes\.none: none of the texts of corpus 'own' .* \['zzz'\].*now 0\)"
    with pytest.raises(GradiendError, match=says):
        rows_of(texts, dataset({"3SG": ["he"], "none": ["zzz"]}))


def test_class_without_rows_in_a_split_is_named(texts: pd.DataFrame) -> None:
    some = texts[(texts["split"] != "test") | ~texts["text"].str.contains("they|these")]
    with pytest.raises(GradiendError, match=r"classes\.3PL: 24 rows, but none in split test\. Add .* there\.$"):
        rows_of(some, dataset())
    with pytest.raises(GradiendError, match=r"but none in split .*, or raise max_size_per_class \(1\)\.$"):
        rows_of(texts, dataset(max_size_per_class=1))


def test_cap_per_class_draws_from_all_texts() -> None:
    texts = corpus("Then he left", "Then they left", n=100)
    rows = rows_of(texts, dataset(max_size_per_class=60))
    assert rows["factual_class"].value_counts().to_dict() == {"3SG": 60, "3PL": 60}
    assert set(rows["split"]) == set(SPLITS)
    positions = [texts["text"].tolist().index(text) for text in rows["text"]]
    assert positions == sorted(positions)
    assert max(positions) > 500
    assert rows_of(texts, dataset(max_size_per_class=60))["text"].tolist() == rows["text"].tolist()


def neutral(texts: pd.DataFrame, params: Dataset) -> pd.DataFrame:
    return neutral_rows(texts, rows_of(texts, params), params)


@pytest.fixture
def mixed() -> pd.DataFrame:
    return corpus(
        *("Then he saw each other thing", "so THEY saw a dog", "The dog, Its tail and 2 cats", "That was it", "12 3?"),
        *("Nobody saw the dog run", "Each other thing was red", "a [MASK] is here"),
    )


def test_neutral_rows_mask_one_word_that_is_no_class_word(mixed: pd.DataFrame) -> None:
    params = dataset({"3SG": ["he", "it"], "3PL": ["they"]}, additional_excluded_words=["dog", "each other"])
    rows = neutral(mixed, params)
    assert list(rows.columns) == list(NEUTRAL)
    assert rows["row"].tolist() == list(range(len(rows)))
    assert set(rows["split"]) == {"validation", "test"}
    assert set(rows["type"]) == {"neutral_dataset", "neutral_training_masked"}
    class_word = re.compile(r"\b(he|it|they)\b", re.IGNORECASE)
    for row in rows.to_dict("records"):
        assert row["masked"].count("[MASK]") == 1
        assert row["masked"].replace("[MASK]", row["factual"]) == row["text"]
        assert row["factual"].lower() not in {"he", "it", "they", "dog", "each", "other"}
        assert any(map(str.isalpha, row["factual"]))
        assert (class_word.search(row["text"]) is None) == (row["type"] == "neutral_dataset")
    texts = rows.loc[rows["type"] == "neutral_dataset", "text"]
    assert not texts.str.contains("(?i)dog|each other").any()


def test_word_inside_an_excluded_phrase_is_not_masked() -> None:
    excluded = word_pattern(["each other", "it"])
    words = [found.group() for found in maskable_words("It's 3 of each other, Each one x2", excluded)]
    assert words == ["s", "of", "Each", "one", "x2"]


@pytest.mark.parametrize("size", [0, 1, 5])
def test_neutral_rows_of_each_type_are_capped(texts: pd.DataFrame, size: int) -> None:
    rows = neutral(texts, dataset(neutral_max_size=size))
    counts = rows["type"].value_counts().to_dict()
    assert counts == ({"neutral_dataset": size, "neutral_training_masked": size} if size else {})


def test_neutral_rows_are_seeded(texts: pd.DataFrame) -> None:
    params = dataset(neutral_max_size=5)
    pd.testing.assert_frame_equal(neutral(texts, params), neutral(texts, params))
    assert not neutral(texts, params).equals(neutral(texts, dataset(neutral_max_size=5, seed=1)))


def test_corpus_without_neutral_texts_still_has_masked_training_texts() -> None:
    rows = neutral(corpus("Then he left", "Then they left"), dataset())
    assert set(rows["type"]) == {"neutral_training_masked"}


def stage(name: str) -> dict[str, bytes]:
    folder = Path(name)
    main(["--params", "datasets.number", "--corpus", "corpus", "--output", name, "--manifest", f"{name}.json"])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("neutral_max_size", [0, 4])
def test_stage_writes_the_same_bytes_again(
    texts: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, neutral_max_size: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    write_table(Path("corpus/texts.parquet"), texts, TEXTS)
    Path("params.yaml").write_text(
        "datasets: {number: {corpus: own, classes: {3SG: [he, she, it], 3PL: [they, these]},"
        f" min_left_context_words: 1, neutral_max_size: {neutral_max_size}}}}}\n"
    )
    first = stage("one")
    assert set(first) == {"training.parquet", "neutral.parquet"}
    assert stage("two") == first
    assert len(pd.read_parquet("one/neutral.parquet")) == 2 * neutral_max_size


def test_stage_names_the_key_and_leaves_nothing(
    texts: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    write_table(Path("corpus/texts.parquet"), texts, TEXTS)
    Path("params.yaml").write_text("datasets: {number: {corpus: own, classes: {a: [he], b: [they]}}}\n")
    with pytest.raises(GradiendError, match=r"^params\.yaml: datasets\.number\.classes\.a: none of .*\(now 10\)"):
        stage("one")
    assert not Path("one.json").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".parquet"][1:]
