"""The encoder-decoder: its function, its files, and the operations that must not change what it computes."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection
from gradiend_core.model.gradiend import ACTIVATIONS, CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from gradiend_core.tensors import save_tensors

Quantity = Literal["factual", "alternative", "diff"]
Part = Literal["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"]
PARTS: tuple[Part, ...] = ("encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum")


def make(**changes: Any) -> GradiendModel:
    """A model of 13 entries of two tensors, with random weights."""
    whole = Selection.everything({"a": torch.zeros(4, 3), "b": torch.zeros(5)})
    selection = whole.prune(torch.tensor([0, 2, 3, 4, 6, 7, 9, 11, 12, 13, 14, 15, 16]))
    settings: dict[str, Any] = {
        "target_classes": ("A", "B"),
        "source_scale": 0.5,
        "target_scale": 3.0,
        "metadata": {"seed": 1},
    }
    model = GradiendModel(selection, **settings | changes)
    model.reset_parameters(4, zero_decoder_bias=False)
    return model


def vectors(n: int = 13) -> torch.Tensor:
    return torch.randn(6, n, generator=torch.Generator().manual_seed(9))


def test_function_is_the_one_of_the_paper() -> None:
    model, source = make(), vectors()
    state = model.state_dict()
    hidden = torch.tanh(source / 0.5 @ state["encoder.weight"].T + state["encoder.bias"])
    decoded = 3.0 * (hidden @ state["decoder.weight"].T + state["decoder.bias"])
    torch.testing.assert_close(model.encode(source), hidden)
    torch.testing.assert_close(model(source), decoded)
    torch.testing.assert_close(model.decode(hidden), decoded)


def test_initial_weights_follow_the_rule_and_the_seed() -> None:
    selection = Selection.everything({"a": torch.zeros(100, 100)})
    models = [GradiendModel(selection, target_classes=("A", "B")) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.reset_parameters(seed, zero_decoder_bias=False)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    largest = float(first["encoder.weight"].max())
    assert largest <= 0.01
    assert abs(float(first["encoder.weight"].std()) * 3**0.5 - 0.01) < 2e-4
    for name in ("decoder.weight", "decoder.bias"):
        assert float(first[name].abs().max()) <= largest
        assert abs(float(first[name].std()) * 3**0.5 - largest) < 2e-4
    models[0].reset_parameters(0, zero_decoder_bias=True)
    assert not models[0].decoder.bias.any()


def test_initial_weights_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    make()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("changes", [{}, {"latent_dim": 2, "bias_decoder": False, "activation_decoder": "tanh"}])
def test_saving_and_loading_keeps_every_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make(**changes)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    loaded = GradiendModel.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "three")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("one", "two", "three")}
        assert len(contents) == 1, name
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded(vectors()), model(vectors()))
    assert loaded._arguments() == model._arguments()
    assert torch.equal(loaded.selection.base_global_indices(), model.selection.base_global_indices())


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(GradiendError, match=r"config\.json: cannot be read"):
        GradiendModel.from_pretrained(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config, weights = tmp_path / CONFIG_FILE, tmp_path / WEIGHTS_FILE
    good_config, good_weights = config.read_text(), weights.read_bytes()
    for text in ("{", "[]", "{}", good_config.replace('"format_version": 1', '"format_version": 2')):
        config.write_text(text)
        with pytest.raises(GradiendError, match=r"config\.json: damaged"):
            GradiendModel.from_pretrained(tmp_path)
    config.write_text(good_config)
    weights.write_bytes(good_weights[:-20])
    with pytest.raises(GradiendError, match=r"model\.safetensors: damaged"):
        GradiendModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(GradiendError, match=r"model\.safetensors: no such file"):
        GradiendModel.from_pretrained(tmp_path)


def test_wrong_format_version_is_said(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(GradiendError, match="format version 99, not 1"):
        GradiendModel.from_pretrained(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    save_tensors(tmp_path / WEIGHTS_FILE, {"encoder.weight": torch.zeros(1, 3)}, {})
    with pytest.raises(GradiendError, match=r"does not fit model\.safetensors"):
        GradiendModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("decoder", sorted(ACTIVATIONS))
def test_flip_negates_encodings_and_keeps_reconstructions(activation: str, decoder: str) -> None:
    model = make(activation_encoder=activation, activation_decoder=decoder)
    encoded, decoded, bias = model.encode(vectors()), model(vectors()), model.decoder.bias.clone()
    model.flip()
    assert torch.equal(model.encode(vectors()), -encoded)
    torch.testing.assert_close(model(vectors()), decoded, rtol=0, atol=1e-6)
    assert torch.equal(model.decoder.bias, bias)  # BUG-03
    assert bias.abs().max() > 0.01


def test_importance_formulas() -> None:
    model = make(latent_dim=2)
    with torch.no_grad():
        model.decoder.weight[0] = torch.tensor([0.3, -0.3])
        model.decoder.bias[0] = -0.25
        model.encoder.weight[:, 0] = torch.tensor([0.1, -0.2])
    assert [round(float(model.importance(part)[0]), 6) for part in PARTS] == [0.3, 0.6, 0.25, 0.25]
    without = make(bias_decoder=False)
    assert not without.importance("decoder-bias").any()
    assert torch.equal(without.importance("decoder-sum"), without.importance("decoder-weight"))


@pytest.mark.parametrize("part", PARTS)
def test_pruning_equals_dropping_entries(part: Part) -> None:
    model, source = make(), vectors()
    pruned = model.prune(5, part)
    kept = model.importance(part).topk(5).indices.sort().values
    assert torch.equal(pruned.selection.base_global_indices(), model.selection.base_global_indices()[kept])
    with torch.no_grad():
        dropped = torch.ones(13, dtype=torch.bool).index_fill(0, kept, False)
        model.encoder.weight[:, dropped] = 0
    torch.testing.assert_close(pruned.encode(source[:, kept]), model.encode(source))
    torch.testing.assert_close(pruned(source[:, kept]), model(source)[:, kept])
    assert pruned._arguments() == model._arguments()


def test_pruning_to_a_count_or_a_fraction() -> None:
    assert make().prune(1).selection.n == 1
    assert make().prune(1.0).selection.n == 13
    assert make().prune(0.1).selection.n == 2


@pytest.mark.parametrize("target", ["diff", "factual", "alternative"])
@pytest.mark.parametrize("source", ["factual", "alternative", "diff"])
@pytest.mark.parametrize("strengthened", ["A", "B"])
def test_strengthening_factor_moves_weights_towards_the_class(
    source: Quantity, target: Quantity, strengthened: str
) -> None:
    # Two logits (A, B) are the weights themselves; a decoder that knows its target decodes the class-mean gradient.
    gradient = {"A": torch.tensor([-0.5, 0.5]), "B": torch.tensor([0.5, -0.5])}
    other = {"A": "B", "B": "A"}

    def row(factual: str, quantity: Quantity) -> torch.Tensor:
        known = {"factual": gradient[factual], "alternative": gradient[other[factual]]}
        return known["factual"] - known["alternative"] if quantity == "diff" else known[quantity]

    model = GradiendModel(
        Selection.everything({"logits": torch.zeros(2)}), target_classes=("A", "B"), source=source, target=target
    )
    phi = model.strengthening_factor(strengthened)
    label = {"A": 1.0, "B": -1.0}  # of the factual class, as in semantics 2.5
    encoded_as = {name: -label[name] if source == "alternative" else label[name] for name in label}
    (factual,) = (name for name, sign in encoded_as.items() if sign == phi)
    moved = row(factual, target)  # what the update θ + η · decode(φ) adds
    assert float(moved[0] - moved[1]) * label[strengthened] > 0


def test_unknown_class_is_refused() -> None:
    with pytest.raises(GradiendError, match="'C': this model knows A or B"):
        make().strengthening_factor("C")
