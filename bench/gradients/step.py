"""One training step beside torch's fused AdamW on as many parameters (part `step`)."""

from collections.abc import Iterator

import torch
from torch.nn import Parameter

from bench.gradients.report import Line
from bench.gradients.timing import interleave, ratio, scaled
from gradiend_core.config.train import Train
from gradiend_core.gradients.selection import Selection
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.training.adam import FusedAdam
from gradiend_core.training.compiled import CompiledStep
from gradiend_core.training.optimizer import build_optimizer
from gradiend_core.training.step import training_step

ENTRIES = (10_000, 100_000, 1_000_000, 10_000_000)
LIMIT_FROM = 100_000  # below, calls cost more than memory traffic
STEP, COMPILED, ADAMW = "step", "compiled step", "fused AdamW"
LIMITS = {STEP: 3.0, COMPILED: 2.2}


def run() -> Iterator[list[Line]]:
    """One thread; a step of one row of n entries, whose model has 3n + 1 parameters."""
    torch.set_num_threads(1)
    for n in ENTRIES:
        yield measure(n, rounds=max(15, min(200, 20_000_000 // n)))


def measure(n: int, rounds: int) -> list[Line]:
    """The ratios, with their limits, and the times."""
    params = Train.model_validate({})
    source, target = (torch.randn(1, n, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    model, optimizer = _made(n, params)
    compiled = CompiledStep(*_made(n, params), params)
    parameters = [Parameter(torch.zeros(parameter.shape)) for parameter in model.parameters()]
    adamw = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    seconds = interleave(
        {
            STEP: lambda: training_step(model, optimizer, source, target, params.scaling),
            COMPILED: lambda: compiled(source, target),
            ADAMW: adamw.step,
        },
        rounds,
    )
    where = f"n = {n:,}"
    limits = LIMITS if n >= LIMIT_FROM else dict.fromkeys(LIMITS)
    ratios = [
        Line(f"{where}: {name} / {ADAMW}", "x", ratio(seconds[name], seconds[ADAMW]), limit)
        for name, limit in limits.items()
    ]
    return ratios + [Line(f"{where}: {name}", "ms", scaled(times, 1000)) for name, times in seconds.items()]


def _made(n: int, params: Train) -> tuple[GradiendModel, FusedAdam]:
    model = GradiendModel(Selection.everything({"w": torch.empty(n)}), target_classes=("A", "B"))
    model.reset_parameters(0, zero_decoder_bias=True)
    return model, build_optimizer(model, params)
