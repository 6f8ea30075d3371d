"""Peak memory of a gradient pass beside a formula (part `memory`; needs Linux's /proc)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.gradients.child import Child, serve
from bench.gradients.models import SIZES, batch, build, random_selection
from bench.gradients.report import Line
from bench.gradients.timing import spread
from gradiend_core.gradients.collector import GradientCollector
from gradiend_core.gradients.plan import batches_at_once
from gradiend_core.gradients.pool import CollectorPool
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.shard_writer import QUEUED_BATCHES

CASES = (
    ("bert-base", 0.01, 1),
    ("bert-base", 0.1, 1),
    ("gpt2", 0.01, 1),
    ("bert 4x128", 0.1, 1),
    ("bert-base", 0.01, 2),
    ("bert-base", 0.1, 2),
)
MEGA = 1e6


def run() -> Iterator[list[Line]]:
    """A process of its own for every case: what was freed before would hide a peak."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("part memory reads peak memory from /proc, which only Linux has")
    for model, share, threads in CASES:
        with Child(__spec__.name, environment={"OMP_NUM_THREADS": f"{threads}"}) as child:
            found = child.ask(model=model, share=share)
        where = f"{model}, {share:.0%} of the entries, {threads} thread{'s' if threads > 1 else ''}"
        predicted = formula(**found["terms"])
        lines = [Line(f"{where}: peak / formula", "x", spread([found["peak"] / predicted]))]
        terms = {"peak above the imports": found["peak"], "formula": predicted, **found["terms"]}
        yield lines + [Line(f"{where}: {name}", "MB", spread([value / MEGA])) for name, value in terms.items()]


def formula(*, model: int, activations: int, rows: int, selection: int) -> int:
    """Bytes that a gradient pass should need on top of the imported libraries.

    The model; and for each batch that is computed at a time what its forward pass keeps for the backward passes, its
    two row matrices in float32, and the positions of the kept entries.
    """
    return model + activations + rows + selection


def measure(model: str, share: float) -> dict[str, Any]:
    """Peak memory of some batches above that of the imported libraries, and the terms of the formula, in bytes."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    imported = _status("VmRSS")
    lm = build(model)
    selection = random_selection(lm, share)
    factual, alternative = batch(lm, SIZES[model].rows)
    collector = GradientCollector(lm, selection)
    at_once = batches_at_once(torch.get_num_threads(), SIZES[model].rows, selection.n, QUEUED_BATCHES)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    with CollectorPool(collector, at_once, largest=SIZES[model].rows, held=0) as pool:
        for rows in pool.rows([(factual, alternative)] * (at_once + 1)):
            row_bytes = sum(matrix.nbytes for matrix in rows)
    peak = _status("VmHWM") - imported
    terms = {
        "model": sum(p.nbytes for p in lm.parameters()),
        "activations": at_once * activations(lm, collector, SIZES[model].rows),
        "rows": at_once * row_bytes,
        "selection": at_once * _index_bytes(selection),
    }
    return {"peak": peak, "terms": terms}


def activations(model: PreTrainedModel, collector: GradientCollector, rows: int) -> int:
    """Bytes that a pass keeps for its backward passes, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        collector.rows(*batch(model, rows))
    return sum(kept.values())


def _index_bytes(selection: Selection) -> int:
    return sum(kept.nbytes for kept in selection.kept if kept is not None)


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes (getrusage's peak would include the parent's)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    serve(measure)
