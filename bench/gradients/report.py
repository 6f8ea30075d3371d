"""Results as lines of a table, beside their limits; the machine in words."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gradients.timing import Spread


class Line(NamedTuple):
    """One measured quantity; a limit is an upper one unless `at_least`."""

    what: str
    unit: str  # "x" for a ratio
    value: Spread
    limit: float | None = None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """pass or MISS by the median; nothing without a limit."""
        if self.limit is None:
            return ""
        inside = self.value.median >= self.limit if self.at_least else self.value.median <= self.limit
        return "pass" if inside else "MISS"

    def cells(self) -> tuple[str, ...]:
        """The line as text: what, median, range, by the fastest, limit, verdict."""
        limit = "" if self.limit is None else f"{'≥' if self.at_least else '≤'} {self.limit:g}"
        value = self.value
        fastest = "" if value.fastest is None else _number(value.fastest)
        span = f"{_number(value.low)} to {_number(value.high)}"
        return self.what, f"{_number(value.median)} {self.unit}", span, fastest, limit, self.verdict


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


HEADER = ("what", "median", "range", "by the fastest", "limit", "")


def markdown(title: str, machine: dict[str, Any], lines: Sequence[Line]) -> str:
    """A page: the machine, the lines with limits, and the rest."""
    judged = [line for line in lines if line.limit is not None]
    others = [line for line in lines if line.limit is None]
    parts = [f"# {title}", "; ".join(f"{key}: {value}" for key, value in machine.items()) + "."]
    if judged:
        parts += ["## Limits", _table(judged)]
    if others:
        parts += ["## Measured beside them", _table(others)]
    return "\n\n".join(parts) + "\n"


def _table(lines: Sequence[Line]) -> str:
    rows = [HEADER, ("---", "---:", "---:", "---:", "---:", "---"), *(line.cells() for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def text(lines: Sequence[Line]) -> str:
    """The lines for a terminal, with aligned columns."""
    rows = [line.cells() for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def save(folder: Path, part: str, title: str, machine: dict[str, Any], lines: Sequence[Line]) -> None:
    """Write <part>.json and <part>.md."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [line._asdict() | {"value": line.value._asdict(), "verdict": line.verdict} for line in lines]
    document = json.dumps({"machine": machine, "lines": records}, indent=1, ensure_ascii=False)
    (folder / f"{part}.json").write_text(document + "\n", encoding="utf-8")
    (folder / f"{part}.md").write_text(markdown(title, machine, lines), encoding="utf-8")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and the load before the measurement; nothing that names the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load average at the start": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in known.items()}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
