"""The demo corpus: what a reader of a sentence can rely on, and what is said about broken grammar files."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from gradiend_core.corpus.grammar import generate_sentences
from gradiend_core.errors import GradiendError

GRAMMAR = Path(__file__).parents[2] / "data" / "english"
WORDS = yaml.safe_load((GRAMMAR / "words.yaml").read_text("utf-8"))
PRONOUNS = ("he", "she", "it", "they")
POSSESSIVE = {"he": "his", "she": "her", "it": "its", "they": "their"}
ALL_PRONOUNS = {*PRONOUNS, "him", "her", "his", "hers", "its", "them", "their", "theirs"}
SINGULAR = {"this", "that", "one", "every", "is", "was", "has"}
PLURAL = {"these", "those", "two", "many", "are", "were", "have"}


def _tokens(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


@pytest.fixture(scope="module")
def sentences() -> pd.DataFrame:
    frame = generate_sentences(GRAMMAR, max_size=30000, seed=0)
    frame["tokens"] = frame["text"].map(_tokens)
    frame["pronouns"] = frame["tokens"].map(lambda tokens: [token for token in tokens if token in PRONOUNS])
    return frame


def test_sizes(sentences: pd.DataFrame) -> None:
    assert len(sentences) == 30000
    assert sentences["text"].is_unique
    assert sentences["tokens"].map(len).max() <= 24
    assert 500 <= len({token for tokens in sentences["tokens"] for token in tokens}) <= 1500
    shares = sentences["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.8, abs=0.02)
    assert shares["validation"] == pytest.approx(0.1, abs=0.02)
    assert shares["test"] == pytest.approx(0.1, abs=0.02)


def test_pronouns(sentences: pd.DataFrame) -> None:
    assert set(sentences["pronouns"].map(len)) == {0, 1}
    counts = sentences["pronouns"].explode().value_counts()
    assert all(counts[pronoun] >= 2500 for pronoun in PRONOUNS)
    assert counts["they"] >= 6000
    neutral = sentences[sentences["pronouns"].map(len) == 0]
    assert len(neutral) >= 6000
    assert not any(ALL_PRONOUNS & set(tokens) for tokens in neutral["tokens"])


def test_possessives_agree_with_the_pronoun(sentences: pd.DataFrame) -> None:
    for tokens, pronouns in zip(sentences["tokens"], sentences["pronouns"], strict=True):
        possessives = set(tokens) & set(POSSESSIVE.values())
        assert possessives <= {POSSESSIVE[pronoun] for pronoun in pronouns}, " ".join(tokens)


def test_verb_after_the_pronoun_agrees(sentences: pd.DataFrame) -> None:
    plural = {"are", "were", "have"}
    for tokens, pronouns in zip(sentences["tokens"], sentences["pronouns"], strict=True):
        for pronoun in pronouns:
            following = tokens[tokens.index(pronoun) + 1]
            if following in plural | {"is", "was", "has"}:
                assert (following in plural) == (pronoun == "they"), " ".join(tokens)


def test_names_and_nouns_of_one_gender_decide_the_pronoun(sentences: pd.DataFrame) -> None:
    gender = {name.lower(): "he" for name in WORDS["names"]["masculine_name"]}
    gender |= {name.lower(): "she" for name in WORDS["names"]["feminine_name"]}
    for noun_table, pronoun in (("masculine_noun", "he"), ("feminine_noun", "she")):
        gender |= {row.split()[0]: pronoun for row in WORDS["nouns"][noun_table]}
    checked = 0
    for tokens, pronouns in zip(sentences["tokens"], sentences["pronouns"], strict=True):
        people = [gender[token] for token in tokens if token in gender]
        if pronouns in (["he"], ["she"]):
            assert pronouns[0] in people, " ".join(tokens)
            checked += 1
    assert checked > 10000


def test_held_out_nouns(sentences: pd.DataFrame) -> None:
    held_out = set(WORDS["held_out"])
    rows = sentences[sentences["tokens"].map(lambda tokens: bool(held_out & set(tokens)))]
    assert set(rows["split"]) == {"validation", "test"}
    assert set(rows["pronouns"].explode()) == {"it", "they"}
    for tokens, pronouns in zip(rows["tokens"], rows["pronouns"], strict=True):
        shown = {*tokens} & (SINGULAR if pronouns == ["it"] else PLURAL)
        agreeing = {row.split()[1 if pronouns == ["it"] else 0] for rows in WORDS["verbs"].values() for row in rows}
        assert shown or agreeing & set(tokens) or set(tokens) & {"its", "their"}, " ".join(tokens)
    assert not any(noun.startswith(PRONOUNS) for noun in held_out), "a tokenizer may split off the pronoun"


def test_pairs_of_head_and_verb_belong_to_one_split(sentences: pd.DataFrame) -> None:
    forms = {form: row.split()[0] for rows in WORDS["verbs"].values() for row in rows for form in row.split()}
    pattern = re.compile(r"^(?:The|This|That) (\w+) (\w+) because")
    splits: dict[tuple[str, str], set[str]] = {}
    for text, split in zip(sentences["text"], sentences["split"], strict=True):
        match = pattern.match(text)
        if match and match[2] in forms:
            splits.setdefault((match[1], forms[match[2]]), set()).add(split)
    assert len(splits) > 200
    assert all(len(where) == 1 for where in splits.values())


def test_deterministic() -> None:
    first = generate_sentences(GRAMMAR, max_size=500, seed=3)
    pd.testing.assert_frame_equal(first, generate_sentences(GRAMMAR, max_size=500, seed=3))
    assert set(first["text"]) != set(generate_sentences(GRAMMAR, max_size=500, seed=4)["text"])


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("words.yaml", "animal: [horse horses,", "animal: [horse,", "nouns.animal: 'horse' has 1 forms, not 2"),
        ("words.yaml", "animal: [horse horses,", "animal: [dog dogs,", "nouns.animal: 'dog' is listed twice"),
        ("words.yaml", "held_out: [deer,", "held_out: [unicorn,", "held_out: 'unicorn'"),
        ("words.yaml", "names:", "nmes:", "words.yaml: names: "),
        ("scenes.yaml", "bakery:\n", "bakery:\n  people: [x y]\n", "scenes.yaml: bakery.people: "),
        (
            "grammar.yaml",
            "[broken parts, loose screws, bent handle, rusty chain]",
            "[]",
            "grammar.yaml: phrases.part: ",
        ),
        ("grammar.yaml", "words: animal,", "words: animl,", "'animl' is unknown. Did you mean 'animal'?"),
        ("grammar.yaml", "{np} told {somebody}", "{np} told {some_body}", "Did you mean 'somebody'?"),
        ("grammar.yaml", "  - fell asleep", "  - fell {event}", "contains itself"),
        ("grammar.yaml", "classes:", "classes: [", "grammar.yaml: not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    shutil.copytree(GRAMMAR, tmp_path / "english")
    path = tmp_path / "english" / file
    content = path.read_text("utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), "utf-8")
    with pytest.raises(GradiendError) as error:
        generate_sentences(tmp_path / "english", max_size=100, seed=0)
    assert said in str(error.value)
    assert file in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(GradiendError, match="no such folder"):
        generate_sentences(tmp_path / "english", max_size=10, seed=0)
    shutil.copytree(GRAMMAR, tmp_path / "english")
    (tmp_path / "english" / "scenes.yaml").unlink()
    with pytest.raises(GradiendError, match=r"scenes\.yaml: cannot be read"):
        generate_sentences(tmp_path / "english", max_size=10, seed=0)


def test_max_size_beyond_the_grammar(tmp_path: Path) -> None:
    shutil.copytree(GRAMMAR, tmp_path / "english")
    path = tmp_path / "english" / "grammar.yaml"
    rules = yaml.safe_load(path.read_text("utf-8"))
    rules["classes"] = {"feminine": rules["classes"]["feminine"]}
    rules["phrases"] |= {
        "living": ["{np} {verb.past}."],
        "person": ["{np} {verb.past}."],
        "noun": ["{np} {verb.past}."],
    }
    path.write_text(yaml.safe_dump(rules), "utf-8")
    with pytest.raises(GradiendError, match=r"classes\.feminine: .* max_size 100000"):
        generate_sentences(tmp_path / "english", max_size=100000, seed=0)
    with pytest.raises(GradiendError, match="max_size: 0"):
        generate_sentences(tmp_path / "english", max_size=0, seed=0)
