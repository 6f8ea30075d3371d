"""In which batches the rows of a store are computed: the same ones, however many shards there are.

Rows are computed in blocks of consecutive rows. Within a block they are batched by length, so that little is padded;
shards begin and end where blocks do, and a killed shard resumes at a block.
"""

from collections.abc import Sequence

from gradiend_core.gradients.losses import share_input
from gradiend_core.gradients.objectives import Example

_BATCHES_PER_BLOCK = 4

# Two row matrices of a batch are held in memory at a time; those of an unpruned model are as large as the model.
_ROW_BYTES = 2**31

# Each batch that is computed has its activations in memory, and its rows besides those that wait for the disk.
_MOST_AT_ONCE = 4
_ALL_ROW_BYTES = 4 * _ROW_BYTES


def rows_per_batch(batch_size: int, n: int) -> int:
    """The batch size asked for, or what keeps a batch's rows of n entries within 2 GiB."""
    return max(1, min(batch_size, _ROW_BYTES // (2 * 4 * n)))


def batches_at_once(threads: int, batch_size: int, n: int, held: int) -> int:
    """How many batches to compute at a time, each in a thread: at most four.

    The rows of all of them and of `held` batches more stay within 8 GiB.
    """
    return max(1, min(threads, _MOST_AT_ONCE, _ALL_ROW_BYTES // (2 * 4 * n * batch_size) - held))


def shard_rows(rows: int, shard: int, num_shards: int, batch_size: int) -> range:
    """The rows of one shard of a store; some shards are empty when there are fewer blocks than shards."""
    block = _BATCHES_PER_BLOCK * batch_size
    blocks = -(-rows // block)
    start, stop = (min(rows, blocks * k // num_shards * block) for k in (shard, shard + 1))
    return range(start, stop)


def shard_batches(
    rows: range, factual: Sequence[Example], alternative: Sequence[Example], batch_size: int
) -> list[list[list[int]]]:
    """The blocks of a shard, each a list of batches, each a list of rows; examples are those of the whole store.

    Pairs that share their input come first, then by length, then in order: a batch costs as much as its longest row,
    and twice as much when inputs differ.
    """
    block = _BATCHES_PER_BLOCK * batch_size

    def cost(row: int) -> tuple[bool, int, int]:
        plus, minus = factual[row], alternative[row]
        return not share_input(plus, minus), max(len(plus.input_ids), len(minus.input_ids)), row

    blocks = []
    for start in range(rows.start, rows.stop, block):
        order = sorted(range(start, min(start + block, rows.stop)), key=cost)
        blocks.append([order[first : first + batch_size] for first in range(0, len(order), batch_size)])
    return blocks
