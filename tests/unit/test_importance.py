"""Labels, the sample, the gradients behind pre-pruning, and the stage that chooses entries by them."""

import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from gradiend_core.data.tables import NEUTRAL, TRAINING
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.importance import (
    aligned_weights,
    importance_bytes,
    mean_gradient,
    require_usable,
    stratified_sample,
)
from gradiend_core.gradients.labels import class_label
from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k, top_k_count
from gradiend_core.tables import write_table
from gradiend_core.tensors import load_tensors, read_metadata
from pipeline.pre_prune import main
from tests.unit.memory import needs_peak_memory, peak_memory
from tests.unit.tiny import MAX_LENGTH, build, exact_rows, pairs, relative_error

Source = Literal["factual", "alternative", "diff"]
SOURCES: tuple[Source, ...] = ("factual", "alternative", "diff")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("factual", [1, -1, 0, 0]), ("diff", [1, -1, 0, 0]), ("alternative", [-1, 1, 0, 0])],
)
def test_sign_of_a_row(source: Source, expected: list[float]) -> None:
    rows = pd.DataFrame({"factual_class": ["A", "B", "C", None], "alternative_class": ["B", "A", "A", None]})
    labels = class_label(rows, ["A", "B"], source)
    assert labels.tolist() == expected
    assert not np.signbit(labels[2:]).any()  # no -0.0


def test_sample_has_exact_counts_whatever_the_order_of_the_table() -> None:
    # BUG-04: positions chosen in one order and used in another gave random counts.
    for transitions in (["A->B"] * 40 + ["B->A"] * 9, ["B->A", "A->B"] * 20, ["B->A"] * 9 + ["A->B"] * 40):
        table = pd.Series(transitions, index=pd.Index(np.arange(len(transitions))[::-1] + 100))
        for size, expected in ((8, [4, 4]), (9, [5, 4]), (1, [1, 0])):
            sample = table.iloc[stratified_sample(table, size, seed=3)]
            assert [int((sample == name).sum()) for name in ("A->B", "B->A")] == expected
            assert len(set(sample.index)) == size


def test_sample_grows_by_adding_rows() -> None:
    transitions = pd.Series((["A->B"] * 3 + ["B->A"] * 2) * 10)
    samples = [set(stratified_sample(transitions, size, seed=1)) for size in range(1, 51)]
    assert all(small <= large for small, large in itertools.pairwise(samples))
    assert [len(sample) for sample in samples[:40]] == list(range(1, 41))
    assert len(samples[-1]) == 20 + 25  # one transition has only 20 rows


def test_sample_depends_on_the_seed_alone() -> None:
    transitions = pd.Series(["A->B", "B->A"] * 30)
    assert stratified_sample(transitions, 10, seed=1) == stratified_sample(transitions, 10, seed=1)
    assert stratified_sample(transitions, 10, seed=1) != stratified_sample(transitions, 10, seed=2)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch_size", [2, 100])
def test_mean_gradient_is_the_weighted_mean_of_the_rows(source: Source, batch_size: int) -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    parameters = backbone_parameters(model)
    whole = Selection.everything(parameters)
    weights = np.array([1.0, -1.0, 1.0, 0.5, -1.0])
    factual, alternative = exact_rows(model, whole, plus), exact_rows(model, whole, minus)
    rows = {"factual": factual, "alternative": alternative, "diff": factual - alternative}[source]
    found = mean_gradient(model, parameters, plus, minus, weights, source=source, batch_size=batch_size)
    assert relative_error(found, torch.tensor(weights) @ rows / 5) <= 5e-6
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_halves_and_leftover_gradients_do_not_get_into_the_mean() -> None:
    # In half precision, sums over many batches would be rounded to three digits.
    model, tokenizer = build("bert")
    model = model.bfloat16()
    parameters = backbone_parameters(model)
    plus, minus = ([example] for example in (pairs(tokenizer)[0][0], pairs(tokenizer)[1][0]))
    settings: dict[str, Any] = {"source": "factual", "batch_size": 1}
    once = mean_gradient(model, parameters, plus, minus, np.ones(1), **settings)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    often = mean_gradient(model, parameters, plus * 300, minus * 300, np.ones(300), **settings)
    assert (often.dtype, often.shape) == (torch.float32, (sum(p.numel() for p in parameters.values()),))
    assert relative_error(often, once) <= 1e-5


def test_model_is_left_as_it_was_after_an_error() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    bad = [plus[0]._replace(labels=(10_000,))]
    with pytest.raises((IndexError, RuntimeError)):
        mean_gradient(
            model, backbone_parameters(model), plus + bad, minus * 2, np.ones(6), source="factual", batch_size=2
        )
    assert not any(p.requires_grad or p._post_accumulate_grad_hooks for p in model.parameters())


def large_model(hidden_size: int, num_hidden_layers: int) -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=100,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=2,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=16,
        )
    )


@needs_peak_memory
def test_memory_is_that_of_the_result_and_one_tensor() -> None:
    small, large = large_model(16, 1), large_model(512, 8)
    examples = [Example((2, 50 + k, 4, 3), (2,), (10 + k,), (0,)) for k in range(4)]
    settings: dict[str, Any] = {"source": "diff", "batch_size": 2}
    mean_gradient(small, backbone_parameters(small), examples, examples[::-1], np.ones(4), **settings)
    parameters = backbone_parameters(large)
    with peak_memory() as peak:
        mean_gradient(large, parameters, examples, examples[::-1], np.ones(4), **settings)
    weights = sum(4 * p.numel() for p in large.parameters())
    assert weights > 100e6
    assert peak() < 1.4 * weights
    assert importance_bytes(large, parameters) == pytest.approx(weights + peak(), rel=0.2)


def test_aligned_weights_are_the_labels_of_a_balanced_sample() -> None:
    labels = np.array([1.0, -1.0, -1.0, 1.0])
    assert aligned_weights(labels).tolist() == labels.tolist()


def test_what_the_classes_share_cancels_whatever_their_numbers() -> None:
    # The mean of label times gradient would keep three quarters of it here.
    labels = np.array([1.0] * 7 + [-1.0])
    shared, own = 5.0, np.where(labels > 0, 2.0, -1.0)
    assert (aligned_weights(labels) * (shared + own)).mean() == pytest.approx((2.0 - (-1.0)) / 2)
    assert (labels * (shared + own)).mean() > 5


@pytest.mark.parametrize("labels", [[1.0], [-1.0, -1.0], []])
def test_aligned_weights_need_both_classes(labels: list[float]) -> None:
    with pytest.raises(GradiendError, match=r"pre_prune.statistic: aligned_mean .* Raise pre_prune.n_samples .* rms"):
        aligned_weights(np.array(labels))


def test_importance_that_is_not_finite_is_traced_to_its_parameter() -> None:
    parameters = {"a": torch.zeros(2, 2), "b": torch.zeros(3), "c": torch.zeros(1)}
    require_usable(torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 0]), parameters)
    for value in (float("nan"), float("inf")):
        with pytest.raises(GradiendError, match=r"pre_prune: gradients of 2 of 3 parameters .* the first of b\."):
            require_usable(torch.tensor([1.0, 0, 0, 0, 0, value, 1.0, value]), parameters)
    with pytest.raises(GradiendError, match=r"every selected parameter is zero .*pre_prune\.params"):
        require_usable(torch.zeros(8), parameters)


def test_unaligned_mean_cancels_what_the_aligned_mean_keeps() -> None:
    model, tokenizer = build("bert")
    parameters = backbone_parameters(model)
    templates = ["then [MASK] said that the doctor was late .", "today the king saw [MASK]"] * 2
    words = {"A": ["he", "he", "she", "she"], "B": ["she", "she", "he", "he"]}  # opposite difference gradients
    plus, minus = (encode(tokenizer, templates, side, max_length=MAX_LENGTH) for side in words.values())
    rows = pd.DataFrame({"factual_class": ["A", "A", "B", "B"]})
    labels = class_label(rows, ["A", "B"], "diff")
    aligned, plain = (
        mean_gradient(model, parameters, plus, minus, weights, source="diff", batch_size=4)
        for weights in (labels, labels**2)
    )
    assert float(plain.norm()) < 1e-5 * float(aligned.norm())


def top_importances(labels: np.ndarray, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definitions of the statistics, over rows [N, n]."""
    weights = torch.tensor(labels)[:, None]
    return {
        "aligned_mean": (weights * rows).mean(0).abs(),
        "rms": rows.square().mean(0).sqrt(),
        "mean": rows.mean(0).abs(),
    }


Stage = Callable[..., tuple[Selection, dict[str, Any]]]


@pytest.fixture
def stage(
    reference_folder: Path, reference_rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Stage:
    """Run the stage on the reference's model and rows; its selection and manifest."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference_folder, "model")
    Path("data").mkdir()
    write_table(Path("data/neutral.parquet"), pd.DataFrame({name: [] for name in NEUTRAL}), NEUTRAL)

    def run(params: dict[str, Any], rows: pd.DataFrame = reference_rows) -> tuple[Selection, dict[str, Any]]:
        write_table(Path("data/training.parquet"), rows, TRAINING)
        Path("params.yaml").write_text(yaml.safe_dump({"section": params}))
        places = ["--base-model", "model", "--dataset", "data", "--output", "s.safetensors", "--manifest", "m.json"]
        main(["--params", "section", "--target-classes", "M", "F", *places])
        selection = Selection.from_tensors(
            load_tensors(Path("s.safetensors")), read_metadata(Path("s.safetensors"))["mapping"]
        )
        return selection, json.loads(Path("m.json").read_text("utf-8"))

    return run


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("statistic", ["aligned_mean", "rms", "mean"])
def test_stage_keeps_the_top_of_the_statistic(
    stage: Stage, reference_model: Any, reference_rows: pd.DataFrame, source: Source, statistic: str
) -> None:
    model, tokenizer = reference_model
    train = reference_rows[reference_rows["split"] == "train"].reset_index(drop=True)
    n_samples = 2 * int(train["transition"].value_counts().min())
    sample = train.iloc[stratified_sample(train["transition"], n_samples, seed=3)]
    whole = Selection.everything(backbone_parameters(model))
    factual, alternative = (
        exact_rows(model, whole, encode(tokenizer, sample["masked"], sample[kind], max_length=14))
        for kind in ("factual", "alternative")
    )
    rows = {"factual": factual, "alternative": alternative, "diff": factual - alternative}[source]
    importance = top_importances(class_label(sample, ["M", "F"], source), rows)[statistic]
    selection, manifest = stage(
        {"statistic": statistic, "source": source, "n_samples": n_samples, "topk": 0.05, "seed": 3, "batch_size": 3}
    )
    assert torch.equal(selection.base_global_indices(), top_k(importance, 0.05))
    assert manifest["entries_kept"] == selection.n == top_k_count(0.05, whole.n)
    assert set(manifest["rows"].values()) == {n_samples // 2}
    kept = importance[selection.base_global_indices()]
    assert manifest["importance_last_kept"] == pytest.approx(float(kept.min()), rel=1e-4)
    assert manifest["importance_largest"] == pytest.approx(float(kept.max()), rel=1e-4)


def test_stage_with_a_threshold_keeps_what_reaches_it(stage: Stage) -> None:
    last = stage({"topk": 100})[1]["importance_last_kept"]
    selection, manifest = stage({"topk": None, "threshold": last})
    assert manifest["entries_kept"] == selection.n == 100
    assert stage({"topk": 0.101, "threshold": last})[0].n == 11  # of the 100, not of all, rounded up
    with pytest.raises(GradiendError, match=r"pre_prune\.threshold: no entry has an importance of 1000 or more"):
        stage({"topk": 0.1, "threshold": 1000.0})


def test_stage_says_before_what_it_will_do_and_how_many_rows_there_were(
    stage: Stage, reference_rows: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one = reference_rows[reference_rows["transition"] == "M->F"].iloc[:3]
    rows = pd.concat([one, reference_rows[reference_rows["transition"] == "F->M"]]).assign(split="train")
    _, manifest = stage({"n_samples": 1000}, rows)
    counts = rows["transition"].value_counts().to_dict()
    assert manifest["rows"] == counts
    said = [record.getMessage() for record in caplog.records]
    assert f"over {len(rows)} rows ({counts['F->M']} F->M, 3 M->F), about " in said[0]
    assert said[1].startswith(f"pre_prune.n_samples: {len(rows)} rows used of the 1000 asked for")
    assert said[-1].startswith("kept ")


def test_stage_samples_the_same_number_of_each_transition_from_a_shuffled_table(
    stage: Stage, reference_rows: pd.DataFrame
) -> None:
    # BUG-04: the reference draws positions in the order of one table and reads another.
    rows = reference_rows.assign(split="train")
    for seed in range(5):
        _, manifest = stage({"n_samples": 6, "seed": seed}, rows.sample(frac=1, random_state=seed))
        assert manifest["rows"] == {"F->M": 3, "M->F": 3}


def test_stage_without_anything_to_leave_out_looks_at_no_row(stage: Stage, reference_rows: pd.DataFrame) -> None:
    for params in ({"topk": None}, {"topk": 1.0}):
        selection, manifest = stage(params, reference_rows.iloc[:0])
        assert manifest["entries_kept"] == selection.n > 1000
        assert "rows" not in manifest
    assert stage({"topk": 1})[0].n == 1  # a count


@pytest.mark.parametrize(
    ("change", "params", "says"),
    [
        (
            lambda rows: rows.assign(split="test"),
            {},
            "training.parquet: no row of the train split leads from .*'M' and",
        ),
        (lambda rows: rows[rows["factual_class"] == "M"], {}, "aligned_mean compares two classes, but the 8 sampled"),
        (lambda rows: rows, {"params": ["bert.embedings.*"]}, "pre_prune.params: 'bert.embedings.*' matches no"),
    ],
)
def test_stage_says_what_is_wrong(
    stage: Stage, reference_rows: pd.DataFrame, change: Any, params: dict[str, Any], says: str
) -> None:
    with pytest.raises(GradiendError, match=says):
        stage(params, change(reference_rows.assign(split="train")))


def test_stage_refuses_a_model_whose_gradients_are_not_finite(stage: Stage) -> None:
    tensors = load_tensors(Path("model/model.safetensors"))
    name = next(name for name in tensors if name.endswith("layer.1.output.dense.bias"))
    save_file(
        {key: value.clone().fill_(float("inf")) if key == name else value.clone() for key, value in tensors.items()},
        "model/model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(GradiendError, match=r"pre_prune: gradients of .* parameters are not finite, the first of bert"):
        stage({})
