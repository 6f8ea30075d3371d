"""The search of a learning rate by short trainings, in the spirit of the reference's (semantics, section 6)."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

logger = logging.getLogger(__name__)

# Rates that may be tried, as positions on the grid 1, 2, 5, 10, … of which position 0 is rate 1.
_LOWEST: Final = -36
_HIGHEST: Final = 3
_DECADE: Final = 3

# The share of the best rate's gain over the untrained model that another rate must reach to work, too.
_WORKS: Final = 0.95


@dataclass(frozen=True)
class Tuned:
    """The rate that was found, and of all that were tried the scores, in this order; -inf where training diverged."""

    learning_rate: float
    tried: dict[float, float]

    def to_json(self) -> dict[str, Any]:
        """As in metrics.json."""
        tried = [
            {"learning_rate": rate, "score": score if score > -math.inf else None, "diverged": score == -math.inf}
            for rate, score in self.tried.items()
        ]
        return {"learning_rate": self.learning_rate, "learning_rates_tried": tried}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Tuned":
        """The inverse of `to_json`."""
        tried = found["learning_rates_tried"]
        scores = {line["learning_rate"]: -math.inf if line["diverged"] else line["score"] for line in tried}
        return cls(found["learning_rate"], scores)


def tune(
    score: Callable[[float], float], start: float, *, untrained: float, max_probes: int, lowest: float = 0.0
) -> Tuned:
    """The middle of the rates that work, on the grid 1, 2, 5, 10, …

    A rate works when it gains at least 95 % of what the best one gains over the untrained model. Decades are tried
    first, from `start` outwards, until the rates that work are known to end on either side; then the gap at each end is
    halved until it is closed. The rate in the middle of those that work, on the grid, is tried too and taken, the lower
    of two; when `max_probes` runs out before, the one nearest to it among the rates tried. When no rate gains anything
    the best one is taken.

    Args:
        score: of the model after a short training at this rate; more is better, and -inf says that it diverged.
        start: a rate of the grid.
        untrained: the score before training.
        lowest: rates up to this one are not tried.
    """
    search = _Search(score, _position(start), untrained, lowest)
    while len(search.scores) < max_probes and (position := search.next_position()) is not None:
        search.probe(position)
    window = search.window()
    middle = (window[0] + window[-1]) // 2
    chosen = _rate(min(window, key=lambda position: abs(position - middle)))
    if max(search.scores.values()) <= untrained:
        logger.warning("no learning rate improved on the untrained model")
    logger.info("learning rate %g is taken, of %d tried", chosen, len(search.scores))
    return Tuned(chosen, {_rate(position): value for position, value in search.scores.items()})


class _Search:
    """What is known of the rates so far."""

    def __init__(self, score: Callable[[float], float], start: int, untrained: float, lowest: float) -> None:
        self.scores: dict[int, float] = {}  # in the order of trial
        self._score = score
        self._start = start
        self._untrained = untrained
        self._allowed = [p for p in range(_LOWEST, _HIGHEST + 1) if _rate(p) > lowest]
        self.probe(start)

    def probe(self, position: int) -> None:
        self.scores[position] = value = self._score(_rate(position))
        logger.info("learning rate %g: %s", _rate(position), "diverged" if value == -math.inf else f"score {value:.4g}")

    def window(self) -> list[int]:
        """The best rate and those next to it that work, sorted."""
        # Of equal ones the highest, as if they had hardly moved the model, unless all have diverged.
        best = max(self.scores.items(), key=lambda item: (item[1], item[0] if item[1] > -math.inf else -item[0]))[0]
        needed = self._untrained + _WORKS * max(0.0, self.scores[best] - self._untrained)
        ordered = sorted(self.scores)
        first = last = ordered.index(best)
        while first > 0 and self._works(ordered[first - 1], needed):
            first -= 1
        while last < len(ordered) - 1 and self._works(ordered[last + 1], needed):
            last += 1
        return ordered[first : last + 1]

    def _works(self, position: int, needed: float) -> bool:
        return self.scores[position] >= needed > self._untrained

    def next_position(self) -> int | None:
        """The decade beyond an edge of the window, else the middle of the gap beyond one, else of the window."""
        low, high = self.window()[0], self.window()[-1]
        below, above = [p for p in self.scores if p < low], [p for p in self.scores if p > high]
        decades = [low - _DECADE] * (not below) + [high + _DECADE] * (not above)
        gaps = [(max(below) + low) // 2] if below and max(below) < low - 1 else []
        gaps += [(high + min(above)) // 2] if above and high + 1 < min(above) else []
        if decades := [position for position in decades if position in self._allowed]:
            return min(decades, key=lambda position: abs(position - self._start))
        middle = (low + high) // 2
        return next(iter(gaps), None if middle in self.scores else middle)


def _rate(position: int) -> float:
    decade, step = divmod(position, _DECADE)
    return float(f"{(1, 2, 5)[step]}e{decade}")


def _position(rate: float) -> int:
    return min(range(_LOWEST, _HIGHEST + 1), key=lambda position: abs(math.log(_rate(position) / rate)))
