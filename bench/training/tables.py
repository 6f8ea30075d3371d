"""The measured runs as tables: per axis and value, seeds converged of seeds tried and the test R² of each method."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

BEGIN, END = "<!-- measured by bench.training.grid: begin -->", "<!-- end -->"
TITLES = {
    "size": "Entries n (pruning levels)",
    "norm": "Gradients times a number",
    "batch": "Batch sizes (n = 10,000)",
    "pair": "Source and target (n = 10,000)",
}
VALUES = {
    "size": lambda r: f"n = {r['n']:,}, mean gradient norm {r['source_norm']:.0f}",
    "norm": lambda r: f"n = {r['n']:,}, times {r['factor']:g}",
    "batch": lambda r: ", ".join(f"{k} {v}" for k, v in r["settings"].items() if k.endswith("batch_size")),
    "pair": lambda r: f"{r['settings']['source']} / {r['settings']['target']}",
}


def line(record: Record) -> str:
    """One run, for the terminal."""
    verdict = "converged" if record["converged"] else "; ".join(record["reasons"])
    return (
        f"{record['feature']} n={record['n']} x{record['factor']:g} {record['settings']} seed {record['seed']}:"
        f" {verdict}; correlation {record['correlation']:.3f}, test R² {record['test_r2']:.3f},"
        f" {record['seconds']:.1f} s"
    )


def as_json(results: dict[str, list[Record]]) -> str:
    """A JSON document with one line for each run."""
    axes = []
    for name, records in sorted(results.items()):
        lines = ",\n".join(json.dumps(record, sort_keys=True) for record in records)
        axes.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(axes) + "\n}\n"


def write(page: Path, results: dict[str, list[Record]]) -> None:
    """Replace what stands between the marks of a page by tables of these results."""
    text = page.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{markdown(results)}\n{END}{after}", encoding="utf-8")


def markdown(results: dict[str, list[Record]]) -> str:
    """All tables: a summary over all runs, then one for each axis."""
    every = [record for records in results.values() for record in records]
    methods = sorted({_method(record) for record in every}, key=_order)
    parts = [_table("all runs", [("all", every)], methods)]
    for name, records in results.items():
        model, axis = name.split(": ")
        values = list(dict.fromkeys(VALUES[axis](record) for record in records))
        lines = [(value, [record for record in records if VALUES[axis](record) == value]) for value in values]
        parts.append(f"**{TITLES[axis]}**, {model}\n\n" + _table("", lines, methods))
    return "\n\n".join(parts) + "\n"


def _table(title: str, lines: Iterable[tuple[str, list[Record]]], methods: list[str]) -> str:
    rows = [[title, *methods], ["---"] * (len(methods) + 1)]
    for value, records in lines:
        cells = [[record for record in records if _method(record) == method] for method in methods]
        rows.append([value, *map(_cell, cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(records: list[Record]) -> str:
    if not records:
        return ""
    explained = [record["test_r2"] for record in records]
    converged = sum(record["converged"] for record in records)
    span = " to ".join(dict.fromkeys([_round(min(explained)), _round(max(explained))]))
    return f"{converged} of {len(records)}, R² {span}"


def _method(record: Record) -> str:
    settings = record["settings"]
    return f"reference {settings['learning_rate']:g}" if "scaling" in settings else "scale_free"


def _order(method: str) -> tuple[bool, float]:
    name, _, rate = method.partition(" ")
    return name == "reference", float(rate or 0)


def _round(value: float) -> str:
    return f"{value:.2f}" if value > -10 else f"{value:.0e}"
