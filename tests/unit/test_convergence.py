"""When a seed has converged, and which one is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.errors import GradiendError
from gradiend_core.training.convergence import failed_conditions, seed_report
from pipeline.select_seed import main

PARAMS = SelectSeed(convergent_score_threshold=0.5, convergent_mean_by_class_threshold=0.25, min_convergent_seeds=1)


def metrics(correlation: float = 0.9, **changed: Any) -> dict[str, Any]:
    return {
        "correlation": correlation,
        "mean_positive": 0.8,
        "mean_negative": -0.7,
        "best_step": 50,
        "r2": 0.1,
    } | changed


def best(found: list[dict[str, Any]], enough: int | None) -> tuple[int, int]:
    """The kept seed and how many were looked at."""
    report = seed_report(dict(enumerate(found)), PARAMS.model_copy(update={"min_convergent_seeds": enough}))
    return report["best_seed"], report["seeds_tried"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"best_step": 0}, "no step improved on the initial weights"),
        ({"correlation": 0.4999}, "correlation 0.500 < 0.5"),
        ({"correlation": -0.9}, "correlation -0.900 < 0.5"),
        ({"mean_negative": 0.7}, "class means 0.800 and 0.700 lie on one side"),
        ({"mean_positive": -0.8}, "class means -0.800 and -0.700 lie on one side"),
        ({"mean_positive": 0.2}, "smallest |class mean| 0.200 < 0.25"),
        ({"mean_negative": -0.2}, "smallest |class mean| 0.200 < 0.25"),
    ],
)
def test_each_condition_alone_keeps_a_seed_from_converging(changed: dict[str, Any], reason: str) -> None:
    assert failed_conditions(metrics(), PARAMS) == []
    assert failed_conditions(metrics() | changed, PARAMS) == [reason]


def test_thresholds_are_inclusive() -> None:
    assert failed_conditions(metrics(0.5, mean_positive=0.25, mean_negative=-0.25), PARAMS) == []


def test_mean_of_exactly_zero_is_on_no_side() -> None:
    params = PARAMS.model_copy(update={"convergent_mean_by_class_threshold": 0.0})
    assert len(failed_conditions(metrics(mean_positive=0.0), params)) == 1


def test_seeds_are_taken_in_order_until_enough_have_converged() -> None:
    seeds = [metrics(0.3), metrics(0.6), metrics(0.7), metrics(0.99)]
    assert best(seeds, 1) == (1, 2)
    assert best(seeds, 2) == (2, 3)
    assert best(seeds, 3) == (3, 4)
    assert best(seeds, 4) == (3, 4), "three converged seeds are kept although four were wanted"


def test_null_considers_all() -> None:
    assert best([metrics(0.6), metrics(0.9), metrics(0.7)], None) == (1, 3)


def test_ties_keep_the_earlier_seed() -> None:
    assert best([metrics(0.6), metrics(0.9), metrics(0.9)], None) == (1, 3)
    assert best([metrics(0.1), metrics(0.2), metrics(0.2)], 1) == (1, 3)


def test_converged_seed_goes_before_a_higher_correlation() -> None:
    assert best([metrics(0.99, best_step=0), metrics(0.6)], None) == (1, 2)


def test_without_a_converged_seed_the_highest_correlation_is_kept() -> None:
    assert best([metrics(0.1), metrics(0.4), metrics(0.2)], 1) == (1, 3)


def test_order_is_that_of_the_list_not_of_the_numbers() -> None:
    report = seed_report({7: metrics(0.6), 1: metrics(0.9)}, PARAMS)
    assert (report["best_seed"], report["convergent_seeds"], report["max_seeds"]) == (7, [7], 2)
    assert report["runs"][0]["convergent_min_target_class_abs_mean"] == 0.7


def test_stage_follows_the_order_of_params_and_names_a_missing_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("seeds: [5, 2]\nruns: {one: {select_seed: {convergent_score_threshold: 0.5}}}\n")
    arguments = ["--params", "runs.one.select_seed", "--seeds", "seeds", "--seed-runs", "seeds"]
    arguments += ["--output", "seed_report.json", "--manifest", "manifest.json"]
    for seed, correlation in ((2, 0.95), (5, 0.9)):
        with pytest.raises(GradiendError, match=r"seeds/\d/metrics\.json: cannot be read"):
            main(arguments)
        assert not Path("seed_report.json").exists()
        folder = Path("seeds") / str(seed)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics(correlation)))
    main(arguments)
    report = json.loads(Path("seed_report.json").read_text())
    assert (report["best_seed"], report["seeds_tried"], report["best_selection_score"]) == (5, 1, 0.9)
