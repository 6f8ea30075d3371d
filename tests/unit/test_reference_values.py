"""Our numbers against those of the reference package (tests/reference, made by bench/reference)."""

import math
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.config.train import Train
from gradiend_core.evaluation.decoder import select_candidates
from gradiend_core.evaluation.encoder import encoder_metrics
from gradiend_core.evaluation.scoring import ClassScorer
from gradiend_core.evaluation.tables import BASE_ID
from gradiend_core.gradients.collector import GradientCollector, Rows
from gradiend_core.gradients.importance import mean_gradient
from gradiend_core.gradients.labels import class_label
from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k
from gradiend_core.model.gradiend import GradiendModel, Part
from gradiend_core.model.rewriting import decoded_update, rewritten
from gradiend_core.training.convergence import failed_conditions, seed_report
from gradiend_core.training.loop import build_optimizer, training_step

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerFast]
Tensors = dict[str, torch.Tensor]
Values = dict[str, Any]
Source = Literal["factual", "alternative", "diff"]
CLASSES = ("M", "F")
WORDS = {"M": ["he"], "F": ["she"]}
MAX_LENGTH = 14
WEIGHTS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.norm())


def examples(tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame) -> tuple[list[Example], list[Example]]:
    factual, alternative = (
        encode(tokenizer, rows["masked"], rows[kind], max_length=MAX_LENGTH) for kind in ("factual", "alternative")
    )
    return factual, alternative


def collect(loaded: Loaded, rows: pd.DataFrame) -> Rows:
    model, tokenizer = loaded
    collector = GradientCollector(model, Selection.everything(backbone_parameters(model)))
    return collector.rows(*examples(tokenizer, rows))


def kept_model(loaded: Loaded, tensors: Tensors, weights: str, **settings: Any) -> GradiendModel:
    """A GRADIEND of the 64 entries of `training.kept`, with the reference's weights."""
    whole = Selection.everything(backbone_parameters(loaded[0]))
    selection = whole.prune(tensors["training.kept"].long())
    return with_weights(GradiendModel(selection, target_classes=CLASSES, **settings), tensors, weights)


def with_weights(model: GradiendModel, tensors: Tensors, prefix: str) -> GradiendModel:
    model.load_state_dict({name: tensors[f"{prefix}.{name}"].view_as(model.state_dict()[name]) for name in WEIGHTS})
    return model


def test_order_of_parameters(reference_model: Loaded, values: Values) -> None:
    ours = [[name, list(p.shape)] for name, p in backbone_parameters(reference_model[0]).items()]
    assert ours == values["gradients"]["parameters"]


def test_mean_of_rows_is_the_batch_gradient(
    reference_model: Loaded, reference_rows: pd.DataFrame, values: Values, tensors: Tensors
) -> None:
    for batch, numbers in enumerate(values["gradients"]["batches"]):
        rows = collect(reference_model, reference_rows.iloc[numbers])
        assert error(rows.alternative.mean(0), tensors["gradients.alternative"][batch]) <= 1e-5
        assert error((rows.alternative + rows.diff).mean(0), tensors["gradients.factual"][batch]) <= 1e-5
        if batch == 0:
            assert error(rows.diff.mean(0), tensors["gradients.diff_first"]) <= 1e-5


def test_labels_of_batches(reference_rows: pd.DataFrame, values: Values) -> None:
    for source in ("factual", "alternative"):
        labels = class_label(reference_rows, CLASSES, source)
        ours = [list(labels[numbers]) for numbers in values["gradients"]["batches"]]
        assert ours == [[label] * 4 for label in values["gradients"][f"labels_source_{source}"]]


@pytest.mark.parametrize("name", ["two_slots", "two_pieces"])
def test_several_scored_positions(reference_model: Loaded, values: Values, tensors: Tensors, name: str) -> None:
    masked, word = values["gradients"]["singles"][name]
    rows = collect(reference_model, pd.DataFrame({"masked": [masked], "factual": [word], "alternative": ["she"]}))
    assert error(rows.alternative[0] + rows.diff[0], tensors[f"gradients.{name}"]) <= 1e-5


@pytest.mark.parametrize("source", ["alternative", "diff"])
def test_pre_pruning_by_the_reference_statistic_keeps_the_same_entries(
    reference_model: Loaded, reference_rows: pd.DataFrame, values: Values, tensors: Tensors, source: Source
) -> None:
    model, tokenizer = reference_model
    rows = reference_rows.iloc[values["pre_prune"][source]["rows"]]
    labels = class_label(rows, CLASSES, source)
    parameters = backbone_parameters(model)
    mean = mean_gradient(model, parameters, *examples(tokenizer, rows), labels**2, source=source, batch_size=3).abs()
    kept = top_k(mean, values["pre_prune"]["topk"])
    assert torch.equal(kept, tensors[f"pre_prune.{source}.kept"].long())
    assert float(mean[kept].min()) == pytest.approx(values["pre_prune"][source]["importance_last_kept"], rel=1e-5)


@pytest.mark.parametrize("name", ["init.0", "init.1"])
def test_forward_pass(values: Values, tensors: Tensors, name: str) -> None:
    n, latent_dim = (values["init"][name][key] for key in ("n", "latent_dim"))
    selection = Selection.everything({"w": torch.zeros(n)})
    model = with_weights(GradiendModel(selection, target_classes=CLASSES, latent_dim=latent_dim), tensors, name)
    source = tensors[f"{name}.input"][None]
    assert error(model.encode(source)[0], tensors[f"{name}.encoded"]) <= 1e-6
    assert error(model(source)[0], tensors[f"{name}.decoded"]) <= 1e-6


@pytest.mark.parametrize("name", ["init.0", "init.1"])
def test_initialisation(values: Values, tensors: Tensors, name: str) -> None:
    n, latent_dim, seed = (values["init"][name][key] for key in ("n", "latent_dim", "seed"))
    model = GradiendModel(Selection.everything({"w": torch.zeros(n)}), target_classes=CLASSES, latent_dim=latent_dim)
    model.reset_parameters(seed, zero_decoder_bias=False)
    # The encoder comes first in both random streams. The reference then draws a decoder that it throws away.
    assert error(model.encoder.weight, tensors[f"{name}.encoder.weight"]) <= 1e-6
    assert error(model.encoder.bias, tensors[f"{name}.encoder.bias"]) <= 1e-6
    largest = float(tensors[f"{name}.encoder.weight"].max())
    for tensor in (tensors[f"{name}.decoder.weight"], model.decoder.weight.detach(), model.decoder.bias.detach()):
        assert 0.5 * largest < float(tensor.abs().max()) <= largest


@pytest.mark.parametrize("name", ["adamw", "adam", "two_rows"])
def test_trajectory_of_training(reference_model: Loaded, values: Values, tensors: Tensors, name: str) -> None:
    settings = values["training"][name]
    params = Train.model_validate(
        {
            "scaling": "reference",
            "learning_rate": settings["learning_rate"],
            "weight_decay": settings["weight_decay"],
            "adam_epsilon": settings["adam_epsilon"],
            "optim": settings["optimizer"],
        }
    )
    model = kept_model(reference_model, tensors, "training.initial")
    optimizer = build_optimizer(model, params)
    source, target = tensors["training.source"], tensors["training.target"]
    losses, encodings = [], [model.encode(source)[:, 0]]
    for rows in islice(cycle(settings["rows_of_a_pass"]), 100):
        losses.append(training_step(model, optimizer, source[rows], target[rows], "reference"))
        encodings.append(model.encode(source)[:, 0])
    assert losses == pytest.approx(tensors[f"training.{name}.losses"].tolist(), rel=1e-4)
    for ours, theirs in zip(encodings, tensors[f"training.{name}.encodings"], strict=True):
        assert error(ours, theirs) <= 1e-4
    for weight in WEIGHTS:
        ours, theirs = model.state_dict()[weight], tensors[f"training.{name}.final.{weight}"]
        assert error(ours.flatten(), theirs.flatten()) <= 1e-4
    assert float(model.encoder.weight.detach().norm()) == pytest.approx(settings["encoder_norm"], rel=1e-4)


def test_source_of_the_trajectory_is_our_batch_mean(
    reference_model: Loaded, reference_rows: pd.DataFrame, values: Values, tensors: Tensors
) -> None:
    kept = tensors["training.kept"].long()
    for batch, numbers in enumerate(values["gradients"]["batches"]):
        rows = collect(reference_model, reference_rows.iloc[numbers])
        assert error(rows.alternative.mean(0)[kept], tensors["training.source"][batch]) <= 1e-5
        assert error(rows.diff.mean(0)[kept], tensors["training.target"][batch]) <= 1e-5


@pytest.mark.parametrize("part", get_args(Part))
def test_importance_and_top_k(reference_model: Loaded, values: Values, tensors: Tensors, part: Part) -> None:
    model = kept_model(reference_model, tensors, "training.adamw.final")
    importance = model.importance(part)
    assert error(importance, tensors[f"importance.{part}"]) <= 1e-6
    expected = values["importance"][part]
    assert top_k(importance, 10).tolist() == sorted(expected["local_top_10"])
    assert top_k(importance, 0.07).tolist() == sorted(expected["local_top_0.07"])
    pruned = model.prune(10, part)
    assert pruned.selection.base_global_indices().tolist() == sorted(expected["base_global_top_10"])


def test_rewriting(reference_model: Loaded, values: Values, tensors: Tensors) -> None:
    model = kept_model(reference_model, tensors, "training.adamw.final")
    base = reference_model[0]
    before = model.selection.gather(dict(base.named_parameters())).detach()
    assert torch.equal(before, tensors["rewrite.base"])
    for number, settings in enumerate(values["rewrite"]["rewrites"]):
        with rewritten(base, model, **settings):
            after = model.selection.gather(dict(base.named_parameters())).detach()
        assert error(after, tensors[f"rewrite.{number}"]) <= 1e-6
        change = tensors[f"rewrite.{number}"] - tensors["rewrite.base"]
        assert error(decoded_update(model, **settings), change) <= 1e-5


def test_word_probabilities(
    reference_model: Loaded, reference_rows: pd.DataFrame, values: Values, tensors: Tensors
) -> None:
    base, tokenizer = reference_model
    scoring = values["scoring"]
    rows = reference_rows.iloc[scoring["rows"]]
    scorer = ClassScorer.prepare(tokenizer, list(rows["masked"]), WORDS, max_length=MAX_LENGTH)
    gradiend = kept_model(reference_model, tensors, "training.adamw.final")
    found = {"base": scorer.probabilities(base, 3)}
    for number, settings in enumerate(values["rewrite"]["rewrites"]):
        with rewritten(base, gradiend, **settings):
            found[f"rewrite.{number}"] = scorer.probabilities(base, 3)
    assert found.keys() == scoring["models"].keys()
    for name, probabilities in found.items():
        expected = scoring["models"][name]
        for scored in CLASSES:
            assert probabilities[scored] == pytest.approx(np.array(expected["per_row"][scored]), abs=1e-6, rel=1e-5)
            for dataset in CLASSES:
                mean = probabilities[scored][(rows["factual_class"] == dataset).to_numpy()].mean()
                assert mean == pytest.approx(expected["by_dataset"][dataset][scored], abs=1e-6, rel=1e-5)


@pytest.mark.parametrize(("block", "rows"), [("metrics", slice(None)), ("metrics_of_labelled_rows", None)])
def test_encoder_metrics(values: Values, block: str, rows: slice | None) -> None:
    given = values["encoder_metrics"]
    table = pd.DataFrame(given["table"], columns=given["columns"])
    table = table if rows is not None else table[(table["type"] == "training") & (table["label"] != 0)]
    ours, theirs = encoder_metrics(table), given[block]
    for name in ("all_data", "training_only", "target_classes_only"):
        assert ours[name]["correlation"] == pytest.approx(theirs[name]["correlation"])
        assert ours[name]["accuracy"] == pytest.approx(theirs[name]["accuracy"])
    assert ours["training_only"]["correlation"] == pytest.approx(theirs["correlation"])
    for statistic in ("mean", "min", "max", "q1", "q3", "std", "n"):
        by_label = {float(label): found[statistic] for label, found in ours["by_label"].items()}
        assert by_label == pytest.approx({float(k): v for k, v in theirs[f"{statistic}_by_class"].items()})
        by_class = {name: found[statistic] for name, found in ours["by_feature_class"].items()}
        assert by_class == pytest.approx(theirs[f"{statistic}_by_feature_class"])
    means = {name: found["mean"] for name, found in ours["by_type"].items()}
    assert means == pytest.approx(theirs["mean_by_type"])


def oriented_best(evaluations: Sequence[Values]) -> Values:
    """What our training reports of a run with these evaluations: the first best |correlation|, turned once."""
    step = max(range(len(evaluations)), key=lambda k: abs(evaluations[k]["correlation"]))
    means = evaluations[step]["mean_by_class"]
    positive, negative = means.get("1.0", math.nan), means.get("-1.0", math.nan)
    sign = 1 if math.isnan(negative) or positive >= negative else -1
    found = {"best_step": step, "correlation": sign * evaluations[step]["correlation"], "r2": 0.0}
    return found | {"mean_positive": sign * positive, "mean_negative": sign * negative}


def test_convergence_decisions(values: Values) -> None:
    given = values["convergence"]
    thresholds = ("convergent_score_threshold", "convergent_mean_by_class_threshold")
    params = SelectSeed.model_validate({name: given[name] for name in thresholds})
    for name, case in given["cases"].items():
        if name == "class_missing":
            continue  # our datasets have rows of both classes in every split, or are refused
        metrics = oriented_best(case["evaluations"])
        assert metrics["best_step"] == case["best_step"], name
        report = seed_report({0: metrics}, params)
        # A departure: the reference turns a model only when the correlation is below -0.6, and calls one at -0.55
        # converged in a single run but not among several seeds. Ours is turned at any negative correlation.
        expected = case["converged_single_run"]
        assert (not failed_conditions(metrics, params)) is expected, name
        assert report["runs"][0]["converged"] is expected, name
        if name == "negative_dead_zone":
            assert not case["converged_multi_seed"]
        else:
            assert case["converged_multi_seed"] is expected
            assert metrics["correlation"] == pytest.approx(case["best_correlation"])
        smallest = report["runs"][0]["convergent_min_target_class_abs_mean"]
        assert smallest == pytest.approx(case["min_abs_mean"]), name


def grid(case: Values) -> pd.DataFrame:
    lines = []
    for factor, rate, lms, *probabilities in [[np.nan, np.nan, case["base_lms"], 0.0, 0.0], *case["grid"]]:
        name = BASE_ID if np.isnan(factor) else f"{factor:+g}, {rate:g}"
        for scored, dataset, value in zip(CLASSES, reversed(CLASSES), probabilities, strict=True):
            line = {"id": name, "feature_factor": factor, "learning_rate": rate, "lms": lms, "probability": value}
            line |= {"lms_low": lms, "lms_high": lms, "probability_low": value, "probability_high": value}
            lines.append(line | {"scored_class": scored, "dataset_class": dataset})
    return pd.DataFrame(lines)


def test_selection_of_candidates(values: Values) -> None:
    model = GradiendModel(Selection.everything({"w": torch.zeros(2)}), target_classes=CLASSES)
    fallbacks = {}
    for name, case in values["selection"].items():
        ours = select_candidates(grid(case), model, case["ratio"])
        for target in CLASSES:
            expected = case["selected"][target]
            for key in ("feature_factor", "learning_rate", "value", "lms", "base_lms", "strengthen"):
                assert ours[target][key] == expected[key], (name, target, key)
        fallbacks[name] = {target: ours[target]["fallback"] for target in CLASSES}
    assert fallbacks == {
        "all_pass": {"M": False, "F": False},
        "threshold": {"M": False, "F": False},
        "tie_keeps_first": {"M": False, "F": False},
        "fallback_one_class": {"M": False, "F": True},
        "fallback_smallest_rate": {"M": True, "F": True},
    }


def test_feature_factors(values: Values) -> None:
    selection = Selection.everything({"w": torch.zeros(2)})
    for source, expected in values["feature_factors"].items():
        model = GradiendModel(selection, target_classes=CLASSES, source=source, target="diff")
        assert {name: model.strengthening_factor(name) for name in CLASSES} == expected
