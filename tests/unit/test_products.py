"""Outer products at kept entries against whole products in double precision, for every way of computing them."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from gradiend_core.gradients import products
from gradiend_core.gradients.products import OuterProduct

SMALL, LARGE = (12, 7), (320, 256)


def kept_entries(shape: tuple[int, int], share: float) -> Tensor:
    size = shape[0] * shape[1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[: max(1, int(share * size))].sort().values


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize(
    ("shape", "share", "sampled"),
    [(SMALL, None, False), (LARGE, None, False), (SMALL, 0.1, False), (LARGE, 0.01, True), (LARGE, 0.3, False)],
)
def test_every_way_gives_the_kept_entries(
    shape: tuple[int, int], share: float | None, sampled: bool, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Mock(side_effect=torch.sparse.sampled_addmm)
    monkeypatch.setattr(torch.sparse, "sampled_addmm", spy)
    for chunk in (products._CHUNK, products._SAMPLED_CHUNK):
        monkeypatch.setitem(chunk, "cpu", 2000)  # several chunks, of which the last is smaller
    random = torch.Generator().manual_seed(1)
    left = torch.randn(7, positions, shape[0], generator=random)
    right = torch.randn(7, positions, shape[1], generator=random)
    kept = None if share is None else kept_entries(shape, share)
    exact = torch.einsum("nto,nti->noi", left.double(), right.double()).flatten(1)
    exact = exact if kept is None else exact[:, kept]
    wide = torch.randn(7, exact.shape[1] + 5, generator=random)
    before = wide.clone()
    product = OuterProduct(shape, kept)
    for _ in range(2):  # it adds, and again from the same object
        product.add(wide[:, 3:-2], left, right)
    torch.testing.assert_close(wide[:, 3:-2].double(), before[:, 3:-2] + 2 * exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, -2:], before[:, -2:])
    assert spy.called is sampled


def test_half_precision_inputs_are_accumulated_in_single() -> None:
    left, right = (torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    out = torch.zeros(2, 16)
    OuterProduct((4, 4), None).add(out, left, right)
    exact = torch.einsum("nto,nti->noi", left.double(), right.double()).flatten(1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
