"""Parameters of the train stage."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.section import Section

Quantity = Literal["factual", "alternative", "diff"]


class Train(Section):
    """How a GRADIEND is trained on stored gradients."""

    source: Quantity = Field("alternative", description="gradient the encoder reads")
    target: Quantity = Field("diff", description="gradient the decoder predicts")
    scaling: Literal["scale_free", "reference"] = Field(
        "scale_free",
        description="scale_free: gradients divided by their root mean square, summed loss, one rate for every size;"
        " reference: raw gradients, element-mean loss (docs/reference.md, BUG-05)",
    )
    latent_dim: Literal[1] = Field(1, description="encoder units")
    activation_encoder: Literal["tanh", "smht", "id"] = Field("tanh", description="encoder non-linearity")
    activation_decoder: Literal["tanh", "smht", "id"] = Field("id", description="decoder non-linearity")
    bias_decoder: bool = Field(True, description="decoder bias on or off")
    train_batch_size: int = Field(32, ge=1, description="examples of one transition averaged into one gradient row")
    gradiend_batch_size: int = Field(1, ge=1, description="gradient rows per optimiser step")
    max_steps: int = Field(500, ge=1, description="optimiser steps")
    learning_rate: float = Field(
        0.01, gt=0, description="constant rate; of the decoder under scale_free, whose encoder takes it divided by √n"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    adam_epsilon: float = Field(1.0e-8, gt=0, description="epsilon of Adam")
    optim: Literal["adamw", "adam"] = Field("adamw", description="optimiser")
    eval_steps: int = Field(50, ge=1, description="steps between evaluations on the validation split")
