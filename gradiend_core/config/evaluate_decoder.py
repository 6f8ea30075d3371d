"""Parameters of the evaluate_decoder stage."""

from typing import Annotated, Literal

from pydantic import Field

from gradiend_core.config.section import Section, Seed

# The 1-2-5 grid of the reference, from 100 down to 0.001.
DEFAULT_LRS = [
    *(100.0, 50.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5),
    *(0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001),
]


class EvaluateDecoder(Section):
    """Which rewritten models are tried, and how the best is chosen."""

    lrs: list[Annotated[float, Field(gt=0)]] = Field(
        DEFAULT_LRS, min_length=1, description="learning rates of the rewrite grid, in true gradient units"
    )
    feature_factors: list[float] = Field([1.0, -1.0], min_length=1, description="decoder inputs of the rewrite grid")
    lms_ratio: float = Field(
        0.99, ge=0, le=1, description="a candidate qualifies when its LMS is at least this share of the base model's"
    )
    split: Literal["train", "validation", "test"] = Field("test", description="split whose rows are scored")
    max_size_training_like: int | None = Field(
        None, ge=1, description="rows scored per factual class, drawn at random; null scores all"
    )
    max_size_neutral: int | None = Field(
        None, ge=1, description="neutral texts behind the LMS, drawn at random; null uses all"
    )
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of tokens re-predicted for the LMS")
    eval_batch_size: int = Field(64, ge=1, description="rows per forward pass; affects memory and time only")
    bootstrap_samples: int = Field(1000, ge=1, description="resamples behind every confidence interval")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    seed: Seed = Field(42, description="seed of row sampling, LMS masks and bootstrap")
