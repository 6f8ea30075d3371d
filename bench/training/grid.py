"""Convergence over sizes, gradient norms, batch sizes, pairs, features and seeds: `python -m bench.training.grid`.

Needs artifacts of a finished run: the base models and the datasets. Writes bench/results/training_grid.json, an axis at
a time (an axis given by name is measured again), and the tables between the marks of docs/training.md.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from bench.training import tables
from bench.training.runs import run
from bench.training.stores import CLASSES, build_store, entries, mean_norm, scaled
from gradiend_core.gradients.store import GradientStore

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "training_grid.json"
PAGE = ROOT / "docs" / "training.md"

QUANTITIES = ("factual", "alternative", "diff")
SCALE_FREE: dict[str, Any] = {}
# The package's default rate, and three more.
REFERENCE: list[dict[str, Any]] = [{"scaling": "reference", "learning_rate": float(f"1e{k}")} for k in (-5, -4, -3, -2)]
Record = dict[str, Any]


def size(artifacts: Path, model: str) -> Iterator[Record]:
    """Pruning levels, down to none if the model is small."""
    whole = entries(artifacts, model)
    levels = [n for n in (1_000, 10_000, 100_000, 1_000_000, 10_000_000) if n < whole]
    for n in levels + [whole] * (whole < 1_000_000):
        for feature in CLASSES:
            store = build_store(artifacts, model, feature, n)
            yield from _runs(store, feature, _seeds(n))


def _seeds(n: int) -> tuple[int, int]:
    """Seeds of the default and of each reference rate: fewer where a step takes long."""
    return (5, 3) if n <= 10_000 else (3, 1) if n <= 1_000_000 else (2, 1)


def norm(artifacts: Path, model: str) -> Iterator[Record]:
    """Gradients of other sizes than the model's."""
    for n, factors in ((1_000, (0.01, 100.0)), (10_000, (0.01, 0.1, 10.0, 100.0)), (100_000, (0.01, 100.0))):
        for feature in CLASSES:
            store = build_store(artifacts, model, feature, n)
            for factor in factors:
                yield from _runs(scaled(store, factor), feature, (3, 1) if n <= 10_000 else (1, 1), factor=factor)


def batch(artifacts: Path, model: str) -> Iterator[Record]:
    """Examples in a gradient row (`size` measures the default, 32), and gradient rows in a step."""
    stores = {feature: build_store(artifacts, model, feature, 10_000) for feature in CLASSES}
    for name, sizes in (("train_batch_size", (1, 2, 8, 64)), ("gradiend_batch_size", (2, 8))):
        for value in sizes:
            for feature, store in stores.items():
                yield from _runs(store, feature, (5, 2), settings={name: value})


def pair(artifacts: Path, model: str) -> Iterator[Record]:
    """What is encoded and what is decoded."""
    stores = {feature: build_store(artifacts, model, feature, 10_000) for feature in CLASSES}
    for source in QUANTITIES:
        for target in QUANTITIES:
            for feature, store in stores.items():
                yield from _runs(store, feature, (3, 1), settings={"source": source, "target": target})


AXES = {axis.__name__: axis for axis in (size, norm, batch, pair)}


def _runs(
    store: GradientStore,
    feature: str,
    seeds: tuple[int, int],
    *,
    factor: float = 1.0,
    settings: dict[str, Any] | None = None,
) -> Iterator[Record]:
    """Some seeds of the default, and some of each rate under `reference` scaling."""
    for method, count in ((SCALE_FREE, seeds[0]), *((method, seeds[1]) for method in REFERENCE)):
        chosen = method | (settings or {})
        about = {
            "feature": feature,
            "n": store.n,
            "rows": len(store),
            "factor": factor,
            "source_norm": mean_norm(store, chosen.get("source", "alternative")),
            "settings": chosen,
        }
        for seed in range(count):
            yield about | run(store, chosen, seed)


def main() -> None:
    """Measure the axes asked for, all of them by default, and write tables of everything measured so far."""
    parser = argparse.ArgumentParser(prog="python -m bench.training.grid", description=__doc__)
    parser.add_argument("axes", nargs="*", metavar="axis", help=f"{', '.join(AXES)}; default: all")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts", help="folder of a finished run")
    parser.add_argument("--model", default="demo-bert", help="base model")
    arguments = parser.parse_args()
    if unknown := set(arguments.axes) - AXES.keys():
        parser.error(f"no axis {', '.join(sorted(unknown))}: there are {', '.join(AXES)}")
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.axes or AXES:
        results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
        records: list[Record] = []
        results[f"{arguments.model}: {name}"] = records
        for record in AXES[name](arguments.artifacts, arguments.model):
            records.append(record)
            print(tables.line(record), flush=True)
            RESULTS.write_text(tables.as_json(results), encoding="utf-8")  # an interrupted run leaves what it has
        tables.write(PAGE, results)


if __name__ == "__main__":
    main()
