"""The files of a grammar: what may stand in them, and reading them with errors that name file and key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from gradiend_core.config.section import load_yaml
from gradiend_core.errors import GradiendError

COLUMNS = {
    "names": ("singular",),
    "nouns": ("singular", "plural"),
    "verbs": ("base", "third", "past", "participle"),
    "actions": ("base", "third", "past", "participle", "object"),
}
"""The forms of a word, in file order, per section of `words.yaml` (and the actions of `scenes.yaml`)."""

Word = dict[str, str]
"""Form to spelling."""

Tables = Mapping[str, Sequence[Word]]
Phrases = Mapping[str, Sequence[str]]

Model = TypeVar("Model", bound=BaseModel)
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Lists = dict[str, Texts]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WordsFile(_File):
    """`words.yaml`: tables of words by kind, and the nouns that stay out of the train split."""

    names: Lists
    nouns: Lists
    verbs: Lists
    held_out: list[str]


class SceneFile(_File):
    """One entry of `scenes.yaml`: who does what there, and phrases that only this scene has."""

    agents: Texts
    actions: Texts
    phrases: Lists


class Source(_File):
    """Where a class takes its sentences from: one pair of word tables, or all scenes."""

    share: PositiveFloat
    words: str | None = None
    verbs: str | None = None
    scenes: bool = False
    np: str
    patterns: Texts
    unmarked: bool = False

    @model_validator(mode="after")
    def _words_or_scenes(self) -> Self:
        if self.scenes == (self.words is not None) or (self.words is None) != (self.verbs is None):
            raise ValueError("needs either `words` and `verbs`, or `scenes: true`")
        return self


class AgreementClass(_File):
    """The sentences with one agreement: `forms` are the words that agree with their subject."""

    share: PositiveFloat
    number: Literal["singular", "plural"]
    forms: dict[str, str]
    sources: Annotated[list[Source], Field(min_length=1)]


class Rules(_File):
    """`grammar.yaml`: the classes and the phrases they are built from."""

    classes: Annotated[dict[str, AgreementClass], Field(min_length=1)]
    phrases: Lists


class _Scenes(_File):
    scenes: Annotated[dict[str, SceneFile], Field(min_length=1)]


@dataclass(frozen=True)
class Scene:
    """What people do at one place: words as in `words.yaml`, and phrases of its own."""

    agents: Sequence[Word]
    actions: Sequence[Word]
    phrases: Phrases


@dataclass(frozen=True)
class Grammar:
    """The three files of a grammar, words split into their forms."""

    folder: Path
    rules: Rules
    tables: Tables
    held_out: frozenset[str]
    scenes: Mapping[str, Scene]


def read_grammar(folder: Path) -> Grammar:
    """Read `grammar.yaml`, `words.yaml` and `scenes.yaml` from `folder`.

    Raises `GradiendError`, naming file and key, when one is missing, is not YAML or holds something not allowed.
    """
    if not folder.is_dir():
        raise GradiendError(f"{folder}: no such folder. It needs grammar.yaml, words.yaml and scenes.yaml.")
    rules, words, scenes = (folder / name for name in ("grammar.yaml", "words.yaml", "scenes.yaml"))
    listed = _check(words, WordsFile, _load(words))
    tables = _tables(words, listed)
    return Grammar(
        folder=folder,
        rules=_check(rules, Rules, _load(rules)),
        tables=tables,
        held_out=_held_out(words, listed, tables),
        scenes={
            name: Scene(
                agents=_words(f"{scenes}: {name}.agents", scene.agents, COLUMNS["nouns"]),
                actions=_words(f"{scenes}: {name}.actions", scene.actions, COLUMNS["actions"]),
                phrases={**scene.phrases, "workplace": [name]},
            )
            for name, scene in _check(scenes, _Scenes, {"scenes": _load(scenes)}).scenes.items()
        },
    )


def _tables(path: Path, listed: WordsFile) -> Tables:
    tables: dict[str, list[Word]] = {}
    for kind in ("names", "nouns", "verbs"):
        for name, rows in getattr(listed, kind).items():
            if name in tables:
                raise GradiendError(f"{path}: {kind}.{name}: another table has this name. Rename one of the two.")
            tables[name] = _words(f"{path}: {kind}.{name}", rows, COLUMNS[kind])
    return tables


def _held_out(path: Path, listed: WordsFile, tables: Tables) -> frozenset[str]:
    nouns = {word["singular"] for name in listed.nouns for word in tables[name]}
    for noun in listed.held_out:
        if noun not in nouns:
            raise GradiendError(f"{path}: held_out: {noun!r} is the singular of no listed noun. Add it or delete it.")
    return frozenset(listed.held_out)


def _words(where: str, rows: Sequence[str], columns: Sequence[str]) -> list[Word]:
    """Split rows of blank-separated forms; `where` is the file and key for the error. No word may occur twice."""
    words: list[Word] = []
    known: set[str] = set()
    for row in rows:
        forms = row.split()
        if len(forms) != len(columns):
            raise GradiendError(
                f"{where}: {row!r} has {len(forms)} forms, not {len(columns)}. Write one word as: {' '.join(columns)}."
            )
        if forms[0] in known:
            raise GradiendError(f"{where}: {forms[0]!r} is listed twice. Delete one of the two entries.")
        known.add(forms[0])
        words.append(dict(zip(columns, forms, strict=True)))
    return words


def _load(path: Path) -> Any:
    try:
        return load_yaml(path)
    except OSError as error:
        raise GradiendError(f"{path}: cannot be read ({error.strerror}). A grammar folder needs this file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GradiendError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Correct it there.") from None


def _check(path: Path, model: type[Model], content: Any) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "scenes" or model is not _Scenes)
        raise GradiendError(
            f"{path}: {key or 'the whole file'}: {first['msg']} (got {_short(first['input'])}). "
            "See data/README.md for what may stand there."
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
