"""A decoded update moves the selected weights and nothing else, and can be undone to the bit."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.model.rewriting import decoded_update, rewrite, rewritten
from tests.unit.tiny import build, everything, some


def gradiend(selection: Selection) -> GradiendModel:
    model = GradiendModel(selection, target_classes=("A", "B"), source_scale=0.1, target_scale=0.3)
    model.reset_parameters(0, zero_decoder_bias=False)
    return model


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_update_is_rate_times_decoded_factor() -> None:
    model = gradiend(everything(build("bert")[0]))
    state = model.state_dict()
    for factor in (1.0, -1.0, 0.5):
        expected = 0.7 * 0.3 * (factor * state["decoder.weight"][:, 0] + state["decoder.bias"])
        update = decoded_update(model, learning_rate=0.7, feature_factor=factor)
        torch.testing.assert_close(update, expected)
        assert not update.requires_grad


def test_only_selected_entries_move_and_by_the_update() -> None:
    base = build("bert")[0]
    selection = some(base)
    model, before = gradiend(selection), weights(base)
    rewrite(base, model, learning_rate=2.0, feature_factor=-1.0)
    whole = everything(base)
    moved = whole.gather(weights(base)) - whole.gather(before)
    expected = torch.zeros(whole.n).index_copy(
        0, selection.base_global_indices(), decoded_update(model, learning_rate=2.0, feature_factor=-1.0)
    )
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    assert int((moved != 0).sum()) == int((expected != 0).sum()) == selection.n
    heads = set(before) - set(selection.names)
    assert heads
    assert all(torch.equal(weights(base)[name], before[name]) for name in heads)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_update_is_undone_to_the_bit(share: float) -> None:
    base = build("bert")[0]
    model, before = gradiend(some(base, share)), weights(base)
    with rewritten(base, model, learning_rate=100.0, feature_factor=1.0):
        inside = weights(base)
    assert not all(torch.equal(inside[name], before[name]) for name in before)
    assert unchanged(base, before)


def test_update_is_undone_when_the_block_raises() -> None:
    base = build("bert")[0]
    model, before = gradiend(some(base)), weights(base)

    def fail() -> None:
        with rewritten(base, model, learning_rate=1.0, feature_factor=1.0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert unchanged(base, before)


def test_rewritten_equals_rewrite() -> None:
    base = build("bert")[0]
    model, other = gradiend(some(base)), copy.deepcopy(base)
    rewrite(other, model, learning_rate=0.5, feature_factor=1.0)
    with rewritten(base, model, learning_rate=0.5, feature_factor=1.0):
        assert unchanged(other, weights(base))


def test_tied_weights_stay_tied() -> None:
    base = build("bert")[0]
    rewrite(base, gradiend(everything(base)), learning_rate=1.0, feature_factor=1.0)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.weight", "bert.unheard_of.weight"])
def test_another_base_model_is_refused_and_left_alone(name: str) -> None:
    base = build("bert")[0]
    whole = everything(base)
    position = whole.names.index("bert.encoder.layer.1.output.dense.weight")
    names, shapes = list(whole.names), list(whole.shapes)
    names[position], shapes[position] = name, (24, 16)
    model, before = gradiend(Selection(tuple(names), tuple(shapes), whole.kept)), weights(base)
    with pytest.raises(GradiendError, match=rf"{name} \[24, 16\]: the base model has no such tensor"):
        rewrite(base, model, learning_rate=1.0, feature_factor=1.0)
    assert unchanged(base, before)
    with (
        pytest.raises(GradiendError, match="no such tensor"),
        rewritten(base, model, learning_rate=1.0, feature_factor=1.0),
    ):
        pass
    assert unchanged(base, before)
