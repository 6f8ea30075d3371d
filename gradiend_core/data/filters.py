"""Find the texts that hold a word of a class, and turn them into templates (semantics 4.1)."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gradiend_core.data.tables import SLOT

_WORD = re.compile(r"\w+")


class Match(NamedTuple):
    """A text whose every occurrence of one class word is replaced by the slot marker."""

    masked: str
    factual: str  # the surface form, the same at every slot


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Matches any of `words` as a whole word in any casing; nothing when there are none."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    alternatives = "|".join(re.escape(word) for word in longest_first) or r"(?!)"
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)


def match_text(text: str, pattern: re.Pattern[str], *, min_left_context_words: int) -> Match | None:
    """The template of `text`, or None when it does not qualify.

    A text qualifies when it holds the class word at least once, always in the same form (a row has one factual
    word, so slots of different words would be labelled wrongly), and never before `min_left_context_words` words
    (an early occurrence left in the text would tell the model the answer; WEAK-12).
    """
    occurrences = list(pattern.finditer(text))
    if not occurrences or SLOT in text or len({found.group() for found in occurrences}) > 1:
        return None
    if sum(1 for _ in _WORD.finditer(text, 0, occurrences[0].start())) < min_left_context_words:
        return None
    return Match(pattern.sub(SLOT, text), occurrences[0].group())


def maskable_words(text: str, excluded: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """The words of `text` that hold a letter and are no part of an excluded word or phrase, in order."""
    taken = [match.span() for match in excluded.finditer(text)]
    for found in _WORD.finditer(text):
        has_letter = any(character.isalpha() for character in found.group())
        if has_letter and not any(start < found.end() and found.start() < end for start, end in taken):
            yield found
