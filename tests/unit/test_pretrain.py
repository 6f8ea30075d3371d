"""The small masked language model: its tokenizer, that training repeats itself, and how accuracy is counted."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, PreTrainedTokenizerFast

from gradiend_core.config.base_models import MaskedLMTraining
from gradiend_core.errors import GradiendError
from gradiend_core.lm.pretrain import masked_token_accuracy, masked_word_accuracy, train_masked_lm, train_tokenizer

SUBJECTS = {"man": "he", "queen": "she", "dogs": "they"}
TEXTS = [
    f"The {noun} {verb} because {pronoun} was tired."
    for noun, pronoun in SUBJECTS.items()
    for verb in ("walked", "slept", "waited", "rested")
]
MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TRAINING: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=200)


def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "The queen slept because they was tired."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == "the queen slept because they was tired."
    assert again.convert_ids_to_tokens(again("[MASK] walked")["input_ids"])[:2] == ["[CLS]", "[MASK]"]
    specials = [again.pad_token, again.unk_token, again.cls_token, again.sep_token, again.mask_token]
    assert specials == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_vocabulary_is_bounded() -> None:
    assert len(train_tokenizer(TEXTS, vocab_size=60)) <= 60
    with pytest.raises(GradiendError, match="vocab_size: 20 is too small"):
        train_tokenizer(TEXTS, vocab_size=20)


def test_vocabulary_does_not_depend_on_hash_seeds() -> None:
    # All pairs of letters are equally frequent here, and every training has a hash seed of its own.
    texts = ["".join(letters) for letters in itertools.permutations("abcdef", 3)]
    vocabularies = [train_tokenizer(texts, vocab_size=80).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def _weights(tokenizer: PreTrainedTokenizerFast, **training: int) -> torch.Tensor:
    settings = MaskedLMTraining(**TRAINING | training)
    model = train_masked_lm(TEXTS, tokenizer, model_config=MODEL, training=settings).model
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_training_repeats_itself_and_follows_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    state = torch.get_rng_state()
    first = _weights(tokenizer)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was changed"
    torch.manual_seed(123)
    assert torch.equal(first, _weights(tokenizer)), "training depends on the global random state"
    assert not torch.equal(first, _weights(tokenizer, seed=1))


def test_training_teaches_the_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    config = MODEL | {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    accuracies = []
    for steps in (1, 300):
        settings = MaskedLMTraining(**TRAINING | {"max_steps": steps, "learning_rate": 1e-2})
        model = train_masked_lm(TEXTS, tokenizer, model_config=config, training=settings).model
        accuracies.append(masked_token_accuracy(model, tokenizer, TEXTS * 5, seed=0))
    assert accuracies[0] < 0.2
    assert accuracies[1] > 0.5


class _Always(torch.nn.Module):
    """A model that guesses the tokens of one text at every position, whatever it reads."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        super().__init__()
        self.guess = torch.tensor(tokenizer(text)["input_ids"])
        self.size = len(tokenizer)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        guess = torch.zeros_like(input_ids)
        width = min(input_ids.shape[1], len(self.guess))
        guess[:, :width] = self.guess[:width]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(guess, self.size).float())


def _always(tokenizer: PreTrainedTokenizerFast, text: str) -> BertForMaskedLM:
    return cast(BertForMaskedLM, _Always(tokenizer, text))


def test_word_accuracy_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    # Guessing "the man slept because he ..." everywhere: right for 4 x he, wrong for 4 x she, never asked for it.
    model = _always(tokenizer, "The man slept because he was tired.")
    for batch_size in (1, 5, 256):
        assert masked_word_accuracy(model, tokenizer, TEXTS, ["he", "she", "it"], batch_size) == {
            "overall": {"accuracy": 0.5, "n": 8},
            "he": {"accuracy": 1.0, "n": 4},
            "she": {"accuracy": 0.0, "n": 4},
            "it": {"accuracy": None, "n": 0},
        }


def test_word_of_several_tokens_needs_all_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = tokenizer.tokenize("wated")
    assert len(pieces) > 1
    text = "wated"
    assert masked_word_accuracy(_always(tokenizer, text), tokenizer, [text], ["wated"])["overall"]["accuracy"] == 1.0
    almost = _always(tokenizer, text)
    cast(_Always, almost).guess[len(pieces)] = tokenizer.mask_token_id
    assert masked_word_accuracy(almost, tokenizer, [text], ["wated"])["overall"]["accuracy"] == 0.0


def test_token_accuracy_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    text = TEXTS[0]
    assert masked_token_accuracy(_always(tokenizer, text), tokenizer, [text] * 50, seed=0) == 1.0
    assert masked_token_accuracy(_always(tokenizer, "[MASK]"), tokenizer, [text] * 50, seed=0) == 0.0
