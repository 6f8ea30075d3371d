"""Gradient rows beside the reference package's gradients of the same rows (part `reference`)."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bench.gradients import texts
from bench.gradients.child import ROOT, Child, serve
from bench.gradients.models import build, random_selection
from bench.gradients.report import Line
from bench.gradients.timing import Spread, ratio, scaled, spread
from gradiend_core.gradients.collector import GradientCollector
from gradiend_core.gradients.objectives import Example
from gradiend_core.lm.folder import load_masked_lm

PYTHON = ROOT / "bench" / ".venv-reference" / "bin" / "python"
WORKER = "bench.gradients.reference_worker"
BATCH = 8  # of the package; it takes both classes' batches to compute the rows that we compute at once
SHARE = 0.01
ROUNDS = {"bert-base": 4, "bert 4x128": 7}
LIMITS = {"bert-base": 15.0}

loaded: dict[str, tuple[GradientCollector, PreTrainedTokenizerFast]] = {}


def run() -> Iterator[list[Line]]:
    """Both models with one thread; the package with its own padding, and with the rows' own length."""
    if not PYTHON.exists():
        raise SystemExit("part reference needs the reference package: run `make bench ONLY=reference`")
    with tempfile.TemporaryDirectory() as folder:
        settings = {"OMP_NUM_THREADS": "1", "BENCH_FOLDER": folder}
        with (
            Child(__spec__.name, environment=settings) as ours,
            Child(WORKER, python=str(PYTHON), environment=settings) as theirs,
        ):
            for model in ROUNDS:
                yield _compare(model, Path(folder) / model, ours, theirs)


def _compare(model: str, folder: Path, ours: Child, theirs: Child) -> list[Line]:
    vocabulary = save(model, folder)
    request = {"folder": str(folder), "rows": texts.rows(BATCH, vocabulary), "share": SHARE}
    seconds: dict[str, list[float]] = {}
    for turn in range(ROUNDS[model] + 1):
        padded = theirs.ask(**request, batch=turn % 2, max_length=None)
        short = theirs.ask(**request, batch=turn % 2, max_length=texts.TOKENS)
        found = ours.ask(**request, templates=padded["templates"])
        if turn:  # the first one warms up
            own, cut = (f"padded to {reply['padded']} tokens" for reply in (padded, short))
            for name, reply in ((own, padded), (cut, short), ("ours", found)):
                seconds.setdefault(name, []).append(reply["seconds"])
    where = f"{model}, 1 thread"
    lines = [
        Line(f"{where}: reference {own} / ours", "x", ratio(seconds[own], seconds["ours"]), LIMITS.get(model), True),
        Line(f"{where}: reference {cut} / ours", "x", ratio(seconds[cut], seconds["ours"])),
        Line(f"{where}: mean of our rows against the reference", "relative", _distance(found, padded), 1e-5),
    ]
    return lines + [Line(f"{where}: {name}", "ms per row", scaled(s, 1000)) for name, s in seconds.items()]


def _distance(ours: dict[str, Any], theirs: dict[str, Any]) -> Spread:
    pairs = zip(torch.tensor(ours["values"]), torch.tensor(theirs["values"]), strict=True)
    return spread([float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for a, b in pairs])


def save(model: str, folder: Path) -> int:
    """Write a model with random weights and its tokenizer; returns the size of its vocabulary."""
    vocabulary = int(build(model).config.vocab_size)
    build(model).save_pretrained(folder)
    texts.tokenizer(vocabulary).save_pretrained(folder)
    return vocabulary


def answer(folder: str, rows: list[texts.Row], share: float, templates: list[str]) -> dict[str, Any]:
    """Seconds per row, from text to gradients, and some values of the mean over the given templates."""
    if folder not in loaded:
        lm, tokenizer = load_masked_lm(folder)
        loaded[folder] = GradientCollector(lm, random_selection(lm, share)), tokenizer
    collector, tokenizer = loaded[folder]
    start = time.perf_counter()
    factual, alternative = (
        [_example(tokenizer, str(row["masked"]), str(row[word])) for row in rows] for word in ("label", "alternative")
    )
    found = collector.rows(factual, alternative)
    seconds = time.perf_counter() - start
    chosen = [number for number, row in enumerate(rows) if row["masked"] in templates]
    values = [texts.some(matrix[chosen].mean(0).tolist()) for matrix in found]
    return {"seconds": seconds / len(rows), "values": values}


def _example(tokenizer: PreTrainedTokenizerFast, template: str, word: str) -> Example:
    ids: list[int] = tokenizer(template)["input_ids"]
    labels: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    return Example(tuple(ids), (ids.index(int(tokenizer.mask_token_id)),), tuple(labels), (0,))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve(answer)
