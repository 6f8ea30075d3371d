"""The search of a learning rate, on made-up scores and on planted gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradiend_core.config.section import validate
from gradiend_core.config.train import Train
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.training import loop
from gradiend_core.training.loop import train
from gradiend_core.training.tune import Tuned, tune
from tests.unit.test_training import best_line, planted


def searched(score: Callable[[float], float], start: float = 0.01, max_probes: int = 20, lowest: float = 0.0) -> Tuned:
    return tune(score, start, untrained=0.0, max_probes=max_probes, lowest=lowest)


def plateau(low: float, high: float, beyond: float = -math.inf) -> Callable[[float], float]:
    """1 from `low` to `high`, less below, and `beyond` above."""
    return lambda rate: 0.1 if rate < 0.99 * low else 1.0 if rate < 1.01 * high else beyond


@pytest.mark.parametrize("beyond", [-math.inf, 0.0, 0.9])
@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.1, {0.01}),
        (0.01, 0.01, {0.01}),
        (0.002, 0.005, {0.002}),  # the lower of the two
        (0.1, 10.0, {1.0}),
        (0.2, 1.0, {0.5}),
        (1.0, 1.0, {1.0}),
        (1e-7, 1e-5, {1e-6}),
        (1e-12, 1e-2, {1e-7}),
    ],
)
def test_middle_of_the_rates_that_work_is_taken(low: float, high: float, beyond: float, expected: set[float]) -> None:
    for start in (0.01, 0.001) if low <= 0.01 else (0.01, 0.1):
        if beyond == 0.0 and start > high:
            continue  # nothing says on which side the rates that work are
        found = searched(plateau(low, high, beyond), start)
        assert found.learning_rate in expected, found


def test_rates_are_those_of_the_grid_and_tried_once() -> None:
    asked: list[float] = []

    def score(rate: float) -> float:
        asked.append(rate)
        return plateau(0.0002, 0.5)(rate)

    found = searched(score)
    assert list(found.tried) == asked
    assert len(set(asked)) == len(asked)
    assert all(float(f"{rate:.0e}") == rate and f"{rate:e}"[0] in "125" for rate in asked)
    assert {0.0001, 0.0002, 0.5, 1.0} <= set(asked)  # both edges are known exactly
    assert found.tried == {rate: plateau(0.0002, 0.5)(rate) for rate in asked}


@pytest.mark.parametrize("max_probes", [1, 2, 5])
def test_budget_is_kept(max_probes: int) -> None:
    found = searched(plateau(0.0002, 0.5), max_probes=max_probes)
    assert len(found.tried) == max_probes
    assert found.tried[found.learning_rate] == 1


def test_a_rate_works_that_gains_95_percent_of_the_best() -> None:
    gains = {0.0002: 0.94, 0.0005: 0.96, 0.001: 0.96, 0.002: 0.96, 0.005: 1.0, 0.01: 1.0, 0.02: 1.0, 0.05: 0.96}
    # The gain counts, so that the scale's zero does not.
    found = tune(lambda rate: -2 + gains.get(rate, 0.0), 0.01, untrained=-2.0, max_probes=20)
    assert {0.0002, 0.0005, 0.05, 0.1} <= found.tried.keys()
    assert found.learning_rate == 0.005  # of 0.0005 … 0.05


def test_rates_that_do_not_train_are_not_taken_for_working(caplog: pytest.LogCaptureFixture) -> None:
    found = searched(lambda rate: -math.inf, max_probes=6)
    assert found.learning_rate == min(found.tried) < 0.01
    assert "no learning rate improved on the untrained model" in caplog.text
    assert searched(lambda rate: rate - 20).learning_rate == 10  # nothing gained: the best
    caplog.clear()
    searched(plateau(0.01, 0.01))
    assert "no learning rate" not in caplog.text


def test_rates_that_move_nothing_are_left_upwards() -> None:
    assert searched(lambda rate: float(rate > 0.09), start=1e-4, max_probes=12).learning_rate >= 0.1


def test_rates_that_the_schedule_cannot_start_from_are_not_tried() -> None:
    found = searched(lambda rate: 1 / rate, lowest=1e-7, max_probes=100)
    assert min(found.tried) > 1e-7
    assert min(searched(lambda rate: 1 / rate, max_probes=100).tried) == 1e-12


def test_scores_survive_as_json() -> None:
    tuned = Tuned(0.1, {0.1: 0.5, 1.0: -math.inf})
    assert tuned.to_json()["learning_rates_tried"][1] == {"learning_rate": 1.0, "score": None, "diverged": True}
    assert Tuned.from_json(tuned.to_json()) == tuned


# --- in a training


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, 0.01),
        ({"scaling": "reference"}, 1e-5),
        ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.2}, 0.01),
        ({"lr_scheduler_type": "polynomial", "metric_for_best_model": "loss"}, 0.01),
    ],
)
def test_a_probe_is_the_beginning_of_the_training(settings: dict[str, object], first: float) -> None:
    common = {"max_steps": 40, "learning_rate_probe_steps": 10, "learning_rate_max_probes": 3} | settings
    store = planted(30)
    tuned = train(store, validate(Train, common | {"learning_rate": "tune"}, "train"), 1).tuned
    assert tuned is not None
    assert next(iter(tuned.tried)) == first
    steps = 18 if "warmup_ratio" in settings else 10
    for rate, score in tuned.tried.items():
        plain = common | {"learning_rate": rate, "eval_steps": steps}
        line = train(store, validate(Train, plain, "train"), 1).history.set_index("step").loc[steps]
        expected = -line["eval_loss"] if settings.get("metric_for_best_model") == "loss" else abs(line["correlation"])
        assert score == pytest.approx(expected, rel=1e-12)


def test_the_schedule_bounds_the_search() -> None:
    # The worst rate is the best, so that the search goes down as far as it may: polynomial decay ends at 1e-7.
    settings = {"lr_scheduler_type": "polynomial", "metric_for_best_model": "loss", "greater_is_better": True}
    settings |= {"learning_rate": "tune", "scaling": "reference", "max_steps": 2}
    tuned = train(planted(30), validate(Train, settings, "train"), 1).tuned
    assert tuned is not None
    assert min(tuned.tried) == 1e-6


def test_a_probe_is_not_longer_than_the_training() -> None:
    params = validate(Train, {"learning_rate": "tune", "max_steps": 3, "learning_rate_max_probes": 2}, "train")
    trained = train(planted(10), params, 0)
    assert trained.history["step"].tolist() == [0, 3]


def test_a_probe_that_diverges_is_the_worst(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    original = loop.training_step

    def training_step(model: GradiendModel, optimizer: torch.optim.Optimizer, *rows: Any, **options: Any) -> float:
        loss = original(model, optimizer, *rows, **options)
        return math.inf if optimizer.param_groups[-1]["lr"] > 0.005 else loss

    monkeypatch.setattr(loop, "training_step", training_step)
    settings = {"learning_rate": "tune", "max_steps": 30, "learning_rate_probe_steps": 10}
    trained = train(planted(30), validate(Train, settings, "train"), 0)
    assert trained.tuned is not None
    assert trained.tuned.tried[0.01] == -math.inf
    assert trained.tuned.tried[trained.tuned.learning_rate] > 0
    assert trained.stopped is None
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_tuning_trains_where_a_bad_rate_does_not() -> None:
    # BUG-05: under reference scaling the rate that works depends on the gradients.
    store, settings = planted(2000, scale=0.05), {"scaling": "reference", "max_steps": 200}
    fixed = train(store, validate(Train, settings | {"learning_rate": 1e-6}, "train"), 0)
    tuned = train(store, validate(Train, settings | {"learning_rate": "tune"}, "train"), 0)
    assert best_line(tuned)["correlation"] > 0.9 > best_line(fixed)["correlation"]
    assert all(torch.isfinite(value).all() for value in tuned.model.parameters())
