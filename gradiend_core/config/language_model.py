"""Parameters of every stage that computes gradients of a base model."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.section import Section


class GradientPass(Section):
    """How the base model is run forward and backward."""

    batch_size: int = Field(32, ge=1, description="rows per forward pass; affects memory, time and last digits only")
    base_model_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="number format of the base model; half precision halves its memory at 1 to 3 % error of a gradient"
        " in bfloat16, 0.1 to 0.5 % in float16",
    )
    gradient_checkpointing: bool = Field(
        False, description="keep only the inputs of the layers and run each again in the backward pass: less memory"
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="`torch.set_float32_matmul_precision`; high lets a GPU multiply in TF32, at about 1e-3 error",
    )
