"""The results of the long campaign of kills: one record per trial, and a table of what was due and who was killed."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from cases import CASES
from kills import Outcome, Trial

_FOLDER = Path(__file__).parents[2] / "bench/results"
_VICTIMS = ("stage", "child", "cached", "engine", "all")


def write(outcomes: Sequence[Outcome]) -> None:
    """bench/results/faults-kills.json and .md."""
    lines = ",\n".join(json.dumps(asdict(outcome)) for outcome in outcomes)
    (_FOLDER / "faults-kills.json").write_text(f"[\n{lines}\n]\n")
    (_FOLDER / "faults-kills.md").write_text("\n".join(_page(outcomes)) + "\n")


def _page(outcomes: Sequence[Outcome]) -> list[str]:
    kills = sum(len(outcome.kills) for outcome in outcomes)
    missed = sum(not outcome.kills for outcome in outcomes)
    made = f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores"
    rows = {name: [other for other in outcomes if Trial.parse(other.trial).case == name] for name in CASES}
    return [
        f"{made}: {kills} kills in {len(outcomes)} trials ({missed} ended before a kill).",
        "",
        f"| Due | {' | '.join(_VICTIMS)} | trials | as without a kill | continued | `pipeline.verify` needed |",
        f"|---|{'---|' * (len(_VICTIMS) + 4)}",
        *(_row(name, found) for name, found in rows.items()),
        _row("all", outcomes),
    ]


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    killed = [kill.victim for outcome in outcomes for kill in outcome.kills]
    numbers = [killed.count(victim) for victim in _VICTIMS]
    numbers += [len(outcomes), sum(not outcome.problems for outcome in outcomes)]
    numbers += [sum(bool(outcome.resumed) for outcome in outcomes), sum(outcome.verified for outcome in outcomes)]
    return f"| {name} | {' | '.join(str(number or '') for number in numbers)} |"
