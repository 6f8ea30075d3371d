"""Parameters of the cache_gradients stage."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.section import Section


class CacheGradients(Section):
    """How the per-example gradients are computed and stored."""

    batch_size: int = Field(32, ge=1, description="rows per forward pass; affects memory and time only")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the store; bfloat16 halves it at about 2e-3 relative error"
    )
