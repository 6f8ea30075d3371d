"""The benchmark's scripts run and judge as they say; how fast anything is, is not tested."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.gradients import collector, memory, plan, report, step, store
from bench.gradients.timing import Spread, interleave, ratio


def test_the_collector_is_measured_beside_both_bounds_and_computes_the_same_gradients() -> None:
    measured = collector.measure("tiny", rounds=2)
    assert set(measured["per_row"]) == {
        "lower bound",
        "floor",
        "rows, 1 %",
        "rows, 10 %",
        "rows, largest 1 %",
    }
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in measured["per_row"].values())
    assert measured["error"] < 2e-6
    lines = collector.judged("tiny", 1, measured)
    assert [line.limit for line in lines if line.unit == "x"] == [1.3, 1.3, 1.1, None]


def test_a_store_is_written_and_read(tmp_path: Path) -> None:
    lines = store.written(tmp_path, rows=20, n=1000, rounds=1)
    assert [line.limit for line in lines] == [0.8, None, None]
    store.write_whole(tmp_path, rows=20, n=1000)
    seconds = store.read(str(tmp_path), threads=1, rounds=2)
    assert {len(times) for times in seconds.values()} == {2}
    lines = store._judged(1, seconds, 20 * 1000 * 4)
    assert [line.limit for line in lines] == [0.3, 0.3] + [None] * 5


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_terms_of_the_memory_formula_are_measured() -> None:
    found = memory.measure("tiny", 0.5)
    n = found["terms"]["selection"] // 8
    assert found["terms"]["rows"] == 2 * 4 * n * 4  # two matrices of four rows in float32
    assert memory.formula(**found["terms"]) == sum(found["terms"].values())
    assert 0 < found["terms"]["model"] < found["terms"]["activations"]


def test_contestants_take_turns_and_garbage_is_left_to_the_pauses() -> None:
    calls: list[str] = []
    contestants = {name: partial(calls.append, name) for name in "ab"}
    seconds = interleave(contestants, rounds=2, between=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" + "-a-b" + "-b-a" + "-"  # warm-up, then each round begins with another one
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([3.0, 4.0, 2.0], [2.0, 1.0, 2.0]) == Spread(1.5, 1.0, 4.0, fastest=2.0)


def test_a_limit_is_met_or_missed_by_the_median() -> None:
    value = Spread(0.9, 0.7, 1.2)
    verdicts = {
        (limit, at_least): report.Line("x", "x", value, limit, at_least).verdict
        for limit in (0.8, 0.9, 1.0)
        for at_least in (False, True)
    }
    assert [key for key, verdict in verdicts.items() if verdict == "MISS"] == [(0.8, False), (1.0, True)]
    assert report.Line("x", "x", value).verdict == ""


def test_results_name_the_machine_only_in_words(tmp_path: Path) -> None:
    report.save(tmp_path, "part", "Title", report.machine(), [report.Line("a / b", "x", Spread(1, 1, 1), 2)])
    page = (tmp_path / "part.md").read_text(encoding="utf-8")
    assert "| a / b | 1 x | 1 to 1 |  | ≤ 2 | pass |" in page
    assert str(Path.home()) not in page
    assert (tmp_path / "part.json").exists()


def test_a_step_is_measured_beside_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for n, limits in ((step.LIMIT_FROM - 1, [None, None]), (step.LIMIT_FROM, [3.0, 2.2])):
        lines = step.measure(n, rounds=2)
        assert [line.limit for line in lines if line.unit == "x"] == limits
        assert len(lines) == 5


def test_the_plan_says_what_every_part_costs_and_refuses_unknown_parts() -> None:
    everything = plan.describe(plan.chosen_parts([]))
    assert all(name in everything for name in plan.PARTS)
    assert "reference package: 1.5 GB" not in plan.describe(["collector"])
    with pytest.raises(SystemExit, match="no part 'colector'; the parts are collector"):
        plan.chosen_parts(["colector"])
