"""Word probabilities and language-modelling scores against loops over single sentences."""

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.errors import GradiendError
from gradiend_core.evaluation.scoring import ClassScorer, LanguageModelScorer
from tests.unit.tiny import MAX_LENGTH, TEXTS, build, wordpiece

TEMPLATES = [
    "then [MASK] said that the doctor was late.",
    "[MASK] said that [MASK] was tired.",
    "today the king saw [MASK]",
    "([MASK]) slept, and [MASK] and [MASK] went home.",
]
WORDS = {"M": ["he", "himself"], "F": ["she"]}


def scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    words: Mapping[str, Sequence[str]] = WORDS,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 3,
) -> dict[str, list[float]]:
    scorer = ClassScorer.prepare(tokenizer, templates, words, max_length=MAX_LENGTH)
    return {name: list(found) for name, found in scorer.probabilities(model, batch_size).items()}


def brute_force(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, template: str, tokens: Mapping[str, int] | list[str]
) -> float:
    """The probability of a word given as its tokens, by writing masks into the text; WordPiece only."""
    masks = " ".join([tokenizer.mask_token] * len(tokens))
    ids = torch.tensor([tokenizer(template.replace("[MASK]", masks))["input_ids"]])
    labels = torch.tensor(tokenizer.convert_tokens_to_ids(list(tokens)))
    positions = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0].view(-1, len(labels))
    with torch.no_grad():
        found = model(input_ids=ids).logits[0].double().softmax(-1)
    return float(np.mean([float(found[slot, labels].prod()) for slot in positions]))


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_probabilities_equal_a_loop(kind: str) -> None:
    model, tokenizer = build(kind)
    found = scores(model, tokenizer)
    for row, template in enumerate(TEMPLATES):
        he = brute_force(model, tokenizer, template, ["he"])
        himself = brute_force(model, tokenizer, template, ["him", "##self"])
        she = brute_force(model, tokenizer, template, ["she"])
        assert found["M"][row] == pytest.approx(he + himself, rel=1e-5)
        assert found["F"][row] == pytest.approx(she, rel=1e-5)


def test_probabilities_do_not_depend_on_batch_or_padding() -> None:
    model, tokenizer = build("roberta")
    templates = TEMPLATES[:3]
    expected = scores(model, tokenizer, templates=templates, batch_size=100)
    for batch_size in (1, 2):
        found = scores(model, tokenizer, templates=templates, batch_size=batch_size)
        assert all(found[name] == pytest.approx(expected[name], rel=1e-5) for name in WORDS)
    for row, template in enumerate(templates):
        alone = scores(model, tokenizer, templates=[template])
        assert all(alone[name] == pytest.approx([expected[name][row]], rel=1e-5) for name in WORDS)


def test_casings_of_a_lower_casing_tokenizer_count_once() -> None:
    model, tokenizer = build("bert")
    expected = scores(model, tokenizer, {"F": ["she"]})
    assert scores(model, tokenizer, {"F": ["she", "She", "SHE"]}) == expected
    assert (
        sum(len(row) for row in ClassScorer.prepare(tokenizer, TEMPLATES, {"F": ["she"]}, max_length=24).terms["F"])
        == 4
    )


def test_casings_of_a_cased_tokenizer_are_summed_when_they_are_one_token() -> None:
    tokenizer = wordpiece(lowercase=False, extra=["She", "S", "##H", "##E", "HE"])
    model = build("bert")[0]
    model.resize_token_embeddings(len(tokenizer))
    found = scores(model, tokenizer, {"F": ["she"], "M": ["he"]})
    for row, template in enumerate(TEMPLATES):
        parts = [brute_force(model, tokenizer, template, [token]) for token in ("she", "She", "he", "HE")]
        assert found["F"][row] == pytest.approx(parts[0] + parts[1], rel=1e-5)  # SHE would be three tokens
        assert found["M"][row] == pytest.approx(parts[2] + parts[3], rel=1e-5)  # He is unknown
    assert scores(model, tokenizer, {"F": ["She", "she"], "M": ["he"]}) == found


def test_slots_of_different_token_counts_are_multiplied_apart() -> None:
    model, tokenizer = build("roberta")
    template = "[MASK] said that [MASK] saw the king."
    (start,), (middle,) = ([tokenizer.tokenize(text)] for text in ("herself", " herself"))
    assert len(start) != len(middle), (start, middle)  # else this test shows nothing
    scorer = ClassScorer.prepare(tokenizer, [template], {"F": ["herself"]}, max_length=MAX_LENGTH)
    (example,) = (scorer.inputs[at] for at, found in scorer.terms["F"][0] if len(found) == len(start) + len(middle))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, list(example.positions)]
    labels = [int(tokenizer.vocab[token]) for token in start + middle]
    logs = logits.double().log_softmax(-1)[range(len(labels)), labels]
    expected = (float(logs[: len(start)].sum().exp()) + float(logs[len(start) :].sum().exp())) / 2
    only = ClassScorer([example], {"F": [[(0, tuple(labels))]]})
    assert only.probabilities(model, 1)["F"][0] == pytest.approx(expected, rel=1e-5)


def test_casing_that_would_be_too_long_is_left_out_not_refused() -> None:
    tokenizer = wordpiece(lowercase=False, extra=["S", "##H", "##E"])
    scorer = ClassScorer.prepare(tokenizer, ["[MASK] slept"], {"F": ["she"]}, max_length=4)
    assert [len(labels) for _, labels in scorer.terms["F"][0]] == [1]


def test_same_masked_input_is_run_once() -> None:
    _, tokenizer = build("bert")
    scorer = ClassScorer.prepare(tokenizer, TEMPLATES * 2, {"M": ["he"], "F": ["she"]}, max_length=MAX_LENGTH)
    assert len(scorer.inputs) == len(TEMPLATES)


def test_word_that_the_model_does_not_know_is_refused() -> None:
    _, tokenizer = build("bert")
    with pytest.raises(GradiendError, match=r"row 0: the word 'xyz'"):
        ClassScorer.prepare(tokenizer, TEMPLATES, {"M": ["xyz"]}, max_length=MAX_LENGTH)


def lms(
    tokenizer: PreTrainedTokenizerFast, *, share: float = 0.15, seed: int = 0, max_length: int = MAX_LENGTH
) -> LanguageModelScorer:
    return LanguageModelScorer.prepare(tokenizer, TEXTS, mlm_probability=share, seed=seed, max_length=max_length)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_special_tokens_are_never_masked(kind: str) -> None:
    _, tokenizer = build(kind)
    for seed in range(20):  # BUG-18
        scorer = lms(tokenizer, share=0.9, seed=seed)
        for example, text in zip(scorer.examples, TEXTS, strict=True):
            original = tokenizer(text)["input_ids"]
            assert not {0, len(original) - 1} & set(example.positions)
            assert [original[position] for position in example.positions] == list(example.labels)
            restored = list(example.input_ids)
            for position, label in zip(example.positions, example.labels, strict=True):
                assert restored[position] == tokenizer.mask_token_id
                restored[position] = label
            assert restored == original


def test_share_of_masks_is_at_least_one_per_text() -> None:
    _, tokenizer = build("bert")
    for share in (0.001, 0.15, 0.5):
        for example in lms(tokenizer, share=share).examples:
            assert len(example.labels) == max(1, round(share * (len(example.input_ids) - 2)))


def test_masks_depend_on_the_seed_alone() -> None:
    _, tokenizer = build("bert")
    states = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    assert lms(tokenizer).examples == lms(tokenizer).examples
    assert lms(tokenizer).examples != lms(tokenizer, seed=1).examples
    assert states[:2] == (random.getstate(), str(np.random.get_state()))  # BUG-18
    assert torch.equal(states[2], torch.random.get_rng_state())


def test_long_texts_are_cut() -> None:
    _, tokenizer = build("bert")
    assert max(len(example.input_ids) for example in lms(tokenizer, max_length=6).examples) == 6


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_language_modelling_score_equals_a_loop(batch_size: int) -> None:
    model, tokenizer = build("bert")
    scorer = lms(tokenizer, share=0.6)
    correct, masked = scorer.correct(model, batch_size)
    for row, example in enumerate(scorer.examples):
        with torch.no_grad():
            best = model(input_ids=torch.tensor([example.input_ids])).logits[0].argmax(-1)
        assert correct[row] == sum(
            int(best[p]) == label for p, label in zip(example.positions, example.labels, strict=True)
        )
        assert masked[row] == len(example.positions)
    assert masked.sum() > 20


def test_model_that_knows_the_tokens_scores_one() -> None:
    model, tokenizer = build("bert")
    scorer = LanguageModelScorer.prepare(tokenizer, ["he he he"], mlm_probability=0.5, seed=0, max_length=MAX_LENGTH)
    with torch.no_grad():
        model.cls.predictions.bias[tokenizer.convert_tokens_to_ids("he")] += 1000
    correct, masked = scorer.correct(model, 1)
    assert correct.tolist() == masked.tolist() == [2.0]
    found = scores(model, tokenizer, {"M": ["he"]}, ["[MASK] slept"])
    assert math.isclose(found["M"][0], 1.0)
