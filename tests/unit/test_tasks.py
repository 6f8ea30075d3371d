"""Which rows a store holds."""

import logging

import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from gradiend_core.gradients.tasks import usable_neutral
from tests.unit.tiny import wordpiece


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return wordpiece()


def test_neutral_rows_that_the_model_cannot_take_are_left_out_and_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    known, unknown, long = "the king [MASK]", "the [MASK] slept", "the king slept " * 20 + "[MASK]"
    neutral = pd.DataFrame({"masked": [known, unknown, long], "factual": ["slept", "☃", "slept"]})
    with caplog.at_level(logging.INFO):
        kept = usable_neutral(neutral, tokenizer, max_length=24)
    assert list(kept["masked"]) == [known]
    assert "2 of 3 neutral rows are left out" in caplog.text
