"""The batches of a store do not depend on how many shards there are, and hold every row once."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.plan import rows_per_batch, shard_batches, shard_rows


def example(length: int, position: int = 0) -> Example:
    return Example((5,) * length, (position,), (7,), (0,))


@given(rows=st.integers(0, 200), num_shards=st.integers(1, 12), batch_size=st.integers(1, 9))
def test_shards_share_out_the_same_batches(rows: int, num_shards: int, batch_size: int) -> None:
    lengths = [3 + (7 * row) % 11 for row in range(rows)]
    factual = [example(length) for length in lengths]
    alternative = [example(length, position=row % 3 == 0) for row, length in enumerate(lengths)]
    ranges = [shard_rows(rows, shard, num_shards, batch_size) for shard in range(num_shards)]
    whole = shard_batches(range(rows), factual, alternative, batch_size)
    parts = [block for some in ranges for block in shard_batches(some, factual, alternative, batch_size)]
    assert parts == whole
    assert [one.stop for one in ranges[:-1]] == [other.start for other in ranges[1:]]
    first = 0
    for block in whole:
        flat = [row for batch in block for row in batch]
        assert sorted(flat) == list(range(first, first + len(flat)))
        assert all(len(batch) == batch_size for batch in block[:-1])
        first += len(flat)
    assert first == rows


def test_rows_of_a_block_are_batched_by_cost() -> None:
    factual = [example(length) for length in (9, 3, 6, 4, 8, 5, 7, 2)]
    alternative = [*factual[:6], *(example(len(one.input_ids), position=1) for one in factual[6:])]
    (block,) = shard_batches(range(8), factual, alternative, batch_size=2)
    assert block == [[1, 3], [5, 2], [4, 0], [7, 6]]  # the last two have two inputs each


def test_rows_of_a_batch_fit_into_memory() -> None:
    assert rows_per_batch(32, 6618) == 32
    assert rows_per_batch(32, 109_000_000) == 2  # bert-base without pruning: 0.87 GB a row
    assert rows_per_batch(32, 10**10) == 1
    sizes = [rows_per_batch(10**6, n) for n in (10, 10**4, 10**7)]
    assert all(larger > smaller for larger, smaller in pairwise(sizes))


@pytest.mark.parametrize("num_shards", [1, 3, 40])
def test_more_shards_than_blocks_leave_some_empty(num_shards: int) -> None:
    sizes = [len(shard_rows(100, shard, num_shards, 10)) for shard in range(num_shards)]
    assert sum(sizes) == 100
    assert sum(size > 0 for size in sizes) == min(num_shards, 3)
