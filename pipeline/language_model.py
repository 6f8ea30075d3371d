"""The base model as the gradient stages use it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.config.language_model import GradientPass
from gradiend_core.devices import place_model
from gradiend_core.lm.checkpointing import checkpoint_layers
from gradiend_core.lm.folder import WEIGHTS_FILE, load_masked_lm


def load_for_gradients(folder: Path, params: GradientPass) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model of a folder in the number format asked for, on the device or devices it fits on, and its tokenizer."""
    torch.set_float32_matmul_precision(params.float32_matmul_precision)
    device = place_model(folder / WEIGHTS_FILE)
    model, tokenizer = load_masked_lm(folder, device=device, dtype=getattr(torch, params.base_model_dtype))
    if params.gradient_checkpointing:
        checkpoint_layers(model)
    return model, tokenizer
