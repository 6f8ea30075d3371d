"""The encoder-decoder: its function, its files, and the operations that must not change what it computes."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection, top_k
from gradiend_core.model.gradiend import ACTIVATIONS, CONFIG_FILE, ODD_ACTIVATIONS, WEIGHTS_FILE, GradiendModel
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


@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("activation", sorted(ODD_ACTIVATIONS))
@pytest.mark.parametrize("decoder", sorted(ACTIVATIONS))
def test_flip_negates_encodings_and_keeps_reconstructions(activation: str, decoder: str, latent_dim: int) -> None:
    model = make(activation_encoder=activation, activation_decoder=decoder, latent_dim=latent_dim)
    encoded, decoded, bias = model.encode(vectors()), model(vectors()), model.decoder.bias.clone()
    model.flip()
    assert torch.equal(model.encode(vectors()), -encoded)
    torch.testing.assert_close(model(vectors()), decoded, rtol=0, atol=1e-6)
    assert torch.equal(model.decoder.bias, bias)  # BUG-03
    assert bias.abs().max() > 0.01


def test_flip_of_some_latents_leaves_the_others() -> None:
    model = make(latent_dim=3)
    encoded, decoded = model.encode(vectors()), model(vectors())
    model.flip([0, 2])
    torch.testing.assert_close(model.encode(vectors()), encoded * torch.tensor([-1.0, 1.0, -1.0]), rtol=0, atol=0)
    torch.testing.assert_close(model(vectors()), decoded, rtol=0, atol=1e-6)
    model.flip([])
    assert torch.equal(model.encode(vectors())[:, 1], encoded[:, 1])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_flip_exists_exactly_for_odd_encoders(activation: str) -> None:
    x = torch.linspace(-3, 3, 61)
    f = ACTIVATIONS[activation]
    odd = torch.allclose(f(-x), -f(x), atol=1e-6)
    model = make(activation_encoder=activation)
    assert model.can_flip == odd
    if not odd:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(GradiendError, match=f"'{activation}' is not odd.*id, smht, tanh"):
            model.flip()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("activation", ["relu", "leakyrelu", "gelu", "silu", "elu"])
def test_no_affine_rule_turns_the_other_activations_around(activation: str) -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    f = ACTIVATIONS[activation]
    columns = torch.stack([f(x), torch.ones_like(x)], 1)
    best = columns @ torch.linalg.lstsq(columns, f(-x)[:, None]).solution
    assert float((best[:, 0] - f(-x)).abs().max()) > 0.1


def test_activations_are_the_reference_functions() -> None:
    modules = {
        "tanh": torch.nn.Tanh(),
        "relu": torch.nn.ReLU(),
        "leakyrelu": torch.nn.LeakyReLU(),
        "gelu": torch.nn.GELU(),
        "silu": torch.nn.SiLU(),
        "elu": torch.nn.ELU(),
        "sigmoid": torch.nn.Sigmoid(),
        "smht": torch.nn.Hardtanh(),
        "id": torch.nn.Identity(),
    }
    assert modules.keys() == ACTIVATIONS.keys()
    for name, module in modules.items():
        model, bare = (make(activation_encoder=encoder, activation_decoder=encoder) for encoder in (name, "id"))
        source = 10 * vectors()
        hidden = module(bare.encode(source))
        torch.testing.assert_close(model.encode(source), hidden)
        torch.testing.assert_close(model.decode(hidden), 3.0 * module(bare.decode(hidden) / 3.0))


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_encoder_id_is_the_identity(latent_dim: int) -> None:
    """BUG-11: the reference normalises each encoding on its own, to a constant, and fails for several latents."""
    model, source = make(activation_encoder="id", latent_dim=latent_dim), vectors()
    encoded = model.encode(source).detach()
    torch.testing.assert_close(encoded, (source / 0.5 @ model.encoder.weight.T + model.encoder.bias).detach())
    assert float(encoded.std(0).min()) > 0.1
    assert not torch.nn.functional.layer_norm(encoded[:, :1], (1,)).any()


@pytest.mark.parametrize("side", ["activation_encoder", "activation_decoder"])
def test_unknown_activations_are_refused_with_the_nearest_name(side: str) -> None:
    with pytest.raises(GradiendError, match=f"^{side} 'sigmod' is not known; did you mean 'sigmoid'"):
        make(**{side: "sigmod"})
    with pytest.raises(GradiendError, match="allowed: tanh, relu, leakyrelu, gelu, silu, elu, sigmoid, smht, id"):
        make(**{side: "?"})
    assert torch.equal(make(**{side: "GELU"})(vectors()), make(**{side: "gelu"})(vectors()))


def test_unknown_part_and_no_latent_are_refused() -> None:
    part: Any = "decoder_weight"
    with pytest.raises(GradiendError, match="part 'decoder_weight' is not known; did you mean 'decoder-weight'"):
        make().importance(part)
    with pytest.raises(GradiendError, match="latent_dim: must be at least 1, not 0"):
        make(latent_dim=0)


def test_an_unknown_activation_in_a_file_names_the_file(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = tmp_path / CONFIG_FILE
    config.write_text(config.read_text().replace('"tanh"', '"tahn"'))
    with pytest.raises(GradiendError, match=r"config\.json: .*'tahn' is not known; did you mean 'tanh'"):
        GradiendModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_layers_wider_than_blas_counts_are_computed_in_pieces(latent_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make(latent_dim=latent_dim, bias_decoder=bias) for bias in (True, False)]
    whole = [(model.encode(vectors()), model(vectors())) for model in models]
    for width in (1, 5, 12, 13):
        monkeypatch.setattr("gradiend_core.model.gradiend._WIDEST", width)
        for model, (encoded, decoded) in zip(models, whole, strict=True):
            torch.testing.assert_close(model.encode(vectors()), encoded)
            torch.testing.assert_close(model(vectors()), decoded)


def test_weights_are_float32_and_any_gradient_is_taken() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = make()
    finally:
        torch.set_default_dtype(default)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    for dtype in (torch.float64, torch.bfloat16):
        source = vectors().to(dtype)
        assert torch.equal(model(source), model(source.float()))


@pytest.mark.parametrize("seed", range(8))
def test_one_entry_can_be_initialised(seed: int) -> None:
    model = GradiendModel(Selection.everything({"a": torch.zeros(1)}), target_classes=("A", "B"))
    model.reset_parameters(seed, zero_decoder_bias=False)
    largest, weight, bias = (
        model.state_dict()[name].abs() for name in ("encoder.weight", "decoder.weight", "decoder.bias")
    )
    assert 0 < float(weight) <= float(largest)
    assert float(bias) <= float(largest)


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


def masked(model: GradiendModel, kept: torch.Tensor) -> GradiendModel:
    """The same model with the weights of all other entries at 0."""
    copied = model._like(model.selection)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            mask = torch.zeros(13).index_fill(0, kept, 1)
            shaped = {"encoder.weight": mask, "decoder.weight": mask[:, None], "decoder.bias": mask}
            copied.state_dict()[name].copy_(tensor * shaped.get(name, 1))
    return copied


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_a_pruned_model_equals_the_masked_full_model(part: Part, latent_dim: int, bias: bool) -> None:
    model, source = make(latent_dim=latent_dim, bias_decoder=bias, activation_decoder="tanh"), vectors()
    for topk in (1, 5, 13):
        pruned = model.prune(topk, part)
        kept = top_k(model.importance(part), topk)
        full = masked(model, kept)
        assert torch.equal(pruned.selection.base_global_indices(), model.selection.base_global_indices()[kept])
        torch.testing.assert_close(pruned.encode(source[:, kept]), full.encode(source))
        torch.testing.assert_close(pruned(source[:, kept]), full(source)[:, kept])
        dropped = torch.ones(13, dtype=torch.bool).index_fill(0, kept, False)
        assert not full(source)[:, dropped].any()
        assert pruned._arguments() == model._arguments()


@pytest.mark.parametrize("part", PARTS)
def test_mask_then_threshold_then_topk(part: Part) -> None:
    model = make(latent_dim=2)
    importance = model.importance(part)
    random = torch.Generator().manual_seed(3)
    for _ in range(20):
        mask = torch.rand(13, generator=random) < 0.7
        threshold = float(importance.quantile(float(torch.rand((), generator=random)) * 0.6))
        if not (mask & (importance >= threshold)).any():
            continue
        left = [i for i in range(13) if mask[i] and importance[i] >= threshold]
        for topk in (None, 3, 0.5, 1.0):
            limit = len(left) if topk is None else math.ceil(topk * len(left)) if isinstance(topk, float) else topk
            count = min(limit, len(left))
            best = sorted(sorted(left, key=lambda i: -float(importance[i]))[:count])
            pruned = model.prune(topk, part, threshold=threshold, mask=mask)
            expected = model.selection.base_global_indices()[torch.tensor(best)]
            assert torch.equal(pruned.selection.base_global_indices(), expected)


def test_pruning_by_nothing_keeps_everything() -> None:
    assert torch.equal(make().prune()(vectors()), make()(vectors()))


def test_threshold_that_no_entry_reaches_is_refused() -> None:
    model = make()
    largest = float(model.importance("encoder-weight").max())
    assert model.prune(part="encoder-weight", threshold=largest).selection.n == 1
    with pytest.raises(
        GradiendError, match="threshold: no entry's encoder-weight importance reaches 9, the largest is"
    ):
        model.prune(part="encoder-weight", threshold=9.0)


@pytest.mark.parametrize("mask", [torch.ones(12, dtype=torch.bool), torch.ones(13), torch.zeros(13, dtype=torch.bool)])
def test_what_is_no_mask_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(GradiendError, match=r"mask: must be a bool tensor \[13\]"):
        make().prune(mask=mask)


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
