"""Labels, the sample, and the mean gradient behind pre-pruning."""

import itertools
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend_core.gradients.importance import class_label, mean_gradient, stratified_sample
from gradiend_core.gradients.objectives import encode
from gradiend_core.gradients.selection import Selection, backbone_parameters
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
