"""Gradient checkpointing: keep only the inputs of a model's layers, and run each layer again in the backward pass."""

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gradiend_core.errors import GradiendError


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Checkpoint every layer of a model that stays in evaluation mode.

    Transformers' own switch only works in training mode, where dropout is on; here the layers' calls are wrapped.

    Raises:
        GradiendError: the model has no layers that transformers can checkpoint.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise GradiendError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that can be checkpointed. Set it to false,"
            " and lower batch_size if memory is short."
        )
    model.config.use_cache = False  # running a layer again would append its keys and values to the cache again
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
