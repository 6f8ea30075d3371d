"""Which entries take part, their order, and the importance that chooses them."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k, top_k_count
from tests.unit.memory import needs_peak_memory, peak_memory
from tests.unit.tiny import build

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    model: PreTrainedModel = build("bert")[0]
    return model


def parameters() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}


def same(one: Selection, other: Selection) -> bool:
    kept = zip(one.kept, other.kept, strict=True)
    alike = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in kept)
    return one.names == other.names and one.shapes == other.shapes and alike


def test_everything_is_all_tensors_row_major_in_order() -> None:
    tensors = parameters()
    selection = Selection.everything(tensors)
    assert selection.n == 25
    assert selection.sizes == [12, 5, 8]
    assert torch.equal(selection.gather(tensors), torch.cat([tensors[name].flatten() for name in "abc"]))
    assert selection.base_global_indices().tolist() == list(range(25))


def test_pruning_twice_equals_indexing_the_whole_vector() -> None:
    tensors = parameters()
    whole = Selection.everything(tensors)
    first = torch.tensor([0, 3, 11, 12, 13, 14, 15, 16, 20, 24])  # all of b, some of a and c
    second = torch.tensor([1, 3, 4, 5, 6, 7, 9])
    once = whole.prune(first)
    twice = once.prune(second)
    assert once.kept[1] is None
    assert torch.equal(once.base_global_indices(), first)
    assert torch.equal(twice.base_global_indices(), first[second])
    vector = whole.gather(tensors)
    assert torch.equal(once.gather(tensors), vector[first])
    assert torch.equal(twice.gather(tensors), vector[first[second]])


def test_tensor_may_lose_every_entry() -> None:
    selection = Selection.everything(parameters()).prune(torch.tensor([0, 24]))
    assert selection.sizes == [1, 0, 1]
    assert selection.base_global_indices().tolist() == [0, 24]


def test_selection_survives_being_stored() -> None:
    for coordinates in (torch.arange(25), torch.tensor([0, 3, 12, 13, 14, 15, 16, 24])):
        selection = Selection.everything(parameters()).prune(coordinates)
        tensors, mapping = selection.to_tensors()
        tensors["alternative"] = torch.zeros(3)
        assert same(Selection.from_tensors(tensors, mapping), selection)


def test_backbone_is_everything_but_the_head_in_model_order(bert: PreTrainedModel) -> None:
    names = list(backbone_parameters(bert))
    assert names == [name for name, _ in bert.named_parameters() if name.startswith("bert.")]
    assert names[0] == "bert.embeddings.word_embeddings.weight"  # the tied matrix, once
    assert len({id(p) for p in backbone_parameters(bert).values()}) == len(names)


def test_patterns_restrict_in_model_order(bert: PreTrainedModel) -> None:
    patterns = ["*.layer.1.*.query.weight", "bert.embeddings.word_embeddings.weight"]
    assert list(backbone_parameters(bert, patterns)) == [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.1.attention.self.query.weight",
    ]


def test_dots_and_ends_of_patterns_are_literal(bert: PreTrainedModel) -> None:
    for pattern in ("query.weight", "bert*query", "bertXembeddings*"):
        with pytest.raises(GradiendError, match="matches no parameter"):
            backbone_parameters(bert, [pattern])


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("bert.embeddings.word_embedding.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert.encoder.layer.0.atention.*", "bert.encoder.layer.0.attention.*"),
        ("bert.encoder.layer.*.intermedate*", "bert.encoder.layer.*.intermediate*"),
        ("*.layer.1.*.qery.weight", "*.layer.1.*.query.weight"),
        ("bert.encodr.layer.0.attention", "bert.encoder.layer.0.attention.*"),
        ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query.*"),
        ("query.weight", "*.query.weight"),
        ("encoder.layer.1.*", "*.encoder.layer.1.*"),
        ("bert.encoder.layer.12.*", "bert.encoder.layer.1.*"),
        ("bert.embedings.word_embedding.weight", "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_near_miss_of_a_pattern_is_a_pattern_that_matches(bert: PreTrainedModel, pattern: str, meant: str) -> None:
    with pytest.raises(GradiendError) as caught:
        backbone_parameters(bert, ["*", pattern])
    [line, *_] = str(caught.value).splitlines()
    assert line == f"pre_prune.params: {pattern!r} matches no parameter of the backbone; did you mean {meant!r}?"
    assert backbone_parameters(bert, [meant])


def test_patterns_without_match_are_all_named_and_the_parameters_listed(bert: PreTrainedModel) -> None:
    with pytest.raises(GradiendError) as caught:
        backbone_parameters(bert, ["zzz", "*.query.*", "cls.*"])
    first, second, count, *listed = str(caught.value).splitlines()
    assert first == "pre_prune.params: 'zzz' matches no parameter of the backbone"
    assert second.endswith("'cls.*' matches no parameter of the backbone, only of the head, which takes no part")
    assert count == "The backbone has 37 parameters (here with * for the numbers of layers):"
    assert len(listed) == 21
    assert backbone_parameters(bert, [pattern.strip() for pattern in listed]).keys() == backbone_parameters(bert).keys()


def test_heads_cannot_be_selected(bert: PreTrainedModel) -> None:
    assert any(name.startswith("cls.") for name, _ in bert.named_parameters())
    with pytest.raises(GradiendError, match="matches no parameter of the backbone, only of the head"):
        backbone_parameters(bert, ["cls.*"])


@pytest.mark.parametrize(
    ("topk", "n", "count"),
    [
        (1, 1000, 1),  # BUG-23: an integer is a count, so 1 is not "all"
        (1.0, 1000, 1000),
        (0.1, 1001, 101),  # rounded up
        (0.07, 100, 7),  # 0.07 · 100 is 7.000000000000001 in floating point
        (0.07, 10**8, 7 * 10**6),  # and in the last digit of larger numbers
        (0.5, 3, 2),
        (1e-9, 1000, 1),
        (5000, 1000, 1000),
    ],
)
def test_top_k_count(topk: float, n: int, count: int) -> None:
    assert top_k_count(topk, n) == count


def test_top_k_is_sorted_and_keeps_the_first_of_equal_entries() -> None:
    assert top_k(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert top_k(torch.zeros(10_000), 4).tolist() == [0, 1, 2, 3]
    assert top_k(torch.tensor([0.0, 5.0]), 1).tolist() == [1]


def argsorted(importance: torch.Tensor, k: int) -> torch.Tensor:
    """The definition of top-k: sort everything, stably."""
    return torch.argsort(importance, descending=True, stable=True)[:k].sort().values


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "distinct": lambda values: values,
    "many ties": lambda values: (4 * values).floor(),
    "two values": lambda values: (values > 1).float(),
    "all equal": lambda values: torch.full_like(values, 0.3),
    "all zero": torch.zeros_like,
    "mostly zero": lambda values: torch.where(values > 2.5, values, 0.0),
    "far apart": lambda values: (40 * (values - 1)).exp2(),  # from 1e-12 to 1e30
    "denormal": lambda values: values * 1e-41,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_top_k_is_the_stable_sort(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradiend_core.gradients.selection._CHUNK", chunk)
    random = torch.Generator().manual_seed(chunk)
    for n in (1, 2, 50, 203):
        importance = KINDS[kind](torch.randn(n, generator=random).abs())
        for k in {1, 2, n // 3, n // 2, n - 1, n} - {0}:
            assert torch.equal(top_k(importance, k), argsorted(importance, min(k, n)))


@pytest.mark.parametrize("kind", ["distinct", "many ties"])
def test_top_k_of_a_threshold_is_the_top_k_of_what_reaches_it(kind: str) -> None:
    # Semantics 5: first the threshold, then the top-k among what is left, a fraction of what is left rounded up.
    importance = KINDS[kind](torch.randn(501, generator=torch.Generator().manual_seed(0)).abs())
    threshold = float(importance.sort().values[200])  # an entry equal to it stays
    left = (importance >= threshold).nonzero().flatten()
    assert 200 < len(left) < 501
    assert torch.equal(top_k(importance, None, threshold=threshold), left)
    for topk in (1, 7, 0.1, 0.501, 1000):
        expected = left[argsorted(importance[left], top_k_count(topk, len(left)))]
        assert torch.equal(top_k(importance, topk, threshold=threshold), expected)


def test_fraction_of_one_does_not_switch_the_threshold_off() -> None:
    # The reference returns everything for topk 1.0, whatever the threshold.
    assert top_k(torch.tensor([0.5, 0.1, 0.2]), 1.0, threshold=0.2).tolist() == [0, 2]


def test_threshold_that_nothing_reaches_names_the_largest() -> None:
    with pytest.raises(GradiendError, match=r"pre_prune.threshold: no entry .* of 3 or more, the largest has 2\.") as e:
        top_k(torch.tensor([1.0, 2.0]), None, threshold=3.0)
    assert "pre_prune.topk" in str(e.value)
    with pytest.raises(GradiendError, match="1e\\+300 or more"):
        top_k(torch.tensor([1.0, 2.0]), 1, threshold=1e300)


def test_null_without_threshold_keeps_everything() -> None:
    assert top_k(torch.tensor([0.0, 2.0, 0.0]), None).tolist() == [0, 1, 2]


def test_top_k_is_decided_in_float32_whatever_the_dtype() -> None:
    # In double precision the last is the largest; in float32 all are equal, and the first wins on every device.
    importance = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12], dtype=torch.float64)
    assert top_k(importance, 1).tolist() == [0]
    found = top_k(torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16, requires_grad=True), 2)
    assert (found.tolist(), found.dtype, found.device.type) == ([1, 2], torch.int64, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("place", [0, 5])
def test_importance_that_cannot_be_ordered_is_refused(value: float, place: int) -> None:
    importance = torch.ones(6)
    importance[place] = value
    for topk in (1, 6, None):
        with pytest.raises(GradiendError, match="must be a finite number that is not negative"):
            top_k(importance, topk)


@needs_peak_memory
def test_top_k_needs_no_copy_of_the_entries() -> None:
    importance = torch.rand(10**7)
    top_k(importance[:1000], 10)
    with peak_memory() as peak:
        top_k(importance, 1000)
    assert peak() < 0.5 * 4 * 10**7


def test_locate_finds_the_entries_of_a_part_and_refuses_foreign_ones() -> None:
    whole = Selection.everything(parameters()).prune(torch.tensor([0, 3, 12, 13, 20]))
    part = whole.prune(torch.tensor([1, 4]))
    assert whole.locate(part).tolist() == [1, 4]
    with pytest.raises(GradiendError, match="not among those stored"):
        part.locate(whole)
