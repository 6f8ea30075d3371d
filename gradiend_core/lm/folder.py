"""Base-model folders: what is in one, loading it, and saving one."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gradiend_core.errors import GradiendError, out_of_memory
from gradiend_core.tensors import disk_errors

WEIGHTS_FILE: Final = "model.safetensors"
TOKENIZER_FILE: Final = "tokenizer.json"
MODEL_FILES: Final = ("config.json", WEIGHTS_FILE, TOKENIZER_FILE, "tokenizer_config.json")
METRICS_FILE: Final = "metrics.json"


def load_masked_lm(
    folder: Path | str,
    *,
    revision: str | None = None,
    device: torch.device | Literal["auto"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A masked language model in evaluation mode (no dropout) and its fast tokenizer.

    Nothing in the folder is executed: weights are safetensors only, and code that comes with a model is left out.
    Only with a `revision` does transformers look at the hub.

    Args:
        folder: a local folder, or a hub id together with its `revision`.
        device: where the model goes; the CPU by default; "auto" spreads it over all GPUs (transformers' device_map).
        dtype: number format of the weights.

    Raises:
        GradiendError: missing, damaged or incomplete weights; weights that are pickles; a model that needs code of its
            own; no fast tokenizer; no mask token.
    """
    if revision is None and not Path(folder).is_dir():  # else transformers would look for it on the hub
        raise GradiendError(f"{folder}: no such folder. Make it first, or correct its path.")
    place: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        _refuse_kernels(PreTrainedConfig.get_config_dict(folder, **place)[0])
        model, info = AutoModelForMaskedLM.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=dtype,
            device_map="auto" if device == "auto" else None,
            output_loading_info=True,
            **place,
        )
        found = AutoTokenizer.from_pretrained(folder, **place)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, … for bad folders
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise GradiendError(
            f"{folder}: not a masked language model that transformers can load ({type(error).__name__}: {reason})."
            f" It needs {', '.join(MODEL_FILES)}; SECURITY.md says what is never loaded, and what to do."
        ) from None
    # Names of code, under which a copy of the model would go on asking for it.
    vars(model.config).pop("auto_map", None)
    found.init_kwargs.pop("auto_map", None)
    tokenizer = _checked(folder, model, found, info["missing_keys"])
    if device == "auto":
        places = getattr(model, "hf_device_map", {"": model.device})  # no map is made for one place
        if {str(place) for place in places.values()} & {"cpu", "disk"}:
            raise GradiendError(
                f"{folder}: the model does not fit on the GPUs of this machine. Use more or larger ones, or set"
                " base_model_dtype: bfloat16 for its run."
            )
        return model.eval(), tokenizer
    # As a module: the method of transformers adds checks for quantised models, whose types it does not declare.
    return nn.Module.to(model.eval(), device or torch.device("cpu")), tokenizer


def _checked(
    folder: Path | str, model: PreTrainedModel, tokenizer: Any, missing_keys: Collection[str]
) -> PreTrainedTokenizerFast:
    """The tokenizer; raises `GradiendError` when it or the weights are not what gradients need."""
    if missing_keys:
        missing = ", ".join(sorted(missing_keys)[:3])
        raise GradiendError(
            f"{folder}: the weights lack {missing}; they would be random. Use a model with its masked-LM head."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.mask_token_id is None:
        raise GradiendError(f"{folder}: the tokenizer must be a fast one (tokenizer.json) with a mask token")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes such a one where there is none
        raise GradiendError(f"{folder}: the tokenizer knows no words. Is tokenizer.json missing in the folder?")
    if len(tokenizer) > model.config.vocab_size:
        raise GradiendError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries, the model only {model.config.vocab_size}"
        )
    return tokenizer


def _refuse_kernels(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a configuration names a kernel of the hub, which is code that would be run."""
    for key, value in config.items():
        if "implementation" in key and "/" in str(value):
            raise ValueError(f"config.json: {key} {value!r} is code of the hub; take the key out of the file")
        if isinstance(value, dict):
            _refuse_kernels(value)


def save_masked_lm(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write `MODEL_FILES` (one weights file whatever the size) into an existing folder.

    Raises `OSError` when the disk refuses.
    """
    with disk_errors(folder / WEIGHTS_FILE):
        model.save_pretrained(folder, max_shard_size="1000GB")
    with disk_errors(folder / TOKENIZER_FILE):
        tokenizer.save_pretrained(folder)


def max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """The longest input the model takes, in tokens, special tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    # Models of the RoBERTa family (CamemBERT, XLM-R, MPNet, …) count positions from padding_idx + 1.
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    reserved = [table.padding_idx + 1 for table in tables if isinstance(getattr(table, "padding_idx", None), int)]
    return int(min(positions - max(reserved, default=0), tokenizer.model_max_length))
