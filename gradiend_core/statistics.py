"""Numbers that papers quote, with their bootstrap intervals."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pearson(x: Array, y: Array) -> float:
    """Pearson correlation of two vectors; 0 when either is constant, for then no linear relation can be seen."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # the mean is rounded, so that what is left may not be exactly 0
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float], n: int, *, samples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of n rows (Efron & Tibshirani 1993, chapter 13).

    Args:
        statistic: its value for the rows at the given positions (drawn with replacement).
    """
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(n, size=n)) for _ in range(samples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def ratio_interval(
    numerators: Array, denominators: Array, *, samples: int, confidence: float, seed: int
) -> tuple[float, float, float]:
    """Σ numerators / Σ denominators and its percentile bootstrap interval over rows; a mean when all are over 1."""
    rows = np.random.default_rng(seed).integers(len(numerators), size=(samples, len(numerators)))
    values = numerators[rows].sum(1) / denominators[rows].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(numerators.sum() / denominators.sum()), float(low), float(high)
