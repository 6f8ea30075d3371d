"""Our use of torch's fused kernels against torch's own optimisers, bit for bit."""

import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter

from gradiend_core.training.adam import FusedAdam

SETTINGS = [
    {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.5},
]


@pytest.mark.parametrize(("decoupled", "kind"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_steps_are_those_of_torch(decoupled: bool, kind: type[torch.optim.Optimizer]) -> None:
    shapes = [(1, 50), (1,), (50, 1), (50,)]
    made = []
    for own in (True, False):
        random = torch.Generator().manual_seed(0)
        parameters = [Parameter(torch.randn(shape, generator=random)) for shape in shapes]
        groups = [{"params": parameters[part * 2 : part * 2 + 2]} | SETTINGS[part] for part in (0, 1)]
        optimizer = FusedAdam(groups, 0.1, decoupled=decoupled) if own else kind(groups, fused=True)  # type: ignore[call-arg]
        for step in range(20):
            optimizer.zero_grad()
            for number, parameter in enumerate(parameters):
                if (number, step) != (1, 3):  # once, a parameter has no gradient
                    parameter.grad = torch.randn(parameter.shape, generator=random)
            optimizer.step()
        made.append((parameters, optimizer))
    (ours, optimizer), (theirs, expected) = made
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert optimizer.state[mine].keys() == expected.state[other].keys()
        assert all(torch.equal(value, expected.state[other][key]) for key, value in optimizer.state[mine].items())


def test_training_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from gradiend_core.devices import use_deterministic_algorithms\n"
        "from gradiend_core.training.adam import FusedAdam\n"
        "use_deterministic_algorithms()\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "w = torch.nn.Parameter(torch.ones(3)); w.grad = torch.ones(3)\n"
        "group = {'params': [w], 'lr': 0.1, 'betas': (0.9, 0.999), 'eps': 1e-8, 'weight_decay': 0.0}\n"
        "FusedAdam([group], 0.1, decoupled=True).step()\n"
        "sys.exit('torch._dynamo' in sys.modules or 'torch._inductor' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
