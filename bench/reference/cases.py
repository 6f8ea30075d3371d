"""Hand-made inputs for the evaluation, convergence and selection functions of the reference package."""

from __future__ import annotations

Evaluation = dict[str, object]

# Rows of an encodings table: (type, source class, target class, label, encoded).
ENCODINGS: list[tuple[str, str, str, float, float]] = [
    ("training", "M", "F", -1.0, -0.91),
    ("training", "M", "F", -1.0, -0.55),
    ("training", "M", "F", -1.0, -0.20),
    ("training", "M", "F", -1.0, 0.08),
    ("training", "M", "F", -1.0, -0.74),
    ("training", "F", "M", 1.0, 0.97),
    ("training", "F", "M", 1.0, 0.62),
    ("training", "F", "M", 1.0, 0.50),
    ("training", "F", "M", 1.0, 0.11),
    ("training", "F", "M", 1.0, -0.03),
    ("training", "F", "M", 1.0, 0.88),
    ("training", "N", "N", 0.0, 0.35),
    ("training", "N", "N", 0.0, -0.62),
    ("training", "N", "N", 0.0, 0.05),
    ("neutral_training_masked", "", "", 0.0, 0.58),
    ("neutral_training_masked", "", "", 0.0, -0.12),
    ("neutral_training_masked", "", "", 0.0, 0.31),
    ("neutral_dataset", "", "", 0.0, -0.49),
    ("neutral_dataset", "", "", 0.0, 0.02),
]


def _evaluations(*steps: tuple[float, dict[float, float]]) -> list[Evaluation]:
    """Return one evaluation (correlation, mean encoding by label) for each of steps 0, 1, 2."""
    return [{"correlation": correlation, "mean_by_class": means} for correlation, means in steps]


_START = (0.1, {1.0: 0.02, -1.0: -0.01})

# Name -> the evaluations of steps 0, 1 and 2 of a run.
CONVERGENCE: dict[str, list[Evaluation]] = {
    "good": _evaluations(_START, (0.6, {1.0: 0.5, -1.0: -0.4}), (0.95, {1.0: 0.8, -1.0: -0.9})),
    "best_step_0": _evaluations(
        (0.9, {1.0: 0.8, -1.0: -0.9}), (0.6, {1.0: 0.8, -1.0: -0.9}), (0.7, {1.0: 0.8, -1.0: -0.9})
    ),
    "low_correlation": _evaluations(_START, (0.3, {1.0: 0.6, -1.0: -0.6}), (0.49, {1.0: 0.7, -1.0: -0.7})),
    "same_sign": _evaluations(_START, (0.6, {1.0: 0.5, -1.0: -0.4}), (0.95, {1.0: 0.9, -1.0: 0.6})),
    "small_means": _evaluations(_START, (0.6, {1.0: 0.2, -1.0: -0.2}), (0.95, {1.0: 0.3, -1.0: -0.3})),
    "one_small_mean": _evaluations(_START, (0.6, {1.0: 0.2, -1.0: -0.2}), (0.95, {1.0: 0.9, -1.0: -0.49})),
    "negative_flipped": _evaluations(_START, (-0.3, {1.0: -0.3, -1.0: 0.2}), (-0.95, {1.0: -0.8, -1.0: 0.9})),
    "negative_dead_zone": _evaluations(_START, (-0.3, {1.0: -0.3, -1.0: 0.2}), (-0.55, {1.0: -0.8, -1.0: 0.9})),
    "at_thresholds": _evaluations(_START, (0.3, {1.0: 0.3, -1.0: -0.2}), (0.5, {1.0: 0.5, -1.0: -0.5})),
    "neutral_ignored": _evaluations(_START, (0.3, {1.0: 0.3, -1.0: -0.2}), (0.8, {1.0: 0.8, -1.0: -0.9, 0.0: 0.7})),
    "class_missing": _evaluations(_START, (0.3, {1.0: 0.3, -1.0: -0.2}), (0.8, {1.0: 0.8})),
    "best_before_last": _evaluations(_START, (0.95, {1.0: 0.8, -1.0: -0.9}), (0.9, {1.0: 0.8, -1.0: 0.9})),
    "tie_keeps_first": _evaluations(_START, (0.9, {1.0: 0.8, -1.0: -0.9}), (0.9, {1.0: 0.8, -1.0: 0.9})),
}

# Candidate: (feature_factor, learning_rate, lms, P(M) on the rows of F, P(F) on the rows of M).
Candidate = tuple[float, float, float, float, float]
_GRID: list[Candidate] = [
    (1.0, 0.01, 0.800, 0.12, 0.10),
    (1.0, 0.1, 0.795, 0.30, 0.08),
    (1.0, 1.0, 0.700, 0.90, 0.01),
    (-1.0, 0.01, 0.799, 0.09, 0.13),
    (-1.0, 0.1, 0.792, 0.07, 0.41),
    (-1.0, 1.0, 0.600, 0.01, 0.95),
]
SELECTION: dict[str, dict[str, object]] = {
    "threshold": {"base_lms": 0.8, "ratio": 0.99, "grid": _GRID},
    "all_pass": {"base_lms": 0.5, "ratio": 0.99, "grid": _GRID},
    "fallback_smallest_rate": {"base_lms": 0.95, "ratio": 0.99, "grid": _GRID},
    "fallback_one_class": {
        "base_lms": 0.8,
        "ratio": 0.99,
        "grid": [c for c in _GRID if c[0] > 0] + [(-1.0, 0.1, 0.7, 0.07, 0.41), (-1.0, 0.05, 0.71, 0.07, 0.2)],
    },
    "tie_keeps_first": {
        "base_lms": 0.8,
        "ratio": 0.99,
        "grid": [(1.0, 0.5, 0.8, 0.3, 0.1), (1.0, 0.1, 0.8, 0.3, 0.1), (-1.0, 0.2, 0.8, 0.1, 0.3)],
    },
}
