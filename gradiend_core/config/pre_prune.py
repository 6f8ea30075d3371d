"""Parameters of the pre_prune stage."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from gradiend_core.config.section import Section, Seed


def _count_or_fraction(value: Any) -> int | float:
    """integer >= 1 (a count) or number > 0 and <= 1 (a fraction)"""
    if (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1):
        return value
    raise ValueError(f"Input should be an {_count_or_fraction.__doc__}")


TopK = Annotated[int | float, PlainValidator(_count_or_fraction)]


class PrePrune(Section):
    """Which entries of the base model are kept before training."""

    params: list[str] | None = Field(
        None, description="parameter names or `*` patterns to select from; null takes the whole backbone"
    )
    topk: TopK | None = Field(
        0.1, description="entries kept: a count (10000) or a fraction rounded up (0.01); null keeps all"
    )
    n_samples: int = Field(8, ge=1, description="training rows averaged, the same number from each target transition")
    source: Literal["factual", "alternative", "diff"] = Field(
        "alternative", description="gradient whose mean is the importance; independent of train.source"
    )
    statistic: Literal["aligned_mean", "mean"] = Field(
        "aligned_mean",
        description="importance of an entry: |mean of label times gradient|, or the reference's |mean of gradient|,"
        " in which the two classes cancel",
    )
    batch_size: int = Field(32, ge=1, description="rows per forward pass; affects memory and time only")
    seed: Seed = Field(0, description="seed of the sample; a larger n_samples contains the smaller sample")
