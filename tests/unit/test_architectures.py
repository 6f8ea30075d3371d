"""Rows of every supported architecture against double precision, one example at a time."""

import copy
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Final, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradiend_core.gradients.collector import GradientCollector, Rows, loop_rows
from gradiend_core.gradients.losses import share_input, slot_logits
from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.selection import Selection
from tests.unit.tiny import CAUSAL, MASKED, build, causal_pairs, everything, exact_rows, pairs, relative_error, some

# Relative L2 errors of whole rows and of one tensor's part of a row. A tensor that hardly takes part in a row is made
# of differences of larger numbers, whose rounding it inherits.
LIMIT = 5e-6
TENSOR_LIMIT = 3e-5

# What else the configurations of these kinds can express: heads of their own or tied ones where the default is the
# other, biases, the order of norms and sums, the relative positions of DeBERTa-v3, the projections of OPT-350m.
VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "bert-untied": ("bert", {"tie_word_embeddings": False}),
    "deberta-v3": ("deberta", {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 4}),
    "modernbert-biases": ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "opt-projections": ("opt", {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
}
NAMES = [*MASKED, *CAUSAL, *VARIANTS]
ONE_BY_ONE = {"deberta", "deberta-v3"}
EAGER_ONLY = {*ONE_BY_ONE, "gemma2"}

# A key's bias adds the same number to all scores of a query, so that it has no gradient in theory. Not where keys are
# rotated afterwards; in DeBERTa, those of the keys that meet the query's positions are also compared with others.
KEY_BIASES = dict.fromkeys(["bert", "roberta", "xlm-roberta", "albert", "electra"], "*.key.bias")
KEY_BIASES |= {"distilbert": "*.k_lin.bias", "opt": "*.k_proj.bias", "deberta": "*.pos_key_proj.bias"}


class Case(NamedTuple):
    model: PreTrainedModel
    factual: list[Example]
    alternative: list[Example]


@cache
def case(name: str, **options: Any) -> Case:
    kind, variant = VARIANTS.get(name, (name, {}))
    model, tokenizer = build(kind, **variant, **options)
    factual, alternative = (causal_pairs if kind in CAUSAL else pairs)(tokenizer)
    # A padding token in the middle of a text: tables with a `padding_idx` do not learn from it, others do.
    for examples in (factual, alternative):
        first, _, *rest = examples[0].input_ids
        examples.append(examples[0]._replace(input_ids=(first, tokenizer.pad_token_id, *rest)))
    return Case(model, factual, alternative)


@cache
def exact(name: str) -> Rows:
    """Rows of all entries of the backbone in double precision."""
    model, factual, alternative = case(name)
    minus = exact_rows(model, everything(model), alternative)
    return Rows(minus, exact_rows(model, everything(model), factual) - minus)


@cache
def collected(name: str) -> Rows:
    """Rows of all entries of the backbone, all examples in one batch."""
    model, factual, alternative = case(name)
    return GradientCollector(model, everything(model)).rows(factual, alternative)


def quantities(rows: Rows) -> dict[str, Tensor]:
    return {"alternative": rows.alternative, "diff": rows.diff, "factual": rows.alternative + rows.diff}


def row_errors(ours: Rows, other: Rows) -> dict[str, float]:
    expected = quantities(other)
    return {quantity: relative_error(found, expected[quantity]) for quantity, found in quantities(ours).items()}


def assert_close(ours: Rows, other: Rows, limit: float = LIMIT) -> None:
    errors = row_errors(ours, other)
    assert max(errors.values()) <= limit, errors


def by_tensor(selection: Selection, rows: Tensor) -> dict[str, Tensor]:
    return dict(zip(selection.names, torch.split(rows, selection.sizes, dim=1), strict=True))


def norms(rows: Tensor) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(rows.double(), dim=1)
    return result


def without_gradient(name: str, tensor: str) -> bool:
    kind, _ = VARIANTS.get(name, (name, {}))
    return fnmatchcase(tensor, KEY_BIASES.get(kind, ""))


@pytest.mark.parametrize("name", NAMES)
def test_rows_equal_a_double_precision_loop(name: str) -> None:
    model, factual, alternative = case(name)
    rows = collected(name)
    assert rows.alternative.dtype == rows.diff.dtype == torch.float32
    assert_close(rows, exact(name))
    for share in (0.05, 0.5):
        part = some(model, share)
        places = everything(model).locate(part)
        expected = Rows(*(quantity[:, places] for quantity in exact(name)))
        assert_close(GradientCollector(model, part).rows(factual, alternative), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_equals_a_double_precision_loop(name: str) -> None:
    selection = everything(case(name).model)
    for quantity, rows in quantities(collected(name)).items():
        expected = quantities(exact(name))[quantity]
        whole = norms(expected)
        parts = by_tensor(selection, expected)
        for tensor, found in by_tensor(selection, rows).items():
            error, size = norms(found.double() - parts[tensor]), norms(parts[tensor])
            limit = LIMIT * whole if without_gradient(name, tensor) else TENSOR_LIMIT * size
            assert (error <= limit).all(), (tensor, quantity, (error / size).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_only_biases_of_keys_have_no_gradient(name: str) -> None:
    selection = everything(case(name).model)
    rows = exact(name).alternative
    shares = {tensor: norms(part) / norms(rows) for tensor, part in by_tensor(selection, rows).items()}
    zero = {tensor for tensor, share in shares.items() if share.max() <= 1e-12}
    assert zero == {tensor for tensor in selection.names if without_gradient(name, tensor)}


@pytest.mark.parametrize("name", NAMES)
def test_loop_equals_a_double_precision_loop(name: str) -> None:
    model, factual, alternative = case(name)
    assert_close(loop_rows(model, everything(model), factual, alternative), exact(name))


@pytest.mark.parametrize("name", NAMES)
def test_logits_at_scored_positions_equal_those_of_whole_texts(name: str) -> None:
    model, factual, alternative = case(name)
    examples = [*factual, *alternative]
    for found, example in zip(slot_logits(model, examples), examples, strict=True):
        expected = model(input_ids=torch.tensor([example.input_ids])).logits[0, list(example.positions)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2])
def test_rows_do_not_depend_on_the_batch(name: str, size: int) -> None:
    """Nor on padding: a row that is alone has none, next to a longer row it has some."""
    model, factual, alternative = case(name)
    collector = GradientCollector(model, everything(model))
    starts = range(0, len(factual), size)
    batches = [collector.rows(factual[i : i + size], alternative[i : i + size]) for i in starts]
    rows = Rows(torch.cat([part.alternative for part in batches]), torch.cat([part.diff for part in batches]))
    assert_close(rows, collected(name))


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_order(name: str) -> None:
    model, factual, alternative = case(name)
    rows = GradientCollector(model, everything(model)).rows(factual[::-1], alternative[::-1])
    assert_close(rows, Rows(*(quantity.flip(0) for quantity in collected(name))))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EAGER_ONLY])
def test_rows_do_not_depend_on_the_implementation_of_attention(name: str) -> None:
    assert case(name).model.config._attn_implementation == "sdpa"
    model, factual, alternative = case(name, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert_close(GradientCollector(model, everything(model)).rows(factual, alternative), collected(name))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_repeatable_to_the_bit(name: str) -> None:
    model, factual, alternative = case(name)
    again = GradientCollector(model, everything(model)).rows(factual, alternative)
    for found, before in zip(again, collected(name), strict=True):
        assert torch.equal(found, before)


@pytest.mark.parametrize("name", NAMES)
def test_only_models_without_separate_examples_fall_back_and_say_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, factual, alternative = case(name)
    with caplog.at_level(logging.INFO, "gradiend_core.gradients"):
        collector = GradientCollector(model, everything(model))
        for _ in range(2):
            collector.rows(factual[:2], alternative[:2])
    assert len(caplog.records) == (name in ONE_BY_ONE), caplog.messages
    assert collector.one_by_one is (name in ONE_BY_ONE)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_examples_cover_what_the_rows_must_be_right_about(name: str) -> None:
    _, factual, alternative = case(name)
    couples = list(zip(factual, alternative, strict=True))
    shared = [couple for couple in couples if share_input(*couple)]
    assert 0 < len(shared) < len(couples)
    assert any(len(plus.input_ids) != len(minus.input_ids) for plus, minus in couples)
    assert any(max(plus.slots) > 0 for plus in factual)
    for side in (factual, [plus for plus, _ in shared]):
        assert len({len(example.labels) for example in side}) > 1
    lengths = [len(example.input_ids) for example in factual]
    assert max(lengths) - min(lengths) >= 10


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("modernbert", {"local_attention": 64}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
def test_settings_matter(kind: str, options: dict[str, Any]) -> None:
    """Windows, caps, rotations and orders that a text were too short for, or a name misspelt, would be untested."""
    model, factual, _ = case(kind)
    other, _ = build(kind, **options)
    other.load_state_dict(model.state_dict(), strict=False)
    input_ids = torch.tensor([factual[0].input_ids])
    assert not torch.allclose(model(input_ids).logits, other(input_ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind", [*MASKED, *CAUSAL])
def test_evaluation_mode_matters(kind: str) -> None:
    model, factual, _ = case(kind)
    input_ids = torch.tensor([factual[0].input_ids])
    expected = model(input_ids).logits
    training = copy.deepcopy(model).train()
    assert torch.equal(model(input_ids).logits, expected)
    assert not torch.allclose(training(input_ids).logits, expected, atol=1e-3)
