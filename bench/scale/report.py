"""The measurements of bench/results/scale.json as a table and a figure: `python -m bench.scale.report`."""

import json
from typing import Any

import matplotlib

from bench.gradients.child import ROOT

SOURCE = ROOT / "bench" / "results" / "scale.json"
FIGURE = ROOT / "docs" / "images" / "scale.png"
_TITLES = {
    "snakemake": "Snakemake alone, `--scheduler greedy`",
    "ilp": "Snakemake alone, `--scheduler ilp`",
    "cached": "`pipeline.cached`",
    "dvc": "`dvc repro`",
    "before": "Before: every job resolved all stages",
}


def main() -> None:
    """Write bench/results/scale.md and docs/images/scale.png."""
    found = json.loads(SOURCE.read_text("utf-8"))
    SOURCE.with_suffix(".md").write_text(markdown(found), "utf-8")
    draw(found)


def markdown(found: dict[str, Any]) -> str:
    """A page: the machine, and a table for each part."""
    about = "; ".join(f"{key}: {value}" for key, value in found["machine"].items())
    parts = ["# What the engines add to each job", f"Processor seconds unless it says otherwise. {about}."]
    for part, title in _TITLES.items():
        rows = found.get(part)
        if rows:
            head = list(dict.fromkeys(key for row in rows for key in row))
            lines = [head, ["---:"] * len(head), *([_cell(row.get(key)) for key in head] for row in rows)]
            parts += [f"## {title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def draw(found: dict[str, Any]) -> None:
    """Processor seconds per job against jobs, both axes logarithmic."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    lines = [
        ("pipeline.cached, before", "before", "cached", "#D55E00", "--"),
        ("pipeline.cached", "cached", "runs", "#D55E00", "-"),
        ("Snakemake, ilp", "ilp", "per job", "#CC79A7", "--"),
        ("Snakemake, greedy", "snakemake", "per job", "#0072B2", "-"),
        ("dvc repro, one stage", "dvc", "one stage", "#009E73", "-"),
    ]
    for label, part, key, colour, style in lines:
        rows = [row for row in found.get(part, []) if key in row]
        points = [row["jobs"] for row in rows], [row[key] for row in rows]
        axes.loglog(*points, marker="o", label=label, color=colour, linestyle=style)
    axes.set_xlabel("jobs in the graph")
    axes.set_ylabel("processor seconds per job")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    main()
