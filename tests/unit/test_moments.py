"""Second moments against the squares of rows that are computed one example at a time in double precision."""

import pytest
import torch

from gradiend_core.gradients.moments import second_moment
from gradiend_core.gradients.selection import backbone_parameters
from tests.unit.tiny import build, everything, exact_rows, pairs

SOURCES = ("factual", "alternative", "diff")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["bert", "albert", "deberta"])  # tied, shared layers, one example at a time
def test_second_moment_is_the_mean_of_squared_rows(kind: str, source: str) -> None:
    model, tokenizer = build(kind)
    factual, alternative = pairs(tokenizer)
    plus, minus = (exact_rows(model, everything(model), side) for side in (factual, alternative))
    exact = {"factual": plus, "alternative": minus, "diff": plus - minus}[source].square().mean(0)
    for batch_size in (2, 8):
        found = second_moment(
            model,
            backbone_parameters(model),
            factual,
            alternative,
            source=source,  # type: ignore[arg-type]
            batch_size=batch_size,
        )
        assert found.dtype == torch.float32
        assert found.shape == exact.shape
        error = torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact)
        assert error <= 5e-6
    assert not any(p.requires_grad for p in model.parameters())


def test_second_moment_of_some_parameters_only() -> None:
    model, tokenizer = build("bert")
    factual, alternative = pairs(tokenizer)
    parameters = backbone_parameters(model, ["*.query.*"])
    whole = second_moment(model, backbone_parameters(model), factual, alternative, source="diff", batch_size=8)
    part = second_moment(model, parameters, factual, alternative, source="diff", batch_size=8)
    sizes = [p.numel() for p in backbone_parameters(model).values()]
    chosen = [name in parameters for name in backbone_parameters(model)]
    expected = torch.cat([piece for piece, wanted in zip(torch.split(whole, sizes), chosen, strict=True) if wanted])
    torch.testing.assert_close(part, expected)
