"""Parameters of the cache_gradients stage."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.language_model import GradientPass


class CacheGradients(GradientPass):
    """How the per-example gradients are computed and stored."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the store; bfloat16 halves it at about 2e-3 relative error"
    )
