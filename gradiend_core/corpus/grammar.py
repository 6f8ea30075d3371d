"""An English corpus made from a grammar: pronoun sentences with agreement, and sentences without pronouns.

Every sentence has one subject (the head) and one verb that go with its class (he, she, it, they, or no pronoun).
A pair of head and verb belongs to one split, so that validation and test sentences cannot be remembered from
training; nouns listed as held out never occur in the train split at all. data/README.md explains the files.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import pandas as pd

from gradiend_core.corpus.grammar_files import Grammar, Phrases, Source, Tables, Word, read_grammar
from gradiend_core.errors import GradiendError

Value = TypeVar("Value")

_AGREEING = {
    "singular": {"head": "singular", "verb": "third"},
    "plural": {"head": "plural", "verb": "base"},
}
_MAX_DEPTH = 20
# So many duplicates in a row mean that a class has (almost) no new sentence left.
_MAX_DUPLICATES = 2000
# Held-out nouns go to validation and test only, which brings the three splits to about 0.8, 0.1, 0.1.
_TRAIN, _VALIDATION = 0.82, 0.91


def generate_sentences(grammar_dir: Path, *, max_size: int, seed: int) -> pd.DataFrame:
    """Make `max_size` different sentences from the grammar in `grammar_dir`.

    The result has one row per sentence, in an order shuffled by `seed`: `text` (str) and `split` ("train",
    "validation" or "test", about 8:1:1). It depends on the files, `max_size` and `seed` only. Raises `GradiendError`
    when a file is missing or malformed, or when the grammar cannot make that many different sentences.
    """
    if max_size < 1:
        raise GradiendError(f"max_size: {max_size} is not allowed. Ask for at least 1 sentence.")
    grammar = read_grammar(grammar_dir)
    counts = _apportion(max_size, [entry.share for entry in grammar.rules.classes.values()])
    splits: dict[str, str] = {}
    for name, count in zip(grammar.rules.classes, counts, strict=True):
        made = _add_sentences(splits, _templates(grammar, name), count, seed, name)
        if made < count:
            raise GradiendError(
                f"{grammar_dir / 'grammar.yaml'}: classes.{name}: makes hardly more than {made} different sentences, "
                f"but max_size {max_size} needs {count}. Lower max_size, or add words or patterns."
            )
    rows = list(splits.items())
    random.Random(seed).shuffle(rows)
    return pd.DataFrame(rows, columns=["text", "split"])


@dataclass(frozen=True)
class _Template:
    """A source of sentences with its word lists looked up; `forms` are the words that agree with the subject."""

    share: float
    number: str
    forms: Mapping[str, str]
    heads: Sequence[Word]
    verbs: Sequence[Word]
    patterns: Sequence[str]
    phrases: Phrases
    tables: Tables
    held_out: frozenset[str]


def _add_sentences(splits: dict[str, str], templates: Sequence[_Template], count: int, seed: int, name: str) -> int:
    """Add up to `count` new sentences with their split; the number added is smaller when no new one is found."""
    rng = random.Random(f"{seed}/{name}")
    limits = list(accumulate(template.share for template in templates))
    made = duplicates = 0
    while made < count and duplicates < _MAX_DUPLICATES:
        template = rng.choices(templates, cum_weights=limits)[0]
        sentence = _Sentence(template, rng.choice(template.heads), rng.choice(template.verbs), rng)
        text = _capitalise(sentence.fill(rng.choice(template.patterns)))
        if text in splits:
            duplicates += 1
            continue
        splits[text] = sentence.split(seed)
        made, duplicates = made + 1, 0
    return made


@dataclass(frozen=True)
class _Sentence:
    template: _Template
    head: Word
    verb: Word
    rng: random.Random

    def fill(self, text: str, depth: int = 0) -> str:
        """Replace the slots of `text`, and the slots in what replaces them."""
        parts = _parts(text)
        return "".join(self._word(part, depth) if index % 2 else part for index, part in enumerate(parts))

    def split(self, seed: int) -> str:
        """The split of this pair of head and verb: the same for all its sentences."""
        head, verb = next(iter(self.head.values())), next(iter(self.verb.values()))
        digest = sha256(f"{seed}/{head}/{verb}".encode()).digest()
        draw = int.from_bytes(digest[:8]) / 2**64
        if head in self.template.held_out:
            return "validation" if draw < 0.5 else "test"
        return "train" if draw < _TRAIN else "validation" if draw < _VALIDATION else "test"

    def _word(self, slot: str, depth: int) -> str:
        name, _, form = slot.partition(".")
        if name in ("head", "verb"):
            word = self.head if name == "head" else self.verb
            return word[form or _AGREEING[self.template.number][name]]
        if form:
            return self.rng.choice(self.template.tables[name])[form]
        if name in self.template.forms:
            return self.template.forms[name]
        return self.fill(self.rng.choice(self.template.phrases[name]), depth + 1)


def _templates(grammar: Grammar, name: str) -> list[_Template]:
    """The sources of the class `name` (one per scene for those that use scenes), every slot checked."""
    entry = grammar.rules.classes[name]
    templates: list[_Template] = []
    for index, source in enumerate(entry.sources):
        where = f"{grammar.folder / 'grammar.yaml'}: classes.{name}.sources.{index}"
        lists = _word_lists(grammar, source, where)
        for heads, verbs, own in lists:
            phrases: dict[str, Sequence[str]] = {**grammar.rules.phrases, **own}
            phrases["np"] = _lookup(source.np, phrases, where)
            templates.append(
                _Template(
                    share=source.share / len(lists),
                    number=entry.number,
                    forms=entry.forms,
                    heads=heads,
                    verbs=verbs,
                    patterns=_patterns(source, phrases, entry.forms, where),
                    phrases=phrases,
                    tables=grammar.tables,
                    held_out=grammar.held_out,
                )
            )
            for pattern in templates[-1].patterns:
                _check_slots(templates[-1], pattern, where, 0)
    return templates


def _word_lists(grammar: Grammar, source: Source, where: str) -> list[tuple[Sequence[Word], Sequence[Word], Phrases]]:
    """Heads, verbs and own phrases of a source: one triple, or one per scene."""
    if source.scenes:
        return [(scene.agents, scene.actions, scene.phrases) for scene in grammar.scenes.values()]
    assert source.words is not None, "checked by Source"
    assert source.verbs is not None, "checked by Source"
    return [(_lookup(source.words, grammar.tables, where), _lookup(source.verbs, grammar.tables, where), {})]


def _patterns(source: Source, phrases: Phrases, forms: Mapping[str, str], where: str) -> list[str]:
    """The patterns of a source; if its noun phrase does not show the number, those in which another word does."""
    patterns = [pattern for key in source.patterns for pattern in _lookup(key, phrases, where)]
    if source.unmarked:
        agreeing = {"verb", *forms} - {"pronoun"}
        patterns = [pattern for pattern in patterns if agreeing & set(_parts(pattern)[1::2])]
    if not patterns:
        raise GradiendError(f"{where}: no pattern shows the number by a verb. Add one, or delete `unmarked: true`.")
    return patterns


def _check_slots(template: _Template, text: str, where: str, depth: int) -> None:
    if depth == _MAX_DEPTH:
        raise GradiendError(f"{where}: {text!r} contains itself. Phrases must come to an end: remove the circle.")
    for slot in _parts(text)[1::2]:
        name, _, form = slot.partition(".")
        if name in ("head", "verb"):
            words = template.heads if name == "head" else template.verbs
            _lookup(form or _AGREEING[template.number][name], words[0], f"{where}: {{{slot}}} in {text!r}")
        elif form:
            words = _lookup(name, template.tables, f"{where}: {{{slot}}} in {text!r}")
            _lookup(form, words[0], f"{where}: {{{slot}}} in {text!r}")
        elif name not in template.forms:
            for phrase in _lookup(name, template.phrases, f"{where}: {{{slot}}} in {text!r}"):
                _check_slots(template, phrase, where, depth + 1)


def _lookup(key: str, known: Mapping[str, Value], where: str) -> Value:
    if key in known:
        return known[key]
    near = get_close_matches(key, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise GradiendError(f"{where}: {key!r} is unknown. {hint}Known: {', '.join(sorted(known))}.")


@cache
def _parts(text: str) -> list[str]:
    """Literal text at even positions, the names of slots at odd ones."""
    return re.split(r"\{([^{}]*)\}", text)


def _capitalise(text: str) -> str:
    return re.sub(r"(?:^|(?<=\. ))[a-z]", lambda match: match[0].upper(), text)


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `shares` (largest remainders rounded up)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
