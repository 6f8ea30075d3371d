"""Choose the entries of the base model that take part, by their importance over a few training rows."""

import logging
from pathlib import Path

import pandas as pd

from gradiend_core.config.pre_prune import PrePrune
from gradiend_core.config.section import read_section
from gradiend_core.data.tables import NEUTRAL_FILE, TRAINING, TRAINING_FILE
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.gradients.importance import class_label, mean_gradient, stratified_sample
from gradiend_core.gradients.objectives import encode
from gradiend_core.gradients.pins import pin
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k
from gradiend_core.lm.folder import MODEL_FILES, load_masked_lm, max_tokens
from gradiend_core.tables import read_table
from gradiend_core.tensors import save_tensors
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
        selection = _select(params, arguments.base_model, training, arguments.target_classes)
        tensors, mapping = selection.to_tensors()
        metadata = {"mapping": mapping, "target_classes": arguments.target_classes, "pins": pins}
        save_tensors(outputs.path(arguments.output), tensors, metadata)
        outputs.record(device=describe_device(pick_device()), seed=params.seed, entries_kept=selection.n)


def _select(params: PrePrune, base_model: Path, training: pd.DataFrame, target_classes: list[str]) -> Selection:
    model, tokenizer = load_masked_lm(base_model, device=pick_device())
    parameters = backbone_parameters(model, params.params)
    everything = Selection.everything(parameters)
    if params.topk is None:
        logger.info("no pre-pruning: all %d entries are kept", everything.n)
        return everything
    between = training[
        training["factual_class"].isin(target_classes) & training["alternative_class"].isin(target_classes)
    ]
    candidates = between[between["split"] == "train"].reset_index(drop=True)
    sample = candidates.iloc[stratified_sample(candidates["transition"], params.n_samples, params.seed)]
    names = [f"{TRAINING_FILE}: row {row}" for row in sample["row"]]
    encoded = {
        kind: encode(tokenizer, sample["masked"], sample[kind], max_length=max_tokens(model, tokenizer), rows=names)
        for kind in ("factual", "alternative")
    }
    labels = class_label(sample, target_classes, params.source)
    mean = mean_gradient(
        model,
        parameters,
        encoded["factual"],
        encoded["alternative"],
        labels if params.statistic == "aligned_mean" else labels**2,
        source=params.source,
        batch_size=params.batch_size,
    )
    selection = everything.prune(top_k(mean.abs(), params.topk))
    logger.info("kept %d of %d entries from %d rows", selection.n, everything.n, len(sample))
    return selection
