"""Parameters of the select_seed stage."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gradiend_core.config.pre_prune import TopK
from gradiend_core.config.section import Section


class SelectSeed(Section):
    """When a seed counts as converged, and how many are needed."""

    convergent_metric: Literal["correlation", "loss"] = Field(
        "correlation",
        description="what tells convergence at the best step: the validation correlation and the classes' mean"
        " encodings, or the validation loss alone (for train.supervised_decoder, which trains no encoder)",
    )
    convergent_score_threshold: float | None = Field(
        None,
        ge=0,
        description="smallest correlation of a converged seed, or its largest loss; null: 0.5 for correlation, while"
        " loss has no default",
    )
    convergent_mean_by_class_threshold: float = Field(
        0.5, ge=0, description="smallest |mean encoding| of each target class at the best step"
    )
    max_seeds: int | None = Field(
        None, ge=1, description="take at most so many seeds, the first of the list; null takes it whole"
    )
    min_convergent_seeds: int | None = Field(
        1, ge=1, description="take the seeds in order until so many have converged; null considers all"
    )
    fail_on_non_convergence: bool = Field(
        False, description="stop with an error when fewer than min_convergent_seeds (null: none at all) have converged"
    )
    seed_stability_topk: TopK | None = Field(
        1000,
        description="compare the entries of greatest importance, so many or such a fraction, between the converged"
        " seeds; null does not",
    )
    seed_stability_part: Literal["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"] = Field(
        "decoder-weight", description="weights whose absolute value is the importance in that comparison"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        threshold = self.convergent_score_threshold
        if self.convergent_metric == "loss" and threshold is None:
            raise ValueError("convergent_metric loss needs a convergent_score_threshold, the largest loss allowed")
        if self.convergent_metric == "correlation" and threshold is not None and threshold > 1:
            raise ValueError(f"convergent_score_threshold must be at most 1 for a correlation, not {threshold:g}")
        if self.max_seeds is not None and self.max_seeds < (self.min_convergent_seeds or 0):
            raise ValueError(
                f"min_convergent_seeds {self.min_convergent_seeds} can never be reached with max_seeds {self.max_seeds}"
            )
        return self

    @property
    def score_threshold(self) -> float:
        """The threshold of the metric, with its default."""
        return 0.5 if self.convergent_score_threshold is None else self.convergent_score_threshold
