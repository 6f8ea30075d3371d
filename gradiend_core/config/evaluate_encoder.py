"""Parameters of the evaluate_encoder stage."""

from pydantic import Field

from gradiend_core.config.section import Section, Seed


class EvaluateEncoder(Section):
    """How encodings are scored."""

    bootstrap_samples: int = Field(1000, ge=1, description="resamples behind every confidence interval")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    seed: Seed = Field(0, description="seed of the bootstrap")
