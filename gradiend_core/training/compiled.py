"""A training step of the usual kind, compiled: few passes over memory do what takes many calls otherwise."""

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch._inductor.config
from torch import Tensor

from gradiend_core.config.train import Train
from gradiend_core.errors import GradiendError
from gradiend_core.model.gradiend import ACTIVATIONS, GradiendModel
from gradiend_core.training.adam import FusedAdam

_STATE: Final = ("exp_avg", "exp_avg_sq")


class CompiledStep:
    """`training_step` and the step of `FusedAdam` in one, for one latent, a linear decoder and one pass.

    The optimiser's state is read and written, so that either kind of step can go on after the other. Results are equal
    up to rounding.
    """

    def __init__(self, model: GradiendModel, optimizer: FusedAdam, params: Train) -> None:
        self._optimizer = optimizer
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedules warn where `step` is not called
        self._parameters = dict(model.named_parameters())
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._groups = [group_of[parameter] for parameter in self._parameters.values()]
        self._settings = (
            ACTIVATIONS[model.activation_encoder],
            [(*group["betas"], group["eps"], group["weight_decay"]) for group in self._groups],
            params.optim == "adamw",
            params.scaling == "reference",
            (model.source_scale, model.target_scale),
        )
        torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
        self._compiled = torch.compile(_step, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, source: Tensor, target: Tensor) -> float:
        """Step on gradient rows [B, n]; returns the loss before it.

        Raises:
            GradiendError: the compiler does not work here.
        """
        states = [self._optimizer.state_of(parameter) for parameter in self._parameters.values()]
        moving = []
        for group, state in zip(self._groups, states, strict=True):
            state["step"] += 1
            corrections = (1 - beta ** float(state["step"]) for beta in group["betas"])
            # A tensor, for numbers would be compiled anew when they change.
            moving.append(torch.tensor([group["lr"], *corrections], device=source.device))
        flat = [parameter.view(-1) for parameter in self._parameters.values()]
        averages = [[state[key].view(-1) for key in _STATE] for state in states]
        try:
            return float(self._compiled(flat, averages, moving, source, target, *self._settings))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().partition("\n")[0]
            raise GradiendError(
                f"torch_compile: the compiler failed ({reason}). It needs a C++ compiler on a CPU, Triton on a GPU, and"
                " a Python environment whose path has no blanks; without torch_compile the same steps run uncompiled."
            ) from None


def _step(
    parameters: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]],
    moving: Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    activation: Any,
    settings: Sequence[Sequence[float]],
    decoupled: bool,
    mean: bool,
    scales: tuple[float, float],
) -> Tensor:
    """The closed form of `training_step`, then Adam (Kingma and Ba, 2015) for every parameter, in place."""
    encoder, encoder_bias, decoder, *decoder_bias = parameters
    factor = 1 / target.numel() if mean else 1 / len(target)
    source = source / scales[0]
    z = (source * encoder).sum(1) + encoder_bias
    h, backward = torch.func.vjp(activation, z)  # type: ignore[misc]  # without `has_aux` it gives two
    error = h[:, None] * decoder - target / scales[1]
    for bias in decoder_bias:
        error = error + bias
    loss: Tensor = error.square().sum() * factor
    delta = error * (2 * factor)
    (z_gradient,) = backward((delta * decoder).sum(1))
    gradients = [(z_gradient[:, None] * source).sum(0), z_gradient.sum()[None], (h[:, None] * delta).sum(0)]
    gradients += [delta.sum(0) for _ in decoder_bias]
    for parameter, gradient, (average, square), numbers, (beta1, beta2, eps, decay) in zip(
        parameters, gradients, averages, moving, settings, strict=True
    ):
        rate, correction1, correction2 = numbers.unbind()
        if decoupled:
            parameter.mul_(1 - rate * decay)
        else:
            gradient = gradient + decay * parameter
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).add_(gradient.square() * (1 - beta2))
        parameter.sub_(rate / correction1 * average / (square.sqrt() / correction2.sqrt() + eps))
    return loss
