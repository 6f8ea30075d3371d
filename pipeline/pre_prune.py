"""Choose the entries of the base model that take part, by their importance over a few training rows."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.config.pre_prune import PrePrune
from gradiend_core.config.section import read_section
from gradiend_core.data.tables import NEUTRAL_FILE, TRAINING, TRAINING_FILE
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.importance import (
    aligned_weights,
    importance_bytes,
    mean_gradient,
    require_usable,
    stratified_sample,
)
from gradiend_core.gradients.labels import class_label
from gradiend_core.gradients.moments import second_moment
from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.pins import pin
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k
from gradiend_core.lm.folder import MODEL_FILES, max_tokens
from gradiend_core.tables import read_table
from gradiend_core.tensors import save_tensors
from pipeline.language_model import load_for_gradients
from pipeline.stage import Outputs, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write selection.safetensors."""
    parser = stage_parser("pre_prune", __doc__)
    parser.add_argument("--target-classes", required=True, nargs=2, help="the two classes, +1 first")
    parser.add_argument("--base-model", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--dataset", required=True, type=Path, help="folder of the dataset")
    parser.add_argument("--output", required=True, type=Path, help="the selection file")
    arguments = parser.parse_args(argv)
    params = read_section(PrePrune, arguments.params)
    use_deterministic_algorithms()
    pins = {
        "base_model": pin(arguments.base_model, MODEL_FILES),
        "dataset": pin(arguments.dataset, (TRAINING_FILE, NEUTRAL_FILE)),
    }
    inputs = [Path(p["path"]) / name for p in pins.values() for name in p["files"]]
    with Outputs("pre_prune", arguments.manifest, params.model_dump(), inputs) as outputs:
        training = read_table(arguments.dataset / TRAINING_FILE, TRAINING)
        selection, facts = _select(params, arguments.base_model, training, arguments.target_classes)
        tensors, mapping = selection.to_tensors()
        metadata = {"mapping": mapping, "target_classes": arguments.target_classes, "pins": pins}
        save_tensors(outputs.path(arguments.output), tensors, metadata)
        outputs.record(device=describe_device(pick_device()), seed=params.seed, entries_kept=selection.n, **facts)


def _select(
    params: PrePrune, base_model: Path, training: pd.DataFrame, target_classes: list[str]
) -> tuple[Selection, dict[str, Any]]:
    """The selection, and what the manifest says about it."""
    model, tokenizer = load_for_gradients(base_model, params)
    parameters = backbone_parameters(model, params.params)
    everything = Selection.everything(parameters)
    if params.keeps_everything:
        logger.info("no pre-pruning: all %d entries are kept", everything.n)
        return everything, {}
    sample = _sample(params, training, target_classes)
    rows = {str(name): int(count) for name, count in sample["transition"].value_counts().sort_index().items()}
    logger.info(
        "%s of the %s gradient: %d entries of %d parameters over %d rows (%s), about %.0f MB and a batch's activations",
        params.statistic,
        params.source,
        everything.n,
        len(parameters),
        len(sample),
        ", ".join(f"{count} {name}" for name, count in rows.items()),
        importance_bytes(model, parameters) / 1e6,
    )
    if len(sample) < params.n_samples:
        logger.warning(
            "pre_prune.n_samples: %d rows used of the %d asked for; a transition has no more in the train split",
            len(sample),
            params.n_samples,
        )
    importance = _importance(params, model, parameters, *_encode(model, tokenizer, sample), sample["label"].to_numpy())
    require_usable(importance, parameters)
    kept = top_k(importance, params.topk, threshold=params.threshold or 0.0)
    largest, last = float(importance.max()), float(importance[kept].min())
    logger.info("kept %d of %d entries, of importance %.3g to %.3g", len(kept), everything.n, last, largest)
    facts = {"rows": rows, "importance_largest": largest, "importance_last_kept": last}
    return everything.prune(kept), facts


def _sample(params: PrePrune, training: pd.DataFrame, target_classes: list[str]) -> pd.DataFrame:
    """The rows that the importance is computed from, with their labels."""
    inside = training["factual_class"].isin(target_classes) & training["alternative_class"].isin(target_classes)
    candidates = training[inside & (training["split"] == "train")].reset_index(drop=True)
    if candidates.empty:
        names = " and ".join(map(repr, target_classes))
        raise GradiendError(
            f"{TRAINING_FILE}: no row of the train split leads from one of the target classes {names} to the other."
            " Check the run's target_classes and the dataset's filters and splits."
        )
    sample = candidates.iloc[stratified_sample(candidates["transition"], params.n_samples, params.seed)]
    return sample.assign(label=class_label(sample, target_classes, params.source))


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sample: pd.DataFrame
) -> tuple[list[Example], list[Example]]:
    names = [f"{TRAINING_FILE}: row {row}" for row in sample["row"]]
    longest = max_tokens(model, tokenizer)
    factual, alternative = (
        encode(tokenizer, sample["masked"], sample[kind], max_length=longest, rows=names)
        for kind in ("factual", "alternative")
    )
    return factual, alternative


def _importance(
    params: PrePrune,
    model: PreTrainedModel,
    parameters: dict[str, torch.nn.Parameter],
    factual: list[Example],
    alternative: list[Example],
    labels: np.ndarray,
) -> Tensor:
    """Importance of every entry of the parameters [n]."""
    settings: dict[str, Any] = {"source": params.source, "batch_size": params.batch_size}
    if params.statistic == "rms":
        return second_moment(model, parameters, factual, alternative, **settings).sqrt_()
    weights = aligned_weights(labels) if params.statistic == "aligned_mean" else np.ones(len(labels))
    return mean_gradient(model, parameters, factual, alternative, weights, **settings).abs_()
