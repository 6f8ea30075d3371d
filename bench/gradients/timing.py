"""Times calls in turn, so that whatever else the machine does meets all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median and range of a quantity over the rounds of one run."""

    median: float
    low: float
    high: float
    fastest: float | None = None  # a ratio's value by the shortest time of each term, the least disturbed ones


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int, between: Callable[[], object] = gc.collect
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one call of each to warm up.

    Every round calls all of them once, starting with another one each time. What has to happen `between` calls, such
    as collecting garbage, is not timed and never happens inside one.
    """
    for call in contestants.values():
        between()
        call()
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    gc.freeze()  # so that collecting between calls costs next to nothing
    try:
        for start in range(rounds):
            first = start % len(names)
            for name in names[first:] + names[:first]:
                between()
                seconds[name].append(_timed(contestants[name]))
    finally:
        gc.unfreeze()
        gc.enable()
        between()
    return seconds


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def scaled(values: Sequence[float], factor: float) -> Spread:
    """Median and range of the values times a factor."""
    return spread([value * factor for value in values])


def ratio(ours: Sequence[float], other: Sequence[float]) -> Spread:
    """Spread of the times ours / other, round by round: the terms of a round were measured next to each other."""
    return spread([a / b for a, b in zip(ours, other, strict=True)])._replace(fastest=min(ours) / min(other))
