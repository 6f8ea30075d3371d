"""Parameters of the pre_prune stage."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from gradiend_core.config.language_model import GradientPass
from gradiend_core.config.section import Seed


def _count_or_fraction(value: Any) -> int | float:
    """integer >= 1 (a count) or number > 0 and <= 1 (a fraction)"""
    if (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1):
        return value
    raise ValueError(f"Input should be an {_count_or_fraction.__doc__}")


TopK = Annotated[int | float, PlainValidator(_count_or_fraction)]


class PrePrune(GradientPass):
    """Which entries of the base model are kept before training."""

    params: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="parameter names or `*` patterns to select from; null takes the whole backbone"
    )
    topk: TopK | None = Field(
        0.1,
        description="entries kept: a count (10000) or a fraction rounded up (0.01) of those that reach the threshold;"
        " null keeps them all",
    )
    threshold: float | None = Field(None, ge=0, description="least importance of an entry that is kept; null sets none")
    n_samples: int = Field(
        8,
        ge=1,
        description="training rows looked at, the same number from each target transition, fewer where there are fewer",
    )
    source: Literal["factual", "alternative", "diff"] = Field(
        "alternative", description="gradient whose size is the importance; independent of train.source"
    )
    statistic: Literal["aligned_mean", "rms", "mean"] = Field(
        "aligned_mean",
        description="importance of an entry: half the difference of the two classes' mean gradients (the mean of label"
        " times gradient), the root mean square of the gradient, or the reference's mean, in which the classes cancel;"
        " see [pruning](pruning.md)",
    )
    seed: Seed = Field(0, description="seed of the sample; a larger n_samples contains the smaller sample")

    @model_validator(mode="after")
    def _rows_of_both_classes(self) -> Self:
        if self.statistic == "aligned_mean" and self.n_samples < 2:
            raise ValueError("statistic aligned_mean compares two classes: n_samples must be at least 2, or use rms")
        return self

    @property
    def keeps_everything(self) -> bool:
        """Whether no entry can be left out, so that no importance is needed."""
        whole = self.topk is None or (isinstance(self.topk, float) and self.topk == 1)
        return whole and self.threshold is None
