"""One step: gradients in closed form, several passes, clipping, groups, schedules, and the supervised baselines."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from gradiend_core.config.section import validate
from gradiend_core.config.train import Train
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection
from gradiend_core.model.gradiend import ACTIVATIONS, GradiendModel
from gradiend_core.training.optimizer import build_optimizer, build_schedule
from gradiend_core.training.step import training_step

N = 12


def model(**arguments: Any) -> GradiendModel:
    made = GradiendModel(Selection.everything({"w": torch.zeros(N)}), target_classes=("A", "B"), **arguments)
    made.reset_parameters(0, zero_decoder_bias=False)
    return made


def gradient_rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    source, target = torch.randn(2, count, N, generator=torch.Generator().manual_seed(seed))
    return source, target


def gradients(made: GradiendModel, *arguments: Any, **options: Any) -> dict[str, Tensor]:
    """The gradients that a step leaves behind, with a rate at which the weights stay as they are."""
    training_step(made, torch.optim.SGD(made.parameters(), lr=0.0), *arguments, **options)
    return {name: value.grad for name, value in made.named_parameters() if value.grad is not None}


def parse(**settings: Any) -> Train:
    return validate(Train, settings, "train")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias_decoder", [True, False])
@pytest.mark.parametrize("scaling", ["scale_free", "reference"])
@pytest.mark.parametrize("count", [1, 5])
def test_gradients_are_those_of_autograd_in_float64(
    activation: str, bias_decoder: bool, scaling: str, count: int
) -> None:
    made = model(activation_encoder=activation, bias_decoder=bias_decoder, source_scale=0.7, target_scale=3.0)
    source, target = gradient_rows(count)
    found = gradients(made, source, target, scaling)
    exact = {name: value.detach().double().requires_grad_() for name, value in made.named_parameters()}
    h = ACTIVATIONS[activation]((source.double() / 0.7) @ exact["encoder.weight"].T + exact["encoder.bias"])
    decoded = h @ exact["decoder.weight"].T + exact.get("decoder.bias", 0.0)
    squared = (decoded - target.double() / 3.0).square()
    loss = squared.mean() if scaling == "reference" else squared.sum() / count
    torch.autograd.backward(loss)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), exact[name].grad, rtol=1e-5, atol=1e-6)
    assert training_step(made, torch.optim.SGD(made.parameters(), lr=0.0), source, target, scaling) == pytest.approx(
        float(loss.detach()), rel=1e-5
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_anomaly_detection_changes_no_gradient(activation: str, latent_dim: int) -> None:
    arguments = {"activation_encoder": "tanh", "activation_decoder": activation, "latent_dim": latent_dim}
    rows = gradient_rows(4)
    plain = gradients(model(**arguments), *rows, "scale_free")
    checked = gradients(model(**arguments), *rows, "scale_free", detect_anomaly=True)
    assert plain.keys() == checked.keys()
    for name, value in plain.items():
        torch.testing.assert_close(value, checked[name], rtol=1e-5, atol=1e-6)


def test_anomaly_detection_names_the_operation() -> None:
    rows = gradient_rows(2)
    rows[0][0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="returned nan values"), pytest.warns(UserWarning, match="Error detected in"):
        gradients(model(), *rows, "scale_free", detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("activation_decoder", ["id", "tanh"])
@pytest.mark.parametrize("scaling", ["scale_free", "reference"])
def test_several_passes_make_the_step_of_one(activation_decoder: str, scaling: str) -> None:
    rows = gradient_rows(6)
    results = []
    for passes in (1, 2, 6):
        made = model(activation_decoder=activation_decoder)
        results.append(gradients(made, *rows, scaling, passes=passes))
        loss = training_step(made, torch.optim.SGD(made.parameters(), lr=0.0), *rows, scaling, passes=passes)
        results[-1]["loss"] = torch.tensor(loss)
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def test_gradients_are_scaled_down_to_the_largest_norm() -> None:
    rows = gradient_rows(3)
    plain = gradients(model(), *rows, "scale_free")
    norm = torch.cat([value.flatten() for value in plain.values()]).norm()
    for limit in (float(norm) / 10, float(norm) * 10):
        clipped = gradients(model(), *rows, "scale_free", max_grad_norm=limit)
        for name, value in clipped.items():
            torch.testing.assert_close(value, plain[name] * min(1.0, limit / float(norm)), rtol=1e-4, atol=1e-7)


# --- supervised baselines


def test_supervised_encoder_learns_labels_and_leaves_the_decoder() -> None:
    made, (source, target), labels = model(source_scale=2.0), gradient_rows(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = gradients(made, source, target, "scale_free", objective="encoder", labels=labels)
    assert found.keys() == {"encoder.weight", "encoder.bias"}
    made.zero_grad()
    torch.autograd.backward((made.encode(source)[:, 0] - labels).square().mean())
    assert made.encoder.weight.grad is not None
    torch.testing.assert_close(found["encoder.weight"], made.encoder.weight.grad)


@pytest.mark.parametrize(("scaling", "reduced"), [("scale_free", 1 / 4), ("reference", 1 / (4 * N))])
def test_supervised_decoder_learns_gradients_of_labels_and_leaves_the_encoder(scaling: str, reduced: float) -> None:
    made, (source, target), labels = model(target_scale=2.0), gradient_rows(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = gradients(made, source, target, scaling, objective="decoder", labels=labels)
    assert found.keys() == {"decoder.weight", "decoder.bias"}
    made.zero_grad()
    torch.autograd.backward(((made.decode(labels[:, None]) - target) / 2).square().sum() * reduced)
    assert made.decoder.bias.grad is not None
    torch.testing.assert_close(found["decoder.bias"], made.decoder.bias.grad)


# --- optimiser and schedule


def test_groups_override_settings_of_the_parameters_they_match() -> None:
    groups = [
        {"pattern": r"\.bias$", "weight_decay": 0.0, "adam_beta1": 0.5, "adam_epsilon": 1e-3},
        {"pattern": "decoder", "learning_rate": 0.5, "adam_beta2": 0.5},
    ]
    made = model()
    params = parse(optimizer_groups=groups, weight_decay=0.25, learning_rate=0.1)
    names = {id(value): name for name, value in made.named_parameters()}
    found = {
        names[id(value)]: {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
        for group in build_optimizer(made, params).param_groups
        for value in group["params"]
    }
    unit = 1 / N**0.5
    bias = {"weight_decay": 0.0, "betas": (0.5, 0.999), "eps": 1e-3}
    assert found == {
        "encoder.weight": {"lr": 0.1 * unit, "weight_decay": 0.25, "betas": (0.9, 0.999), "eps": 1e-8},
        "encoder.bias": {"lr": 0.1 * unit} | bias,
        "decoder.weight": {"lr": 0.5, "weight_decay": 0.25, "betas": (0.9, 0.5), "eps": 1e-8},
        "decoder.bias": {"lr": 0.1} | bias,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer_groups": [{"pattern": "encoder.wieght"}]}, "did you mean 'encoder.weight'?"),
        (
            {"optimizer_groups": [{"pattern": "x"}]},
            "found in no trained parameter; allowed: encoder.weight, encoder.bias",
        ),
        ({"optimizer_groups": [{"pattern": "("}]}, "optimizer_groups[0].pattern: not a regular expression"),
        (
            {"optimizer_groups": [{"patern": "bias"}]},
            "optimizer_groups[0].patern: unknown key; did you mean 'pattern'?",
        ),
        ({"optimizer_groups": [{"pattern": "er"}, {"pattern": "bias"}]}, "belong to an earlier group"),
        ({"optimizer_groups": [{"pattern": "decoder.bias"}], "bias_decoder": False}, "found in no trained parameter"),
        ({"optimizer_groups": [{"pattern": "decoder"}], "supervised_encoder": True}, "found in no trained parameter"),
        ({"gradiend_batch_size": 4, "batch_size": 2}, "gradiend_batch_size 4 exceeds batch_size 2"),
        ({"gradiend_batch_size": 2, "gradient_accumulation_steps": 3, "batch_size": 8}, "2 * 3 = 6"),
        ({"gradient_accumulation_steps": 0}, "greater than or equal to 1"),
        ({"gradiend_batch_size": 0}, "greater than or equal to 1"),
        ({"max_grad_norm": 0.0}, "greater than 0"),
        ({"max_steps": -1}, "nothing to train"),
        ({"max_steps": 0}, "must be -1, or greater than or equal to 1, not 0"),
        ({"num_train_epochs": -1.0}, "nothing to train"),
        ({"warmup_steps": -1}, "greater than or equal to 0"),
        ({"warmup_steps": 10}, "take constant_with_warmup"),
        ({"warmup_steps": 10, "warmup_ratio": 0.1, "lr_scheduler_type": "linear"}, "give one of them"),
        ({"warmup_steps": 10, "max_steps": 5, "lr_scheduler_type": "linear"}, "exceeds max_steps 5"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "take a higher learning_rate"),
        ({"supervised_encoder": True, "supervised_decoder": True}, "give one of them"),
        ({"supervised_decoder": True}, "set metric_for_best_model to loss or r2"),
        ({"supervised_encoder": True, "metric_for_best_model": "r2"}, "set metric_for_best_model to correlation"),
        ({"supervised_encoder": True, "latent_dim": 2}, "latent_dim must be 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GradiendError, match=re.escape(message)):
        parse(**settings)


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 4}, {"warmup_ratio": 0.31}])
def test_schedule_is_the_one_of_transformers_in_every_group(name: str, warmup: dict[str, Any]) -> None:
    params = parse(lr_scheduler_type=name, max_steps=10, **warmup)
    optimizer = build_optimizer(model(), params)
    schedule = build_schedule(optimizer, params, 10)
    plain = torch.optim.SGD([torch.zeros(1)], lr=float(params.learning_rate))
    expected = get_scheduler(name, plain, num_warmup_steps=4, num_training_steps=10)
    seen = []
    for _ in range(10):
        encoder, decoder = (group["lr"] for group in optimizer.param_groups)
        assert decoder == pytest.approx(plain.param_groups[0]["lr"])
        assert encoder == pytest.approx(decoder * N**-0.5)
        seen.append(decoder)
        for stepped in (optimizer, schedule, plain, expected):
            stepped.step()
    assert seen[0] == 0
    assert max(seen) == pytest.approx(params.learning_rate, rel=1e-3)


def test_betas_reach_the_optimizer() -> None:
    groups = build_optimizer(model(), parse(adam_beta1=0.8, adam_beta2=0.95)).param_groups
    assert [group["betas"] for group in groups] == [(0.8, 0.95)] * 2
