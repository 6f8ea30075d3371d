"""Gradient rows beside plain backward passes over the same batch (part `collector`)."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.gradients.child import Child, serve
from bench.gradients.models import DEMO, SIZES, batch, build, largest_selection, random_selection
from bench.gradients.plain import activation_backwards, labelled, parameter_backwards
from bench.gradients.report import Line
from bench.gradients.timing import interleave, ratio, scaled, spread
from gradiend_core.gradients.collector import GradientCollector, Rows, loop_rows
from gradiend_core.gradients.plan import batches_at_once
from gradiend_core.gradients.pool import Batch, CollectorPool
from gradiend_core.gradients.selection import Selection, backbone_parameters
from gradiend_core.gradients.shard_writer import QUEUED_BATCHES

LB, FLOOR, ONE, TEN, LARGEST = "lower bound", "floor", "rows, 1 %", "rows, 10 %", "rows, largest 1 %"
MODELS = ("bert-base", "gpt2", "bert 4x128", "demo-bert")
THREADS = (1, 2)
ROUNDS = {True: 5, False: 15}  # of big and small models
LOOP_ROWS = 2


def run() -> Iterator[list[Line]]:
    """All models with one thread and with two, then two threads beside a busy process."""
    for threads in THREADS:
        with Child(__spec__.name, environment={"OMP_NUM_THREADS": str(threads)}) as child:
            for model in MODELS:
                if model != "demo-bert" or DEMO.exists():
                    measured = child.ask(model=model, rounds=ROUNDS[SIZES[model].big])
                    yield judged(model, threads, measured)
    yield beside_busy("bert 4x128")


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Seconds per row of every contestant in every round, and how far sums of rows are from LB's."""
    lm = build(model)
    rows = SIZES[model].rows
    factual, alternative = batch(lm, rows)
    plain = labelled(factual, alternative)
    exact: list[Tensor] = []
    parameter_backwards(lm, plain, lambda gradients: exact.append(torch.cat([g.flatten() for g in gradients])))
    selections = {ONE: random_selection(lm, 0.01), TEN: random_selection(lm, 0.1)}
    selections[LARGEST] = largest_selection(lm, exact[0], 0.01)
    errors = []
    with ExitStack() as stack:
        ours = {}
        for name, selection in selections.items():
            collector = GradientCollector(lm, selection)
            errors.append(sum_error(lm, selection, collector.rows(factual, alternative), exact))
            ours[name] = stack.enter_context(_rows(collector, (factual, alternative)))
        seconds = interleave(
            {
                LB: lambda: _repeat(lambda: parameter_backwards(lm, plain)),
                FLOOR: lambda: _repeat(lambda: activation_backwards(lm, plain)),
                **ours,
            },
            rounds,
        )
    one_by_one = interleave(
        {"loop": lambda: loop_rows(lm, selections[ONE], factual[:LOOP_ROWS], alternative[:LOOP_ROWS])}, 2
    )
    count = rows * torch.get_num_threads()
    per_row = {name: [second / count for second in spent] for name, spent in seconds.items()}
    return {"per_row": per_row, "loop": one_by_one["loop"], "error": max(errors)}


def measure_rows(model: str, rounds: int) -> list[float]:
    """Seconds per row of the rows at 1 % of the entries alone, in every round."""
    lm = build(model)
    count = SIZES[model].rows * torch.get_num_threads()
    with _rows(GradientCollector(lm, random_selection(lm, 0.01)), batch(lm, SIZES[model].rows)) as compute:
        return [second / count for second in interleave({ONE: compute}, rounds)[ONE]]


def _repeat(call: Callable[[], object]) -> None:
    """As many batches as there are threads, so that every contestant has as much to do as the rows."""
    for _ in range(torch.get_num_threads()):
        call()


@contextmanager
def _rows(collector: GradientCollector, pairs: Batch) -> Iterator[Callable[[], object]]:
    """Computes the rows of as many batches as there are threads, as the stage does."""
    rows, threads = len(pairs[0]), torch.get_num_threads()
    at_once = batches_at_once(threads, rows, collector.selection.n, QUEUED_BATCHES)
    with CollectorPool(collector, at_once, largest=rows, held=0) as pool:
        yield lambda: deque(pool.rows([pairs] * threads), maxlen=0)


def sum_error(model: PreTrainedModel, selection: Selection, rows: Rows, exact: list[Tensor]) -> float:
    """The larger relative distance of the sum of rows from the plain gradient: both measure the same thing."""
    coordinates = selection.base_global_indices()
    assert len(exact[0]) == sum(p.numel() for p in backbone_parameters(model).values())
    distances = [
        torch.linalg.vector_norm(ours.sum(0) - whole[coordinates]) / torch.linalg.vector_norm(whole[coordinates])
        for ours, whole in zip(rows, exact, strict=True)
    ]
    return float(max(distances))


def judged(model: str, threads: int, measured: dict[str, Any]) -> list[Line]:
    """The lines of one model: ratios with their limits, then milliseconds per row."""
    per_row = measured["per_row"]
    big = SIZES[model].big
    where = f"{model}, {threads} thread{'s' if threads > 1 else ''}"
    lines = [
        Line(f"{where}: {name} / {LB}", "x", ratio(per_row[name], per_row[LB]), limit)
        for name, limit in {ONE: 0.85 if big else 1.3, LARGEST: 0.85 if big else 1.3, TEN: 1.1}.items()
    ]
    floor = ratio(per_row[ONE], per_row[FLOOR])
    lines.append(Line(f"{where}: {ONE} / {FLOOR}", "x", floor, 1.4 if big else None))
    lines.append(Line(f"{where}: sum of rows against {LB}", "relative", spread([measured["error"]]), 2e-6))
    lines += [Line(f"{where}: {name}", "ms per row", scaled(s, 1000)) for name, s in per_row.items()]
    lines.append(Line(f"{where}: loop over examples", "ms per row", scaled(measured["loop"], 1000 / LOOP_ROWS)))
    return lines


def beside_busy(model: str, turns: int = 3, rounds: int = 3) -> list[Line]:
    """Two threads, alone and beside a busy process, with threads that sleep and threads that spin while they wait."""
    policies: dict[str, dict[str, str | None]] = {
        "sleeping": {"OMP_NUM_THREADS": "2"},
        "spinning": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None},
    }
    per_row: dict[str, list[float]] = {}
    with (
        Child(__spec__.name, environment=policies["sleeping"]) as sleeping,
        Child(__spec__.name, environment=policies["spinning"]) as spinning,
    ):
        for busy in (False, True) * turns:
            for name, child in {"sleeping": sleeping, "spinning": spinning}.items():
                with _neighbour(busy):
                    found = child.ask(model=model, rounds=rounds, rows_only=True)
                per_row.setdefault(f"{name} threads{' beside a busy process' if busy else ''}", []).extend(found)
    where = f"{model}, 2 threads"
    lines = [Line(f"{where}: {ONE}, {case}", "ms per row", scaled(s, 1000)) for case, s in per_row.items()]
    spins, sleeps = (per_row[f"{name} threads beside a busy process"] for name in ("spinning", "sleeping"))
    return [*lines, Line(f"{where}: spinning / sleeping threads beside a busy process", "x", ratio(spins, sleeps))]


@contextmanager
def _neighbour(busy: bool) -> Iterator[None]:
    """A process that multiplies matrices with one thread, if asked for."""
    if not busy:
        yield
        return
    code = "import torch\ntorch.set_num_threads(1)\na = torch.randn(1000, 1000)\nprint(flush=True)\nwhile True: a @ a"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        yield
    finally:
        process.kill()
        process.communicate()


def answer(model: str, rounds: int, rows_only: bool = False) -> Any:
    """What a process of its own measures, with the threads that its environment says."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return measure_rows(model, rounds) if rows_only else measure(model, rounds)


if __name__ == "__main__":
    serve(answer)
