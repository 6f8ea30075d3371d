"""One optimiser step on gradient rows (semantics, section 6; departure: BUG-05)."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from gradiend_core.config.train import Objective
from gradiend_core.model.gradiend import ACTIVATIONS, GradiendModel


def training_step(
    model: GradiendModel,
    optimizer: torch.optim.Optimizer,
    source: Tensor,
    target: Tensor,
    scaling: str,
    *,
    objective: Objective = "reconstruction",
    labels: Tensor | None = None,
    passes: int = 1,
    max_grad_norm: float | None = None,
    detect_anomaly: bool = False,
) -> float:
    """Step on gradient rows [B, n] in true units; returns the loss before it, the mean of `losses` over the rows.

    Args:
        labels: of the rows [B], for supervised objectives.
        passes: the rows go through the model in so many equal parts.
        max_grad_norm: the gradients of all parameters together are scaled down to this norm.
        detect_anomaly: let autograd compute them, with anomaly detection.
    """
    linear = model.encoder.out_features == 1 and model.activation_decoder == "id"
    closed = linear and objective == "reconstruction" and not detect_anomaly
    if not closed:
        optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=source.device)
    for rows in torch.arange(len(source)).chunk(passes):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        if closed:
            total += _gradients(model, source[part], target[part], scaling, 1 / passes, add=part.start > 0)
            continue
        with torch.autograd.set_detect_anomaly(True) if detect_anomaly else nullcontext():
            found = losses(
                model, source[part], target[part], scaling, objective, None if labels is None else labels[part]
            )
            loss = found.mean() / passes
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return float(total)


def losses(
    model: GradiendModel, source: Tensor, target: Tensor, scaling: str, objective: Objective, labels: Tensor | None
) -> Tensor:
    """The loss [B] of each row [n].

    Under scale_free the squared error of normalised gradients is summed over entries, so that it does not shrink with
    n and Adam's epsilon never matters; under reference it is their mean. A supervised encoder has the squared error of
    its encodings as labels, a supervised decoder that of the gradients it decodes from the labels.
    """
    if objective == "reconstruction":
        found = model(source)
    elif labels is None:
        raise ValueError(f"a supervised {objective} needs labels")
    elif objective == "encoder":
        return (model.encode(source)[:, 0] - labels).square()
    else:
        found = model.decode(labels[:, None])
    squared: Tensor = ((found - target) / model.target_scale).square()
    return squared.mean(1) if scaling == "reference" else squared.sum(1)


@torch.no_grad()
def _gradients(
    model: GradiendModel, source: Tensor, target: Tensor, scaling: str, share: float, *, add: bool
) -> Tensor:
    """Make or add to the parameters' gradients `share` of those of the mean loss; returns as much of the loss.

    This is what autograd does, in closed form for one latent and a linear decoder, which touches memory less often.
    With z = W_e·s/c_s + b_e, h = f(z), e = W_d h + b_d - y/c_y and δ = ∂L/∂e ∝ 2e, sums being over rows: ∂W_d = Σ h δ,
    ∂b_d = Σ δ, ∂z = (W_d·δ) f'(z), ∂W_e = Σ ∂z s/c_s, ∂b_e = Σ ∂z.
    """
    factor = share / target.numel() if scaling == "reference" else share / len(target)
    z = source @ model.encoder.weight[0] / model.source_scale + model.encoder.bias
    with torch.enable_grad():
        h = ACTIVATIONS[model.activation_encoder](z.requires_grad_())
    encodings, decoder, bias = h.detach(), model.decoder.weight[:, 0], model.decoder.bias
    # Memory is kept from step to step: asking for it anew costs more than the arithmetic. δ of one row is ∂b_d itself.
    alone = bias is not None and len(source) == 1 and not add
    error = _gradient(bias)[None] if alone else torch.empty_like(target)
    torch.addr(torch.zeros_like(decoder[:1]) if bias is None else bias, encodings, decoder, out=error)
    error.sub_(target, alpha=1 / model.target_scale)
    loss = torch.dot(error.view(-1), error.view(-1)) * factor
    delta = error.mul_(2 * factor)
    with torch.enable_grad():
        weighted = h @ (delta @ decoder)  # a scalar: to weigh by `grad_outputs`, autograd imports sympy first
    (z_gradient,) = torch.autograd.grad(weighted, z)
    _combine(model.encoder.weight, z_gradient / model.source_scale, source, add)
    _combine(model.encoder.bias, z_gradient, torch.ones_like(z)[:, None], add)
    _combine(model.decoder.weight, encodings, delta, add)
    if bias is not None and not alone:
        _combine(bias, torch.ones_like(z), delta, add)
    return loss


def _combine(parameter: Parameter, weights: Tensor, rows: Tensor, add: bool) -> None:
    """Make or add to a parameter's gradient the weighted sum of rows."""
    gradient = _gradient(parameter)
    if len(rows) == 1 and not add:
        torch.mul(rows[0], weights, out=gradient)  # half the time
    else:
        torch.addmv(gradient, rows.T, weights, beta=int(add), out=gradient)


def _gradient(parameter: Parameter) -> Tensor:
    """The memory of a parameter's gradient, flat; new memory holds anything."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad.view(-1)
