"""Rows of several batches at a time, each batch in a thread of its own.

The operations on one batch are short: spread over threads, they wait for each other longer than they compute (a small
model took more time with two threads than with one). Batches share nothing but the weights.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import torch

from gradiend_core.gradients.collector import GradientCollector, Rows
from gradiend_core.gradients.objectives import Example

Batch = tuple[Sequence[Example], Sequence[Example]]
"""The factual and the alternative encodings of N examples."""


class CollectorPool:
    """Computes rows of a collector's model and selection, `at_once` batches of at most `largest` examples at a time.

    Use as a context manager. The threads that torch may use are divided among the batches; a single batch at a time
    is computed by the caller's own thread.
    """

    def __init__(self, collector: GradientCollector, at_once: int, *, largest: int, held: int) -> None:
        self._collector, self._at_once = collector, at_once
        self._free: SimpleQueue[GradientCollector] = SimpleQueue()
        for number in range(at_once):
            self._free.put(collector.for_another_thread() if number else collector)
        self._buffers = cycle([collector.buffer(largest) for _ in range(held + at_once)])

    def __enter__(self) -> Self:
        each = max(1, torch.get_num_threads() // self._at_once)
        self._threads = ThreadPoolExecutor(
            self._at_once, "gradients", initializer=torch.set_num_threads, initargs=(each,)
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        torch.set_num_threads(torch.get_num_threads())  # for threads that are started later, as it was before

    def rows(self, batches: Iterable[Batch]) -> Iterator[Rows]:
        """The rows of each batch, in order; those of the last `held` batches that were given stay as they are."""
        waiting: deque[Future[Rows]] = deque()
        for batch in batches:
            out = next(self._buffers)
            if self._at_once == 1:
                yield self._collector.rows(*batch, out=out)
                continue
            waiting.append(self._threads.submit(self._compute, batch, out))
            if len(waiting) == self._at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _compute(self, batch: Batch, out: Rows) -> Rows:
        collector = self._free.get()
        try:
            return collector.rows(*batch, out=out)
        finally:
            self._free.put(collector)
