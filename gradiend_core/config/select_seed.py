"""Parameters of the select_seed stage."""

from pydantic import Field

from gradiend_core.config.section import Section


class SelectSeed(Section):
    """When a seed counts as converged, and how many are needed."""

    convergent_score_threshold: float = Field(
        0.5, ge=0, le=1, description="smallest validation correlation of a converged seed"
    )
    convergent_mean_by_class_threshold: float = Field(
        0.5, ge=0, description="smallest |mean encoding| of each target class at the best step"
    )
    min_convergent_seeds: int | None = Field(
        1, ge=1, description="take the seeds in order until so many have converged; null considers all"
    )
