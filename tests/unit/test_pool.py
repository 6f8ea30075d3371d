"""Several batches at a time give the very rows that one after the other gives."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gradiend_core.gradients.collector import GradientCollector, Rows
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.plan import batches_at_once
from gradiend_core.gradients.pool import Batch, CollectorPool
from gradiend_core.lm.checkpointing import checkpoint_layers
from tests.unit.tiny import CAUSAL, MASKED, build, causal_pairs, pairs, some


def some_batches(kind: str) -> tuple[GradientCollector, list[Batch]]:
    """A collector, and batches of one to four rows, more of them than any pool here computes at a time."""
    model, tokenizer = build(kind)
    plus, minus = (causal_pairs if kind in CAUSAL else pairs)(tokenizer)
    starts = [*range(len(plus)), *range(len(plus))]
    spans = [slice(start, start + 1 + number % 4) for number, start in enumerate(starts)]
    return GradientCollector(model, some(model)), [(plus[span], minus[span]) for span in spans]


def copied(rows: Rows) -> Rows:
    return Rows(*(matrix.clone() for matrix in rows))


@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_rows_are_those_of_one_batch_after_the_other(kind: str) -> None:
    assert_same_rows(*some_batches(kind), at_once=3)


def test_rows_with_gradient_checkpointing() -> None:
    collector, batches = some_batches("bert")
    checkpoint_layers(collector.model)
    assert_same_rows(collector, batches, at_once=3)


def test_a_single_batch_at_a_time_is_computed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, batches = some_batches("bert")
    monkeypatch.setattr(ThreadPoolExecutor, "submit", None)
    assert_same_rows(collector, batches, at_once=1)


def assert_same_rows(collector: GradientCollector, batches: list[Batch], *, at_once: int) -> None:
    with threads(1):
        expected = [copied(collector.rows(*batch)) for batch in batches]
    with threads(at_once), CollectorPool(collector, at_once, largest=4, held=0) as pool:
        found = [copied(rows) for rows in pool.rows(batches)]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.alternative, theirs.alternative)
        assert torch.equal(ours.diff, theirs.diff)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """With so many threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [1, 2])
def test_rows_that_are_held_stay_as_they_are(at_once: int) -> None:
    collector, batches = some_batches("bert")
    held, seen = 3, []
    with CollectorPool(collector, at_once, largest=4, held=held) as pool:
        for rows in pool.rows(batches):
            seen.append((rows, copied(rows)))
            for given, then in seen[-held - 1 :]:  # those that were held while it was computed, and itself
                assert torch.equal(given.alternative, then.alternative)
                assert torch.equal(given.diff, then.diff)
    assert len(seen) == len(batches)


def test_batches_are_computed_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, batches = some_batches("bert")
    met = threading.Barrier(2, timeout=60)  # a batch alone would wait here for ever
    original = GradientCollector.rows

    def rows(self: GradientCollector, *batch: Any, **named: Any) -> Rows:
        met.wait()
        return original(self, *batch, **named)

    monkeypatch.setattr(GradientCollector, "rows", rows)
    with CollectorPool(collector, 2, largest=4, held=0) as pool:
        assert len([*pool.rows(batches[:4])]) == 4


def test_weights_are_shared_and_modules_are_not() -> None:
    collector, _ = some_batches("bert")
    other = collector.for_another_thread()
    ours, theirs = (dict(c.model.named_parameters(remove_duplicate=False)) for c in (collector, other))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert theirs[name] is not parameter
        assert theirs[name].data_ptr() == parameter.data_ptr()
    assert theirs["cls.predictions.decoder.weight"] is theirs["bert.embeddings.word_embeddings.weight"]
    assert not {*collector.model.modules()} & {*other.model.modules()}


def test_what_is_not_separated_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("deberta")
    plus, minus = pairs(tokenizer)
    with caplog.at_level(logging.INFO):
        collector = GradientCollector(model, some(model))
        collector.rows(plus[:1], minus[:1])  # as the stage's check of itself
        with CollectorPool(collector, 3, largest=len(plus), held=0) as pool:
            list(pool.rows([(plus, minus)] * 4))
    assert [message.endswith("one example at a time") for message in caplog.messages] == [True]


def test_failure_of_a_batch_is_raised_after_the_rows_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, batches = some_batches("bert")
    original = GradientCollector.rows

    def rows(self: GradientCollector, factual: list[Example], *rest: Any, **named: Any) -> Rows:
        if factual is batches[2][0]:
            raise MemoryError("no room")
        return original(self, factual, *rest, **named)

    monkeypatch.setattr(GradientCollector, "rows", rows)
    found: list[Rows] = []
    with pytest.raises(MemoryError, match="no room"):
        collect(found, collector, batches)
    assert len(found) == 2


def collect(found: list[Rows], collector: GradientCollector, batches: list[Batch]) -> None:
    with CollectorPool(collector, 2, largest=4, held=len(batches)) as pool:
        found.extend(pool.rows(batches))


def test_threads_are_divided_and_given_back() -> None:
    collector, batches = some_batches("bert")
    started_later: list[int] = []
    with threads(5):
        with CollectorPool(collector, 2, largest=4, held=0) as pool:
            list(pool.rows(batches[:3]))
            assert {*pool._threads.map(lambda _: torch.get_num_threads(), range(4))} == {2}
        assert torch.get_num_threads() == 5
        thread = threading.Thread(target=lambda: started_later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert started_later == [5]


def test_as_many_batches_at_once_as_threads_and_memory_allow() -> None:
    assert batches_at_once(1, 32, 6618, held=2) == 1
    assert batches_at_once(2, 32, 6618, held=2) == 2
    assert batches_at_once(64, 32, 6618, held=2) == 4  # each holds the activations of a batch
    assert batches_at_once(8, 32, 8_000_000, held=2) == 2
    assert batches_at_once(8, 32, 20_000_000, held=2) == 1
    assert batches_at_once(8, 2, 109_000_000, held=2) == 2  # bert-base without pruning
