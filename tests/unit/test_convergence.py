"""When a seed has converged, and which one is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradiend_core.config.section import validate
from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.training.convergence import diagnoses, failed_conditions, non_convergence, seed_report
from gradiend_core.training.stability import exact_interval, topk_stability
from pipeline.select_seed import main

PARAMS = SelectSeed.model_validate({"convergent_mean_by_class_threshold": 0.25})
LOSS = SelectSeed.model_validate({"convergent_metric": "loss", "convergent_score_threshold": 2.0})

# What semantics 6 lists, but for output_dir, trained, used_cache, split_cycle_index and split_cycle_length.
REFERENCE_KEYS = {
    "convergence_metric",
    "threshold",
    "convergent_mean_by_class_threshold",
    "min_convergent_seeds",
    "max_seeds",
    "seeds_tried",
    "convergent_count",
    "convergent_seeds",
    "best_seed",
    "best_selection_score",
    "best_seed_selection_strategy",
    "early_stop_reason",
    "runs",
}
REFERENCE_RUN_KEYS = {
    "seed",
    "training_score",
    "eval_correlation",
    "selection_score",
    "convergence_metric",
    "convergence_metric_value",
    "best_checkpoint_global_step",
    "threshold",
    "convergent_mean_by_class_threshold",
    "convergent_min_target_class_abs_mean",
    "converged",
}


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
    return report["best_seed"], len(report["seeds_tried"])


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
    assert (report["best_seed"], report["convergent_seeds"], report["seeds_tried"]) == (7, [7], [7])
    assert report["max_seeds"] == 2
    assert report["runs"][0]["convergent_min_target_class_abs_mean"] == 0.7


@pytest.mark.parametrize("missing", ["mean_positive", "mean_negative"])
def test_class_without_an_encoding_keeps_a_seed_from_converging(missing: str) -> None:
    found = metrics()
    del found[missing]
    assert failed_conditions(found, PARAMS) == ["a target class has no encoding"]
    (run,) = seed_report({0: found}, PARAMS)["runs"]
    assert run["convergent_min_target_class_abs_mean"] == (0.7 if missing == "mean_positive" else 0.8)
    assert list(run["diagnoses"]) == ["a class is missing"]


def test_null_threshold_is_the_reference_default() -> None:
    assert SelectSeed.model_validate({}).score_threshold == 0.5
    assert seed_report({0: metrics()}, PARAMS)["threshold"] == 0.5


def test_loss_must_be_small_and_nothing_else_counts() -> None:
    opposite = metrics(0.0, mean_positive=-0.1, mean_negative=-0.2)
    assert failed_conditions(opposite | {"eval_loss": 2.0}, LOSS) == []
    assert failed_conditions(opposite | {"eval_loss": 2.01}, LOSS) == ["loss 2.01 > 2"]
    assert failed_conditions(opposite | {"eval_loss": 1.0, "best_step": 0}, LOSS) == [
        "no step improved on the initial weights"
    ]
    assert failed_conditions(opposite, LOSS) == ["no loss was found"]


def test_seed_of_the_smallest_loss_is_kept() -> None:
    losses = {0: 1.5, 1: 0.5, 2: 1.0, 3: 0.1}
    found = {seed: metrics(1 - loss / 10, eval_loss=loss) for seed, loss in losses.items()} | {3: metrics(0.99)}
    report = seed_report(found, LOSS.model_copy(update={"min_convergent_seeds": None}))
    assert (report["best_seed"], report["best_selection_score"], report["convergent_seeds"]) == (1, -0.5, [0, 1, 2])
    assert [run["convergence_metric_value"] for run in report["runs"]] == [1.5, 0.5, 1.0, None]
    large = {seed: found | {"eval_loss": 10 + found["eval_loss"]} for seed, found in list(found.items())[:3]}
    report = seed_report(large, LOSS)
    assert (report["best_seed"], report["best_seed_selection_strategy"]) == (1, "lowest_loss_fallback")


def test_seed_without_a_score_is_the_last_choice_but_one_of_nothing() -> None:
    nothing = {"best_step": 0}
    report = seed_report({0: nothing, 1: metrics(0.1)}, PARAMS)
    assert (report["best_seed"], report["runs"][0]["eval_correlation"]) == (1, None)
    assert seed_report({0: nothing}, PARAMS)["best_seed"] == 0


def stopped(correlation: float = 0.99, **changed: Any) -> dict[str, Any]:
    """Metrics of a training that was ended by a loss that is not finite, good as its last evaluation may have been."""
    return metrics(correlation, stopped="seed 4 stopped at step 40: the loss is nan", stopped_step=40, seed=4) | changed


def test_stopped_seed_has_not_converged_and_says_why() -> None:
    report = seed_report({0: stopped(), 1: metrics(0.6)}, PARAMS)
    assert (report["best_seed"], report["convergent_seeds"], report["convergent_fraction"]) == (1, [1], 0.5)
    first, second = report["runs"]
    assert (first["converged"], first["reasons"]) == (False, ["stopped at step 40: the loss is nan"])
    assert (first["stopped_step"], second["stopped_step"]) == (40, None)
    assert list(first["diagnoses"]) == ["diverged"]
    for advice in ("lower train.learning_rate", "train.max_grad_norm", "train.warmup_steps"):
        assert advice in first["diagnoses"]["diverged"]
    assert diagnoses(stopped(r2=-1.0), LOSS).keys() == {"diverged"}


def test_stopped_seed_is_not_kept_while_another_was_trained_to_the_end() -> None:
    poor = {"best_step": 0}  # without any score
    assert seed_report({0: stopped(), 1: poor, 2: stopped()}, PARAMS)["best_seed"] == 1
    report = seed_report({0: poor, 1: stopped(eval_loss=0.1), 2: metrics(eval_loss=9.0)}, LOSS)
    assert (report["best_seed"], report["best_seed_selection_strategy"]) == (2, "lowest_loss_fallback")
    nothing = {"best_step": 0, "stopped": "stopped at step 1", "stopped_step": 1}
    assert seed_report({0: nothing, 1: metrics(0.1)}, PARAMS)["best_seed"] == 1


def test_interval_of_the_correlation_is_passed_on() -> None:
    report = seed_report({0: metrics(0.3, correlation_low=0.1, correlation_high=0.4), 1: metrics()}, PARAMS)
    bounds = [(run["eval_correlation_low"], run["eval_correlation_high"]) for run in report["runs"]]
    assert bounds == [(0.1, 0.4), (None, None)]


@pytest.mark.parametrize(
    ("changed", "diagnosis"),
    [
        ({}, []),
        ({"best_step": 0}, ["no movement"]),
        ({"correlation": 0.2, "mean_positive": 0.01, "mean_negative": -0.02}, ["no movement"]),
        ({"correlation": 0.2, "mean_positive": 0.99, "mean_negative": 0.98}, ["both classes on one side"]),
        ({"correlation": -0.9, "mean_positive": -0.8, "mean_negative": 0.7}, ["turned around"]),
        ({"correlation": 0.3, "mean_positive": 0.3, "mean_negative": -0.3}, ["classes overlap"]),
        ({"mean_positive": 0.2, "mean_negative": -0.2}, ["classes too near"]),
        ({"r2": 0.0}, ["decoder explains nothing"]),
        ({"best_step": 0, "r2": -0.2}, ["no movement", "decoder explains nothing"]),
    ],
)
def test_failure_is_explained(changed: dict[str, Any], diagnosis: list[str]) -> None:
    found = diagnoses(metrics() | changed, PARAMS)
    assert list(found) == diagnosis
    assert all(advice for advice in found.values())


def test_loss_failures_are_explained() -> None:
    assert list(diagnoses(metrics(eval_loss=3.0), LOSS)) == ["loss too large"]
    assert list(diagnoses(metrics(eval_loss=3.0, best_step=0), LOSS)) == ["no movement"]


def test_max_seeds_takes_the_first_of_the_list() -> None:
    found = {7: metrics(0.1), 1: metrics(0.2), 2: metrics(0.9)}
    report = seed_report(found, PARAMS.model_copy(update={"max_seeds": 2}))
    assert (report["seeds_tried"], report["max_seeds"], report["best_seed"]) == ([7, 1], 2, 1)
    assert seed_report(found, PARAMS.model_copy(update={"max_seeds": 9}))["max_seeds"] == 3


def test_report_has_the_keys_of_the_reference_and_of_every_run() -> None:
    report = seed_report({0: metrics(0.3), 1: metrics(0.9), 2: metrics()}, PARAMS)
    assert report.keys() >= REFERENCE_KEYS
    assert report["best_seed_selection_strategy"] == "best_convergent_selection_score"
    assert report["early_stop_reason"] == "min_convergent_seeds reached: 1 >= 1 with metric=correlation threshold=0.5"
    for run, correlation in zip(report["runs"], (0.3, 0.9), strict=True):
        assert run.keys() >= REFERENCE_RUN_KEYS
        names = ("training_score", "eval_correlation", "selection_score", "convergence_metric_value")
        assert [run[name] for name in names] == [correlation] * 4
    report = seed_report({0: metrics(0.3)}, PARAMS)
    assert report["early_stop_reason"] is None
    assert report["best_seed_selection_strategy"] == "highest_correlation_fallback"
    json.dumps(report, allow_nan=False)


def test_fraction_of_convergent_seeds_counts_those_beyond_the_needed_ones() -> None:
    report = seed_report(dict(enumerate([metrics(), metrics(0.1), metrics(), metrics()])), PARAMS)
    assert (report["convergent_count"], report["convergent_fraction"]) == (1, 0.75)
    bounds = (report["convergent_fraction_low"], report["convergent_fraction_high"])
    assert bounds == pytest.approx((0.19412, 0.99369), abs=1e-5)  # Clopper and Pearson, 3 of 4


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"convergent_metric": "loss"}, "loss needs a convergent_score_threshold"),
        ({"convergent_score_threshold": 1.5}, "must be at most 1 for a correlation, not 1.5"),
        ({"max_seeds": 2, "min_convergent_seeds": 3}, "min_convergent_seeds 3 can never be reached with max_seeds 2"),
    ],
)
def test_contradictory_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(GradiendError, match=message):
        validate(SelectSeed, params, "params.yaml")


def test_shortage_says_of_each_seed_why_and_what_to_try() -> None:
    seeds = {3: metrics(best_step=0), 5: metrics(), 8: metrics(0.1, mean_positive=0.9, mean_negative=0.95)}
    wanted = PARAMS.model_copy(update={"min_convergent_seeds": 2})
    message = non_convergence(seed_report(seeds, wanted))
    assert message is not None
    lines = message.splitlines()
    assert lines[0] == "1 of 3 seeds converged, 2 needed:"
    assert lines[1:4] == [
        "  seed 3: no step improved on the initial weights",
        "  seed 5: converged",
        "  seed 8: correlation 0.100 < 0.5; class means 0.900 and 0.950 lie on one side",
    ]
    assert [line.split(":")[0] for line in lines[4:6]] == ["  no movement", "  both classes on one side"]
    assert non_convergence(seed_report(seeds, PARAMS)) is None
    everyone = PARAMS.model_copy(update={"min_convergent_seeds": None})
    assert non_convergence(seed_report(seeds, everyone)) is None
    assert non_convergence(seed_report({3: seeds[3]}, everyone)) is not None


def run_stage(section: str, seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Run the stage in the working folder on models of 13 random entries; the report."""
    settings = f"seeds: [{', '.join(map(str, seeds))}]\nruns: {{one: {{select_seed: {section}}}}}\n"
    Path("params.yaml").write_text(settings)
    for seed, found in seeds.items():
        model = GradiendModel(Selection.everything({"w": torch.zeros(13)}), target_classes=("A", "B"))
        model.reset_parameters(seed, zero_decoder_bias=False)
        model.save_pretrained(Path("seeds") / str(seed))
        (Path("seeds") / str(seed) / "metrics.json").write_text(json.dumps(found))
    arguments = ["--params", "runs.one.select_seed", "--seeds", "seeds", "--seed-runs", "seeds"]
    main([*arguments, "--output", "seed_report.json", "--manifest", "manifest.json"])
    report: dict[str, Any] = json.loads(Path("seed_report.json").read_text())
    return report


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("in_folder")
def test_stage_follows_the_order_of_params() -> None:
    report = run_stage("{}", {5: metrics(0.9), 2: metrics(0.95)})
    assert (report["best_seed"], report["seeds_tried"], report["best_selection_score"]) == (5, [5], 0.9)


@pytest.mark.usefixtures("in_folder")
def test_stage_names_a_missing_seed() -> None:
    seeds = {5: metrics(), 2: metrics()}
    run_stage("{}", seeds)
    Path("seed_report.json").unlink()
    Path("seeds/2/metrics.json").unlink()
    arguments = ["--params", "runs.one.select_seed", "--seeds", "seeds", "--seed-runs", "seeds"]
    arguments += ["--output", "seed_report.json", "--manifest", "manifest.json"]
    with pytest.raises(GradiendError, match=r"seeds/2/metrics\.json: cannot be read"):
        main(arguments)
    assert not Path("seed_report.json").exists()
    Path("params.yaml").write_text("seeds: [5, 2]\nruns: {one: {select_seed: {max_seeds: 1}}}\n")
    main(arguments)  # the second seed is not looked at


@pytest.mark.usefixtures("in_folder")
def test_stage_fails_on_non_convergence_and_leaves_the_seeds(caplog: pytest.LogCaptureFixture) -> None:
    seeds = {0: metrics(best_step=0), 1: metrics(0.2)}
    report = run_stage("{}", seeds)
    assert (report["convergent_count"], report["best_seed"]) == (0, 0)
    assert "0 of 2 seeds converged, 1 needed" in caplog.text
    Path("seed_report.json").unlink()
    with pytest.raises(GradiendError) as raised:
        run_stage("{fail_on_non_convergence: true}", seeds)
    message = str(raised.value)
    assert message.startswith("runs.one.select_seed.fail_on_non_convergence: 0 of 2 seeds converged, 1 needed")
    assert "seed 0: no step improved" in message
    assert "raise train.learning_rate" in message
    assert not Path("seed_report.json").exists()
    assert len(list(Path("seeds").rglob("model.safetensors"))) == 2
    run_stage("{fail_on_non_convergence: true}", seeds | {1: metrics()})


@pytest.mark.usefixtures("in_folder")
def test_stage_goes_on_without_the_stopped_seeds_and_fails_when_there_are_no_others() -> None:
    report = run_stage("{min_convergent_seeds: null}", {0: stopped(), 1: metrics(0.1), 2: stopped()})
    assert (report["best_seed"], report["convergent_count"]) == (1, 0)
    Path("seed_report.json").unlink()
    with pytest.raises(GradiendError) as raised:
        run_stage("{}", {4: stopped(), 7: stopped(0.2)})
    lines = str(raised.value).splitlines()
    assert lines[0] == "runs.one.select_seed: every seed diverged, so that there is no model to go on with:"
    assert lines[1:3] == [f"  seed {seed}: stopped at step 40: the loss is nan" for seed in (4, 7)]
    assert lines[3].startswith("  diverged: lower train.learning_rate")
    assert not Path("seed_report.json").exists()


@pytest.mark.usefixtures("in_folder")
def test_stage_compares_the_entries_of_the_converged_seeds() -> None:
    seeds = {0: metrics(0.9), 1: metrics(best_step=0), 2: metrics(0.8)}
    report = run_stage("{min_convergent_seeds: null, seed_stability_topk: 4}", seeds)
    expected = {}
    for part in ("decoder-weight", "encoder-weight"):
        chosen = [
            set(GradiendModel.from_pretrained(f"seeds/{seed}").importance(part).topk(4).indices.tolist())
            for seed in (0, 2)
        ]
        expected[part] = len(chosen[0] & chosen[1])
    stability = report["topk_stability"]
    assert (stability["seeds"], stability["topk"], stability["part"]) == ([0, 2], 4, "decoder-weight")
    assert stability["intersection_size"] == expected["decoder-weight"]
    assert stability["chance_overlap_fraction"] == 4 / 13
    section = "{min_convergent_seeds: null, seed_stability_topk: 4, seed_stability_part: encoder-weight}"
    assert run_stage(section, seeds)["topk_stability"]["intersection_size"] == expected["encoder-weight"]
    assert expected["decoder-weight"] != expected["encoder-weight"]
    assert (
        run_stage("{min_convergent_seeds: null, seed_stability_topk: 0.5}", seeds)["topk_stability"]["mean_topk_size"]
        == 7
    )
    assert "topk_stability" not in run_stage("{min_convergent_seeds: null, seed_stability_topk: null}", seeds)
    assert run_stage("{}", seeds)["topk_stability"]["reason"] == "need_at_least_two_runs"


def test_stability_of_sets_worked_out_by_hand() -> None:
    sets = {0: [1, 2, 3, 4], 1: [3, 4, 5], 7: [4, 9, 10, 11]}
    found = topk_stability({seed: np.array(members) for seed, members in sets.items()}, 40)
    assert [(row["seed_a"], row["seed_b"], row["overlap_count"]) for row in found["pairwise_overlap_rows"]] == [
        (0, 1, 2),
        (1, 7, 1),
        (0, 7, 1),
    ]
    overlaps, jaccards = [2 / 3, 1 / 4, 1 / 3], [2 / 5, 1 / 7, 1 / 6]
    for name, values in (("overlap", overlaps), ("jaccard", jaccards)):
        suffix = "_fraction" if name == "overlap" else ""
        assert found[f"mean_pairwise_{name}{suffix}"] == pytest.approx(np.mean(values))
        assert found[f"pairwise_{name}_std"] == pytest.approx(np.std(values))
        assert found[f"min_pairwise_{name}{suffix}"] == pytest.approx(min(values))
        assert found[f"max_pairwise_{name}{suffix}"] == pytest.approx(max(values))
    assert (found["union_size"], found["intersection_size"]) == (8, 1)
    assert (found["parameters_seen_once"], found["parameters_seen_in_all_runs"]) == (6, 1)
    assert found["mean_presence_fraction"] == pytest.approx((6 * 1 + 2 + 3) / 8 / 3)
    assert (found["mean_topk_size"], found["chance_overlap_fraction"]) == (pytest.approx(11 / 3), 0.1)
    same = topk_stability({0: np.arange(5), 1: np.arange(5)}, 10)
    assert (same["mean_pairwise_jaccard"], same["mean_pairwise_overlap_fraction"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [
        (0, 3, (0.0, 1 - 0.025 ** (1 / 3))),
        (3, 3, (0.025 ** (1 / 3), 1.0)),
        (5, 10, (0.187086, 0.812914)),  # tables of Clopper and Pearson
        (1, 20, (0.001265, 0.248733)),
    ],
)
def test_exact_interval(successes: int, n: int, interval: tuple[float, float]) -> None:
    assert exact_interval(successes, n) == pytest.approx(interval, abs=1e-6)
