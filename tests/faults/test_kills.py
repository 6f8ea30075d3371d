"""SIGKILL at random moments of every stage, its children and its engines: the same command again, and all is as ever.

A handful of random trials by default; every kind of them with GRADIEND_TEST_FAULTS=all (`make test-faults`), which also
writes bench/results/faults-kills.*; those named in GRADIEND_TEST_FAULTS, as the log and a failure print them, again.
"""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import results
from cases import CASES, VICTIMS
from kills import Laboratory, Outcome, Trial
from project import Project

_SIDE_BY_SIDE = 2
_REPEATED = 2
_ASKED = os.environ.get("GRADIEND_TEST_FAULTS", "")


def _campaign(draw: random.Random) -> list[Trial]:
    """Trials of every case and engine, in random order."""
    kinds = [
        (case.name, engine)
        for case in CASES.values()
        for engine in VICTIMS
        for _ in range(1 if case.followers else _REPEATED)
        if not (case.followers and engine == "cached")
    ]
    draw.shuffle(kinds)
    return [Trial(*kind, 3, draw.randrange(10**6)) for kind in kinds]


def _some(draw: random.Random) -> list[Trial]:
    """One trial of each engine, with one kill."""
    trials = {trial.engine: trial for trial in _campaign(draw) if not CASES[trial.case].followers}
    return [trial._replace(kills=1) for trial in trials.values()]


def _chosen() -> list[Trial]:
    draw = random.Random()
    if _ASKED in {"", "all"}:
        return _campaign(draw) if _ASKED else _some(draw)
    return [Trial.parse(name) for name in _ASKED.split()]


def _perform(trials: Sequence[Trial], laboratory: Laboratory) -> list[Outcome]:
    """Two at a time; each is printed when it is done."""

    def perform(trial: Trial) -> Outcome:
        outcome = laboratory.run(trial, undisturbed[trial.case].result())
        kills = ", ".join(f"{kill.victim} {kill.moment}" for kill in outcome.kills) or "not in time"
        print(f"{trial.name}: {kills}: {'; '.join(outcome.problems) or 'as promised'}", flush=True)
        return outcome

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        cases = {trial.case: CASES[trial.case] for trial in trials}
        undisturbed = {name: pool.submit(laboratory.undisturbed, case) for name, case in cases.items()}
        return list(pool.map(perform, trials))


def test_after_a_kill_the_same_command_gives_the_same_bytes(
    finished: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = _chosen()
    with capsys.disabled():
        outcomes = _perform(trials, Laboratory(finished, tmp_path))
    if _ASKED == "all":
        results.write(outcomes)
        assert sum(len(outcome.kills) for outcome in outcomes) >= 200
    assert {outcome.trial: outcome.problems for outcome in outcomes if outcome.problems} == {}
