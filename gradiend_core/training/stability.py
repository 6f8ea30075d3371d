"""How far seeds agree: how many converge, and whether they find the same entries of the base model."""

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HALVINGS = 60  # of [0, 1]: further than a double can tell


def exact_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval (1934) of the probability behind `successes` in n independent trials.

    Of a few seeds it is wide, and that is the point: 3 of 3 may still be 0.29.
    """
    tail = (1 - confidence) / 2

    def at_least(k: int, p: float) -> float:
        return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))

    low = _root(lambda p: at_least(successes, p) - tail) if successes else 0.0
    high = _root(lambda p: at_least(successes + 1, p) - (1 - tail)) if successes < n else 1.0
    return low, high


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of [0, 1] passes 0."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def topk_stability(entries: Mapping[int, NDArray[np.int64]], n: int) -> dict[str, Any]:
    """Agreement of the most important entries of several seeds, with the reference's keys (semantics, section 6).

    Per pair: overlap (common entries / those of the smaller set) and Jaccard (common / those of the union); over all
    seeds: in what fraction of them an entry of the union is present, how many entries are in one seed only and how
    many in all. Standard deviations are those of the pairs themselves (ddof 0). Sets drawn at random would overlap by
    `chance_overlap_fraction`.

    Args:
        entries: per seed the positions of its most important entries, each once.
        n: entries that there are.
    """
    if len(entries) < 2:
        return {"computed": False, "reason": "need_at_least_two_runs", "num_runs": len(entries)}
    sizes = {seed: len(chosen) for seed, chosen in entries.items()}
    rows = []
    for a, b in combinations(entries, 2):
        common = len(np.intersect1d(entries[a], entries[b], assume_unique=True))
        row = {"seed_a": a, "seed_b": b, "overlap_count": common, "overlap_fraction": common / min(sizes[a], sizes[b])}
        rows.append(row | {"jaccard": common / (sizes[a] + sizes[b] - common)})
    rows.sort(key=lambda row: -row["overlap_fraction"])
    _, counts = np.unique(np.concatenate(list(entries.values())), return_counts=True)
    overlaps, jaccards = (np.array([row[key] for row in rows]) for key in ("overlap_fraction", "jaccard"))
    return {
        "computed": True,
        "num_runs": len(entries),
        "seeds": list(entries),
        "topk_size_by_run": {str(seed): size for seed, size in sizes.items()},
        "mean_topk_size": float(np.mean(list(sizes.values()))),
        "union_size": len(counts),
        "intersection_size": int((counts == len(entries)).sum()),
        "parameters_seen_once": int((counts == 1).sum()),
        "parameters_seen_in_all_runs": int((counts == len(entries)).sum()),
        "mean_presence_fraction": float(counts.mean() / len(entries)),
        "mean_pairwise_overlap_fraction": float(overlaps.mean()),
        "pairwise_overlap_std": float(overlaps.std()),
        "min_pairwise_overlap_fraction": float(overlaps.min()),
        "max_pairwise_overlap_fraction": float(overlaps.max()),
        "mean_pairwise_jaccard": float(jaccards.mean()),
        "pairwise_jaccard_std": float(jaccards.std()),
        "min_pairwise_jaccard": float(jaccards.min()),
        "max_pairwise_jaccard": float(jaccards.max()),
        "chance_overlap_fraction": max(sizes.values()) / n,
        "pairwise_overlap_rows": rows,
    }
