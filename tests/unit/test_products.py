"""Outer products at kept entries against whole products in double precision, for every way of computing them."""

import pytest
import torch
from torch import Tensor

from gradiend_core.gradients import products
from gradiend_core.gradients.products import Lines, OuterProduct, Scratch

SMALL, MIDDLE, LARGE, WIDE = (12, 7), (64, 64), (320, 256), (8, 1100)


def kept_entries(shape: tuple[int, int], share: float) -> Tensor:
    size = shape[0] * shape[1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[: max(1, int(share * size))].sort().values


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_products(left: Tensor, right: Tensor, kept: Tensor | None) -> Tensor:
    whole = torch.einsum("nto,nti->noi", left.double(), right.double()).flatten(1)
    return whole if kept is None else whole[:, kept]


def watch(monkeypatch: pytest.MonkeyPatch, ways: list[str]) -> list[str]:
    """The ways of `OuterProduct` that are taken from now on."""
    taken: list[str] = []
    for way in ways:
        original = getattr(OuterProduct, way)

        def spied(self: OuterProduct, *args: object, way: str = way, original: object = original) -> None:
            taken.append(way)
            original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(OuterProduct, way, spied)
    return taken


WAYS = ["_put_lines", "_put_factors", "_put_sampled", "_put_gathered"]


@pytest.mark.parametrize(
    ("shape", "share", "positions", "way"),
    [
        (SMALL, None, 1, None),
        (SMALL, None, 5, None),
        (LARGE, None, 5, None),
        (SMALL, 0.01, 5, None),  # one entry: of its row and its column, that is all
        (SMALL, 0.1, 2, "_put_factors"),
        (SMALL, 0.3, 2, "_put_gathered"),
        (SMALL, 0.1, 5, "_put_gathered"),
        (MIDDLE, 0.1, 5, "_put_sampled"),
        (MIDDLE, 0.2, 5, "_put_gathered"),
        (LARGE, 0.01, 1, "_put_factors"),
        (LARGE, 0.01, 2, "_put_factors"),
        (LARGE, 0.01, 3, "_put_sampled"),
        (LARGE, 0.01, 8, "_put_sampled"),
        (LARGE, 0.09, 2, "_put_factors"),
        (LARGE, 0.14, 2, "_put_factors"),
        (LARGE, 0.16, 2, "_put_gathered"),
        (LARGE, 0.14, 5, "_put_sampled"),
        (WIDE, 0.1, 30, "_put_sampled"),  # more positions than are transposed at a time
        (LARGE, 0.29, 1, "_put_factors"),
        (LARGE, 0.3, 1, "_put_gathered"),
        (LARGE, 0.3, 5, "_put_gathered"),
    ],
)
def test_every_way_gives_the_kept_entries(
    shape: tuple[int, int], share: float | None, positions: int, way: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watch(monkeypatch, WAYS)
    for chunk in (products._CHUNK, products._SAMPLED_CHUNK, products._FACTORS_CHUNK):
        monkeypatch.setitem(chunk, "cpu", 2000)  # several chunks and blocks, of which the last is smaller
    left, right = normal(7, positions, shape[0], seed=1), normal(7, positions, shape[1], seed=2)
    kept = None if share is None else kept_entries(shape, share)
    exact = exact_products(left, right, kept)
    wide = normal(7, exact.shape[1] + 5, seed=3)
    before = wide.clone()
    product = OuterProduct(shape, kept, Scratch())
    product.put(wide[:, 3:-2], left * torch.nan, right, first=True)
    product.put(wide[:, 3:-2], left, right, first=True)  # whatever was there, even what is not a number
    torch.testing.assert_close(wide[:, 3:-2].double(), exact, rtol=1e-5, atol=1e-5)
    product.put(wide[:, 3:-2], left, right, first=False)  # it adds, and again from the same object
    torch.testing.assert_close(wide[:, 3:-2].double(), 2 * exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, -2:], before[:, -2:])
    assert taken == ([] if way is None else [way] * 3)


@pytest.mark.parametrize("first", [True, False])
def test_examples_with_fewer_positions_have_zeros_there(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch, WAYS)
    monkeypatch.setitem(products._FACTORS_CHUNK, "cpu", 2000)
    left, right = normal(7, 2, LARGE[0], seed=1), normal(7, 2, LARGE[1], seed=2)
    left[[0, 3, 6], 1] = 0.0
    left[5, 1], left[5, 1, 8] = 0.0, -1.0
    kept = kept_entries(LARGE, 0.1)
    out = torch.full((7, len(kept)), torch.nan if first else 1.0)
    OuterProduct(LARGE, kept, Scratch()).put(out, left, right, first=first)
    exact = exact_products(left, right, kept) + (0.0 if first else 1.0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert taken == ["_put_factors"]


@pytest.mark.parametrize("positions", [1, 2, 5])
def test_rows_and_columns_without_kept_entries_take_no_part(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = torch.tensor([3, 8, 300]), torch.tensor([0, 9])
    kept = (rows[:, None] * LARGE[1] + columns).flatten()[[0, 1, 3, 4]]
    seen: list[tuple[int, int]] = []
    for way in WAYS:

        def spied(self: OuterProduct, *args: Tensor, original: object = getattr(OuterProduct, way)) -> None:
            seen.append((args[1].shape[2], args[2].shape[2]))
            original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(OuterProduct, way, spied)
    left, right = normal(7, positions, LARGE[0], seed=1), normal(7, positions, LARGE[1], seed=2)
    out = torch.empty(7, len(kept))
    OuterProduct(LARGE, kept, Scratch()).put(out, left, right, first=True)
    torch.testing.assert_close(out.double(), exact_products(left, right, kept), rtol=1e-5, atol=1e-5)
    assert seen == [(3, 2)]


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_left_side_of_few_entries_touches_their_rows_only(
    share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watch(monkeypatch, WAYS)
    left, right = torch.zeros(7, 2, LARGE[0]), normal(7, 2, LARGE[1], seed=2)
    left[:, 0, 5], left[:, 0, 8], left[3, 1, 5] = -1.0, 1.0, -2.0  # two rows, one of them at both positions
    kept = None if share is None else kept_entries(LARGE, share)
    out = torch.full((7, LARGE[0] * LARGE[1] if kept is None else len(kept)), torch.nan)
    product = OuterProduct(LARGE, kept, Scratch())
    for times in (1, 2):
        product.put(out, left, right, first=times == 1)
        exact = times * exact_products(left, right, kept)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert taken == ["_put_lines"] * 2


@pytest.mark.parametrize("share", [None, 0.3])
def test_lines_leave_out_what_has_no_row(share: float | None) -> None:
    kept = None if share is None else kept_entries(SMALL, share)
    example, row = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 3, -1, 11])
    gradient = normal(4, SMALL[1], seed=0)
    out = torch.zeros(2, SMALL[0] * SMALL[1] if kept is None else len(kept))
    Lines(SMALL, kept).add(out, example, row, gradient)
    whole = torch.zeros(2, *SMALL)
    whole[0, 3], whole[1, 11] = gradient[0] + gradient[1], gradient[3]
    exact = whole.flatten(1) if kept is None else whole.flatten(1)[:, kept]
    torch.testing.assert_close(out, exact)


def test_half_precision_inputs_are_accumulated_in_single() -> None:
    left, right = (normal(2, 64, 4, seed=seed).bfloat16() for seed in (0, 1))
    out = torch.zeros(2, 16)
    OuterProduct((4, 4), None, Scratch()).put(out, left, right, first=False)
    torch.testing.assert_close(out.double(), exact_products(left, right, None), rtol=1e-5, atol=1e-5)


def test_scratch_gives_the_same_memory_again() -> None:
    scratch, like = Scratch(), torch.zeros(1)
    first = scratch("a", like, 3, 4)
    assert scratch("a", like, 2, 5).data_ptr() == first.data_ptr()
    assert scratch("b", like, 3, 4).data_ptr() != first.data_ptr()
    assert scratch("a", like, 100).shape == (100,)
    assert scratch("a", like.double(), 3).dtype == torch.float64
