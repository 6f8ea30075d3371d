"""The compiled training step against the one that is not."""

from typing import Any

import pytest
import torch

from gradiend_core.config.section import validate
from gradiend_core.config.train import Train
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.training.adam import FusedAdam
from gradiend_core.training.compiled import CompiledStep
from gradiend_core.training.optimizer import build_optimizer
from gradiend_core.training.step import training_step

N = 300


def made(params: Train) -> tuple[GradiendModel, FusedAdam]:
    model = GradiendModel(
        Selection.everything({"w": torch.empty(N)}),
        target_classes=("A", "B"),
        activation_encoder=params.activation_encoder,
        bias_decoder=params.bias_decoder,
        source_scale=0.5,
        target_scale=3.0,
    )
    model.reset_parameters(0, zero_decoder_bias=False)
    return model, build_optimizer(model, params)


@pytest.mark.skipif(" " in torch.__file__, reason="torch does not quote its own path for the compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "scaling": "reference",
            "optim": "adam",
            "weight_decay": 0.1,
            "activation_encoder": "gelu",
            "bias_decoder": False,
            "gradiend_batch_size": 3,
            "adam_epsilon": 1e-3,
            "optimizer_groups": [{"pattern": "decoder", "learning_rate": 0.05, "adam_beta1": 0.5, "adam_beta2": 0.9}],
        },
    ],
)
def test_steps_are_equal_and_go_on_after_one_another(settings: dict[str, Any]) -> None:
    params = Train.model_validate(settings)
    (plain, optimizer), (other, mixed) = made(params), made(params)
    compiled = CompiledStep(other, mixed, params)
    random = torch.Generator().manual_seed(1)
    for step in range(12):
        source, target = torch.randn(2, params.gradiend_batch_size, N, generator=random)
        rate = 0.02 / (step + 1)  # a schedule
        for group in (*optimizer.param_groups[:1], *mixed.param_groups[:1]):
            group["lr"] = rate
        expected = training_step(plain, optimizer, source, target, params.scaling)
        plain_again = step in {4, 5}
        found = training_step(other, mixed, source, target, params.scaling) if plain_again else compiled(source, target)
        assert found == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [("latent_dim", 2), ("max_grad_norm", 1.0), ("gradient_accumulation_steps", 2), ("activation_decoder", "tanh")],
)
def test_what_is_not_compiled_is_refused(key: str, value: object) -> None:
    with pytest.raises(GradiendError, match=f"torch_compile compiles the usual step: leave out {key}"):
        validate(Train, {"torch_compile": True, key: value}, "runs.a.train")
    validate(Train, {key: value}, "runs.a.train")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    params = Train.model_validate({})
    compiled = CompiledStep(*made(params), params)

    def fail(*_: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("no g++"), None)

    monkeypatch.setattr(compiled, "_compiled", fail)
    with pytest.raises(GradiendError, match=r"the compiler failed \(no g\+\+\)\. It needs a C\+\+ compiler"):
        compiled(torch.zeros(1, N), torch.zeros(1, N))
