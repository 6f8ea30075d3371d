"""Which entries take part, their order, and the importance that chooses them."""

import pytest
import torch
from transformers import PreTrainedModel

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k, top_k_count
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


def test_pattern_without_match_names_the_nearest(bert: PreTrainedModel) -> None:
    with pytest.raises(
        GradiendError, match=r"'bert.embeddings.word_embedding.weight' .* did you mean 'bert.embeddings"
    ):
        backbone_parameters(bert, ["*", "bert.embeddings.word_embedding.weight"])


def test_heads_cannot_be_selected(bert: PreTrainedModel) -> None:
    assert any(name.startswith("cls.") for name, _ in bert.named_parameters())
    with pytest.raises(GradiendError, match="matches no parameter of the backbone"):
        backbone_parameters(bert, ["cls.*"])


@pytest.mark.parametrize(
    ("topk", "n", "count"),
    [
        (1, 1000, 1),  # BUG-23: an integer is a count, so 1 is not "all"
        (1.0, 1000, 1000),
        (0.1, 1001, 101),  # rounded up
        (0.07, 100, 7),  # 0.07 · 100 is 7.000000000000001 in floating point
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


def test_locate_finds_the_entries_of_a_part_and_refuses_foreign_ones() -> None:
    whole = Selection.everything(parameters()).prune(torch.tensor([0, 3, 12, 13, 20]))
    part = whole.prune(torch.tensor([1, 4]))
    assert whole.locate(part).tolist() == [1, 4]
    with pytest.raises(GradiendError, match="not among those stored"):
        part.locate(whole)
