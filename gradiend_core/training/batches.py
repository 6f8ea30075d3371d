"""The order in which training rows are used."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


def batches(groups: Mapping[str, Positions], batch_size: int, seed: int) -> Iterator[Positions]:
    """Endless batches of row positions, each from one group (transition), the groups in turn.

    Each group is shuffled and cut into batches of `batch_size` (the last one of a pass may be smaller), and is
    shuffled anew when it is used up. So every row of every group is used, groups are balanced whatever their size,
    and no two passes are alike (BUG-06).
    """
    streams = [
        _group_batches(rows, batch_size, np.random.default_rng([seed, number]))
        for number, (_, rows) in enumerate(sorted(groups.items()))
    ]
    while True:
        for stream in streams:
            yield next(stream)


def _group_batches(rows: Positions, batch_size: int, random: np.random.Generator) -> Iterator[Positions]:
    while True:
        order = random.permutation(rows)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
