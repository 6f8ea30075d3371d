"""The optimiser of a run: which parameters it steps how far, and how the learning rate goes with the steps."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from gradiend_core.config.train import Train
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.training.adam import FusedAdam
from gradiend_core.training.batches import Positions


def build_optimizer(model: GradiendModel, params: Train) -> FusedAdam:
    """AdamW or Adam, fused, over the trained parameters.

    Encoder and decoder are groups of their own, and so are the parts of them that `optimizer_groups` singles out.
    Under scale_free every encoder rate is divided by √n, the unit of the encoder's initial weights.
    """
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name in params.parameters:
            part, override = name.partition(".")[0], params.group_of(name)
            group = groups.setdefault((part, id(override)), {"params": []})
            group["params"].append(parameter)
            settings = {} if override is None else override.model_dump(exclude={"pattern"}, exclude_none=True)
            settings = {key: settings.get(key, getattr(params, key)) for key in _SETTINGS}
            unit = 1 / math.sqrt(model.selection.n) if params.scaling == "scale_free" and part == "encoder" else 1.0
            group["lr"] = settings["learning_rate"] * unit
            group["betas"] = (settings["adam_beta1"], settings["adam_beta2"])
            group["weight_decay"], group["eps"] = settings["weight_decay"], settings["adam_epsilon"]
    return FusedAdam(list(groups.values()), float(params.learning_rate), decoupled=params.optim == "adamw")


_SETTINGS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def build_schedule(optimizer: torch.optim.Optimizer, params: Train, total_steps: int) -> LambdaLR:
    """The schedule of transformers' `get_scheduler`: every group's rate times the same function of the step."""
    if params.lr_scheduler_type == "constant":
        return LambdaLR(optimizer, lambda _: 1.0)
    from transformers import get_scheduler  # takes longer to import than a seed to train

    warmup = warmup_steps(params, total_steps)
    schedule: LambdaLR = get_scheduler(
        params.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
    )
    return schedule


def warmup_steps(params: Train, total_steps: int) -> int:
    """Optimiser steps before the peak rate."""
    return params.warmup_steps or math.ceil(params.warmup_ratio * total_steps)


def steps_per_epoch(groups: Sequence[Positions], params: Train) -> int:
    """Optimiser steps until every row of the largest group has been used, while the groups take turns."""
    batches = len(groups) * max(math.ceil(len(rows) / params.train_batch_size) for rows in groups)
    return math.ceil(batches / (params.gradiend_batch_size * params.gradient_accumulation_steps))


def total_steps(epoch: int, params: Train) -> int:
    """Optimiser steps of the run, for epochs of `epoch` steps."""
    return params.max_steps if params.max_steps > 0 else math.ceil(params.num_train_epochs * epoch)
