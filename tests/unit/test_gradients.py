"""Collected rows against double precision, one example at a time, and the self-check that guards them."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.collector import GradientCollector, Rows, find_sites, loop_rows
from gradiend_core.gradients.losses import share_input
from gradiend_core.gradients.objectives import Example, pad
from gradiend_core.gradients.products import Scratch
from gradiend_core.gradients.rules import EmbeddingWeight, Use
from gradiend_core.gradients.selection import Selection, backbone_parameters
from gradiend_core.gradients.taps import Sites
from gradiend_core.gradients.verify import TOLERANCE, verify_rows
from tests.unit.tiny import build, everything, exact_rows, pairs, relative_error, some

LIMIT = 5e-6
KINDS = ["bert", "distilbert", "roberta", "albert", "electra"]


def assert_exact(rows: Rows, model: nn.Module, selection: Selection, plus: list[Example], minus: list[Example]) -> None:
    alternative = exact_rows(model, selection, minus)  # type: ignore[arg-type]
    diff = exact_rows(model, selection, plus) - alternative  # type: ignore[arg-type]
    assert relative_error(rows.alternative, alternative) <= LIMIT
    assert relative_error(rows.diff, diff) <= LIMIT
    assert relative_error(rows.alternative + rows.diff, alternative + diff) <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_a_double_precision_loop(kind: str) -> None:
    model, tokenizer = build(kind)
    plus, minus = pairs(tokenizer)
    assert {share_input(one, other) for one, other in zip(plus, minus, strict=True)} == {True, False}
    for selection in (everything(model), some(model)):
        collector = GradientCollector(model, selection)
        assert not collector.one_by_one
        rows = collector.rows(plus, minus)
        assert rows.alternative.dtype == rows.diff.dtype == torch.float32
        assert_exact(rows, model, selection, plus, minus)
        assert_exact(loop_rows(model, selection, plus, minus), model, selection, plus, minus)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_batch_order_or_padding(kind: str) -> None:
    model, tokenizer = build(kind)
    plus, minus = pairs(tokenizer)
    collector = GradientCollector(model, some(model))
    whole = collector.rows(plus, minus)
    backwards = collector.rows(plus[::-1], minus[::-1])
    alone = [collector.rows([one], [other]) for one, other in zip(plus, minus, strict=True)]
    for quantity in ("alternative", "diff"):
        expected = getattr(whole, quantity)
        assert relative_error(getattr(backwards, quantity).flip(0), expected) <= 1e-6
        assert relative_error(torch.cat([getattr(row, quantity) for row in alone]), expected) <= 2e-6


def test_rows_are_repeatable_to_the_bit() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    first, again = (GradientCollector(model, some(model)).rows(plus, minus) for _ in range(2))
    assert torch.equal(first.alternative, again.alternative)
    assert torch.equal(first.diff, again.diff)


def test_memory_may_be_used_again() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    collector = GradientCollector(model, some(model))
    expected = collector.rows(plus[:2], minus[:2])
    buffer = collector.buffer(5)
    collector.rows(plus, minus, out=buffer)  # leaves rows that the next batch must not be added to
    rows = collector.rows(plus[:2], minus[:2], out=buffer)
    for ours, other, memory in zip(rows, expected, buffer, strict=True):
        assert torch.equal(ours, other)
        assert ours.data_ptr() == memory.data_ptr()


def test_equal_words_have_no_difference() -> None:
    model, tokenizer = build("bert")
    plus, _ = pairs(tokenizer)
    rows = GradientCollector(model, everything(model)).rows(plus, plus)
    assert not rows.diff.any()
    assert rows.alternative.any(1).all()


def test_tied_embeddings_appear_once_and_receive_both_contributions() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    name = "bert.embeddings.word_embeddings.weight"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    selection = Selection.everything(backbone_parameters(model, [name]))
    collector = GradientCollector(model, selection)
    assert_exact(collector.rows(plus, minus), model, selection, plus, minus)
    exact = exact_rows(model, selection, minus)
    whole = collector._sites
    embedding_only = Sites(embeddings=whole.embeddings, tables=whole.tables)
    head_only = Sites(modules=whole.modules)
    assert len(whole.embeddings) == len(whole.modules) == 1
    for part in (embedding_only, head_only):
        collector._sites = part
        assert relative_error(collector.rows(plus, minus).alternative, exact) > 1e-2


def test_parameters_stay_frozen_and_carry_no_gradient() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    selection = some(model)
    collector = GradientCollector(model, selection)
    loop = loop_rows(model, selection, plus, minus)
    assert not loop.alternative.requires_grad
    rows = collector.rows(plus, minus)
    assert not rows.alternative.requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def assert_exact_in_batches(model: Any, plus: list[Example], minus: list[Example]) -> None:
    collector = GradientCollector(model, everything(model))
    rows = collector.rows(plus, minus)
    assert not collector.one_by_one
    assert_exact(rows, model, everything(model), plus, minus)


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class PlainSubclass(nn.Linear):
    pass


class Gate(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gate


class SharedTable(nn.Module):
    """Adds the same vector to every hidden state: a table's output that has no batch dimension."""

    def __init__(self, size: int, entries: int) -> None:
        super().__init__()
        self.table = nn.Embedding(entries, size)

    def forward(self, hidden: Tensor) -> Tensor:
        mean: Tensor = self.table(torch.arange(self.table.num_embeddings)).mean(0)
        return hidden + mean


def retype(linear: nn.Linear, kind: type[nn.Linear]) -> nn.Linear:
    made = kind(linear.in_features, linear.out_features)
    made.load_state_dict(linear.state_dict())
    return made


def test_module_with_its_own_forward_is_differentiated_as_it_is() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    layer = model.bert.encoder.layer[0].intermediate
    layer.dense = retype(layer.dense, ScaledLinear)
    assert_exact_in_batches(model, plus, minus)


def test_subclass_with_an_inherited_forward_keeps_the_rule() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    layer = model.bert.encoder.layer[0].intermediate
    layer.dense = retype(layer.dense, PlainSubclass)
    collector = GradientCollector(model, everything(model))
    assert not collector.one_by_one
    assert_exact(collector.rows(plus, minus), model, everything(model), plus, minus)


def test_parameter_of_an_unknown_module_is_differentiated_as_it_is() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    model.bert.embeddings.dropout = Gate(16)
    assert_exact_in_batches(model, plus, minus)


def test_output_changed_in_place_is_no_obstacle() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU(inplace=True)
    assert_exact_in_batches(model, plus, minus)


def test_parameter_of_a_module_with_children_falls_back_to_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    model.bert.embeddings.dropout = nn.Sequential(Gate(16))
    model.bert.embeddings.dropout.gate = model.bert.embeddings.dropout[0].gate
    with caplog.at_level(logging.INFO):
        collector = GradientCollector(model, everything(model))
        rows = [collector.rows(plus, minus) for _ in range(2)]
    assert caplog.messages == ["no rule for the parameters of bert.embeddings.dropout: one example at a time"]
    assert_exact(rows[1], model, everything(model), plus, minus)


class DataDependent(Gate):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gate if bool(hidden.sum() > 0) else 2 * hidden * self.gate


def test_module_that_looks_at_its_data_falls_back_to_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    model.bert.encoder.layer[0].output.dropout = DataDependent(16)
    collector = GradientCollector(model, everything(model))
    with caplog.at_level(logging.INFO):
        rows = [collector.rows(plus, minus) for _ in range(2)]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("no gradient by example of a DataDependent")
    assert_exact(rows[1], model, everything(model), plus, minus)


def test_module_without_kept_entries_needs_no_rule() -> None:
    model, _ = build("bert")
    model.bert.embeddings.dropout = Gate(16)
    selection = Selection.everything(backbone_parameters(model, ["*.query.weight"]))
    sites = find_sites(model, selection)
    assert len(sites.modules) == 2
    assert not sites.without_rule


def test_output_shared_by_the_batch_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    model.bert.embeddings.dropout = SharedTable(16, entries=7)
    collector = GradientCollector(model, everything(model))
    with caplog.at_level(logging.INFO):
        rows = [collector.rows(plus, minus) for _ in range(2)]
    assert len(caplog.records) == 1
    assert "output (7, 16) of a Embedding is not separated by example" in caplog.records[0].message
    assert_exact(rows[1], model, everything(model), plus, minus)


def test_shared_output_that_looks_like_a_batch_fails_the_self_check() -> None:
    model, tokenizer = build("bert")
    plus, minus = (side[:3] for side in pairs(tokenizer))
    plus, minus = [minus[0], *plus[1:2], plus[0]], [plus[0], *minus[1:2], minus[0]]
    model.bert.embeddings.dropout = SharedTable(16, entries=3)
    rows = GradientCollector(model, everything(model)).rows(plus, minus)
    with pytest.raises(GradiendError, match="self-check failed"):
        verify_rows(model, everything(model), rows, plus, minus)


def test_relative_positions_shared_by_the_batch_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("deberta")
    plus, minus = pairs(tokenizer)
    collector = GradientCollector(model, everything(model))
    with caplog.at_level(logging.INFO):
        rows = collector.rows(plus, minus)
    assert "one example at a time" in caplog.text
    assert_exact(rows, model, everything(model), plus, minus)


def test_uncalled_module_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = build("deberta")
    plus, minus = pairs(tokenizer)
    selection = Selection.everything(backbone_parameters(model, ["*rel_embeddings.weight"]))
    with caplog.at_level(logging.INFO):
        rows = GradientCollector(model, selection).rows(plus, minus)
    assert caplog.messages == ["the forward pass does not call Embedding: one example at a time"]
    assert_exact(rows, model, selection, plus, minus)


def test_padding_does_not_change_a_row() -> None:
    model, tokenizer = build("roberta")
    (short,), (other,) = (side[-1:] for side in pairs(tokenizer))
    long_plus, long_minus = (side[3:4] for side in pairs(tokenizer))
    ids, _ = pad([short, *long_plus], tokenizer.pad_token_id)
    assert int((ids[0] == tokenizer.pad_token_id).sum()) > 5
    collector = GradientCollector(model, everything(model))
    alone = collector.rows([short], [other])
    padded = collector.rows([short, *long_plus], [other, *long_minus])
    assert relative_error(padded.alternative[:1], alone.alternative) <= 1e-6


def test_self_check_passes_correct_rows_with_a_wide_margin() -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    selection = some(model)
    error = verify_rows(model, selection, GradientCollector(model, selection).rows(plus, minus), plus, minus)
    assert 0 < error <= 2e-6 < TOLERANCE[torch.float32]


@pytest.mark.parametrize("damage", ["swapped", "scaled diff", "scaled last", "scaled middle", "one tensor", "nan"])
def test_self_check_refuses_wrong_rows(damage: str) -> None:
    model, tokenizer = build("bert")
    plus, minus = pairs(tokenizer)
    selection = some(model)
    rows = GradientCollector(model, selection).rows(plus, minus)
    if damage == "swapped":
        rows = Rows(rows.alternative.roll(1, 0), rows.diff.roll(1, 0))
    elif damage == "scaled diff":
        rows.diff[0] *= 1.001
    elif damage == "scaled last":
        rows.alternative[-1] *= 1.001
    elif damage == "scaled middle":
        rows.alternative[2] *= 1.01
    elif damage == "one tensor":
        names = zip(selection.names, torch.split(rows.diff, selection.sizes, dim=1), strict=True)
        next(part for name, part in names if name.endswith("output.LayerNorm.bias")).mul_(1.01)
    else:
        rows.diff[0, 0] = torch.nan
    with pytest.raises(GradiendError, match="self-check failed"):
        verify_rows(model, selection, rows, plus, minus)


def test_shared_output_that_looks_like_flat_positions_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = build("deberta", share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=4)
    table = len(
        model.deberta.encoder.rel_embeddings.weight
    )  # its layer norm acts on the table itself, once for the batch
    n = 2
    text = tuple(range(5, 5 + table // n))
    plus, minus = ([Example(text, (1 + row,), (label,), (0,)) for row in range(n)] for label in (7, 9))
    selection = Selection.everything(backbone_parameters(model, ["*encoder.LayerNorm.*"]))
    with caplog.at_level(logging.INFO):
        rows = GradientCollector(model, selection).rows(plus, minus)
    assert caplog.messages == ["the forward pass does not call Embedding: one example at a time"]
    assert_exact(rows, model, selection, plus, minus)


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("table", [9, 200])  # products and a scatter
def test_embedding_rule_adds_up_what_falls_on_an_entry(table: int, share: float | None) -> None:
    random = torch.Generator().manual_seed(0)
    entries = torch.randint(-1, table, (3, 40), generator=random)  # -1: takes no part
    d = torch.randn(3, 40, 6, generator=random)
    kept = None if share is None else (torch.rand(table * 6, generator=random) < share).nonzero()[:, 0]
    exact = torch.zeros(3, table, 6, dtype=torch.float64)
    for example, position in torch.cartesian_prod(torch.arange(3), torch.arange(40)).tolist():
        if (entry := int(entries[example, position])) >= 0:
            exact[example, entry] += d[example, position]
    expected = exact.flatten(1) if kept is None else exact.flatten(1)[:, kept]
    out = torch.full(expected.shape, torch.nan)
    rule, use = EmbeddingWeight((table, 6), kept, Scratch()), Use(nn.Embedding(table, 6), "weight")
    for times in (1, 2):
        rule.put(out, use, entries, d, first=times == 1)
        torch.testing.assert_close(out.double(), times * expected, rtol=1e-5, atol=1e-5)


def test_examples_of_one_scored_position_each() -> None:
    model, tokenizer = build("bert")
    plus, minus = ([side[row] for row in (0, 0, 4)] for side in pairs(tokenizer))
    plus[1], minus[1] = minus[0], plus[0]
    plus[2] = minus[2]._replace(labels=minus[0].labels)
    assert [len(example.positions) for example in plus + minus] == [1] * 6
    for selection in (everything(model), some(model)):
        assert_exact(GradientCollector(model, selection).rows(plus, minus), model, selection, plus, minus)
