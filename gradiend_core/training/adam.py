"""Adam and AdamW by torch's fused kernels.

The classes in `torch.optim` import torch._dynamo when they are first used, which takes longer than a small training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """The arithmetic and the state of `torch.optim.AdamW(fused=True)`, or of `Adam` unless `decoupled`.

    Args:
        groups: each with `params`, on one device, and `lr`, `betas`, `eps` and `weight_decay`.
        lr: the rate that schedules start from.
        decoupled: whether weight decay acts on the weights (Loshchilov and Hutter, 2019) or is added to the gradient.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, *, decoupled: bool) -> None:
        self._kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        super().__init__(groups, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters (without the checks, and the import, of torch)."""
        self.param_groups.append(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            states = [self.state_of(parameter) for parameter in params]
            steps, averages, squares = ([s[key] for s in states] for key in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            self._kernel(
                params,
                [parameter.grad for parameter in params],
                averages,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Steps taken and the two running averages of a parameter."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state
