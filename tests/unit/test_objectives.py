"""Which tokens are masked and which labels they get."""

import pytest
from transformers import PreTrainedTokenizerFast

from gradiend_core.errors import GradiendError
from gradiend_core.gradients.objectives import Example, encode, encode_unchecked, fill, pad
from tests.unit.tiny import MAX_LENGTH, byte_bpe, wordpiece


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return wordpiece()


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_bpe()


def one(tokenizer: PreTrainedTokenizerFast, template: str, word: str) -> Example:
    (example,) = encode(tokenizer, [template], [word], max_length=MAX_LENGTH)
    return example


def labels(tokenizer: PreTrainedTokenizerFast, template: str, word: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(one(tokenizer, template, word).labels)))


def test_label_is_the_variant_used_in_context(bpe: PreTrainedTokenizerFast) -> None:
    bare = bpe("he", add_special_tokens=False)["input_ids"]
    assert list(one(bpe, "Then [MASK] said", "he").labels) != bare  # BUG-26: the word alone is another token
    assert labels(bpe, "Then [MASK] said", "he") == ["Ġhe"]
    assert labels(bpe, "[MASK] said", "he") == ["he"]
    assert labels(bpe, "Then ([MASK]) said", "he") == ["he"]


def test_byte_bpe_input_is_the_filled_text_with_only_the_word_masked(bpe: PreTrainedTokenizerFast) -> None:
    for template in ("Then [MASK] said that", "[MASK] said", "the doctor ([MASK]) said, [MASK]."):
        example = one(bpe, template, "she")
        restored = list(example.input_ids)
        for position, label in zip(example.positions, example.labels, strict=True):
            assert restored[position] == bpe.mask_token_id
            restored[position] = label
        assert restored == bpe(template.replace("[MASK]", "she"))["input_ids"]


@pytest.mark.parametrize(
    "template",
    ["then [MASK] said .", "[MASK] said that [MASK] was late", "( [MASK] )", "([MASK]), and [MASK].", "[MASK]"],
)
def test_one_wordpiece_equals_replacing_the_slot_by_the_mask_token(
    pieces: PreTrainedTokenizerFast, template: str
) -> None:
    example = one(pieces, template, "she")
    assert list(example.input_ids) == pieces(template)["input_ids"]
    assert all(example.input_ids[position] == pieces.mask_token_id for position in example.positions)
    assert set(example.labels) == {pieces.convert_tokens_to_ids("she")}
    assert len(example.labels) == template.count("[MASK]")


def test_word_of_several_tokens_is_masked_whole_in_every_slot(pieces: PreTrainedTokenizerFast) -> None:
    example = one(pieces, "the king saw [MASK] , and [MASK] slept", "himself")
    assert pieces.convert_ids_to_tokens(list(example.labels)) == ["him", "##self"] * 2  # BUG-10: in order, every slot
    assert example.slots == (0, 0, 1, 1)
    expanded = pieces("the king saw [MASK] [MASK] , and [MASK] [MASK] slept")["input_ids"]
    assert list(example.input_ids) == expanded


def test_slots_may_differ_in_their_number_of_tokens(bpe: PreTrainedTokenizerFast) -> None:
    words = {word for text in ("herself", " herself") for word in [tuple(bpe.tokenize(text))]}
    assert len({len(word) for word in words}) == 2, words  # else this test shows nothing
    example = one(bpe, "[MASK] saw [MASK]", "herself")
    first = len(bpe.tokenize("herself"))
    assert example.slots == (0,) * first + (1,) * (len(example.labels) - first)


def test_adjacent_slots_keep_their_tokens_apart(pieces: PreTrainedTokenizerFast) -> None:
    assert one(pieces, "the [MASK] [MASK] slept", "himself").slots == (0, 0, 1, 1)


def test_template_without_slot_is_refused(pieces: PreTrainedTokenizerFast) -> None:
    with pytest.raises(GradiendError, match=r"row 1: template 'he said' has no slot '\[MASK\]'"):
        encode(pieces, ["[MASK] said", "he said"], ["he", "he"], max_length=MAX_LENGTH)


def test_too_long_template_is_refused_with_row_and_limits(pieces: PreTrainedTokenizerFast) -> None:
    long = "[MASK]" + " slept" * 10
    assert len(one(pieces, long, "he").input_ids) == 13
    assert encode(pieces, [long], ["he"], max_length=13)
    with pytest.raises(GradiendError, match=r"row 1: .* has 13 tokens, the base model takes 12"):
        encode(pieces, ["[MASK]", long], ["he", "he"], max_length=12)


@pytest.mark.parametrize("word", ["xyz", "", "hexe"])
def test_word_without_known_token_is_refused(pieces: PreTrainedTokenizerFast, word: str) -> None:
    with pytest.raises(GradiendError, match=rf"row 1: the word {word!r} in 'then \[MASK\] slept' has no token"):
        encode(pieces, ["[MASK] slept", "then [MASK] slept"], ["he", word], max_length=MAX_LENGTH)


def test_unchecked_encoding_labels_unknown_words_as_unknown(pieces: PreTrainedTokenizerFast) -> None:
    (example,) = encode_unchecked(pieces, ["[MASK] slept"], ["xyz"])
    assert example.labels == (pieces.unk_token_id,)


def test_nothing_in_gives_nothing_out(pieces: PreTrainedTokenizerFast) -> None:
    assert encode(pieces, [], [], max_length=MAX_LENGTH) == []


def test_fill_says_where_the_word_stands() -> None:
    text, spans = fill("[MASK], and ([MASK])", "she")
    assert text == "she, and (she)"
    assert [text[start:end] for start, end in spans] == ["she", "she"]


def test_padding_is_on_the_right_and_not_attended(pieces: PreTrainedTokenizerFast) -> None:
    examples = encode(pieces, ["[MASK]", "then [MASK] said that"], ["he", "she"], max_length=MAX_LENGTH)
    ids, attention = pad(examples, 99)
    for example, row, seen in zip(examples, ids.tolist(), attention.tolist(), strict=True):
        length = len(example.input_ids)
        assert row == list(example.input_ids) + [99] * (ids.shape[1] - length)
        assert seen == [1] * length + [0] * (ids.shape[1] - length)
