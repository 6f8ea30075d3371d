"""Compute one shard of a run's gradient store: per-example gradients at the selected entries."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.config.cache_gradients import CacheGradients
from gradiend_core.config.section import read_section, read_value
from gradiend_core.data.tables import NEUTRAL, NEUTRAL_FILE, TRAINING, TRAINING_FILE
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.gradients.collector import GradientCollector
from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.pins import pinned_folder
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.store import INDEX, require_space, shard_files, store_bytes
from gradiend_core.gradients.store import TRAINING as STORED
from gradiend_core.gradients.tasks import store_index, usable_neutral
from gradiend_core.gradients.verify import verify_rows
from gradiend_core.lm.folder import load_masked_lm, max_tokens
from gradiend_core.progress import track
from gradiend_core.tables import read_table, write_table
from gradiend_core.tensors import load_tensors, read_metadata, save_tensors
from pipeline.stage import Outputs, stage_parser

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write shard-<i>.safetensors and shard-<i>.parquet."""
    parser = stage_parser("cache_gradients", __doc__)
    parser.add_argument("--shards", required=True, metavar="KEY", help="key of params.yaml that lists the shards")
    parser.add_argument("--shard", required=True, type=int, help="the shard to compute")
    parser.add_argument("--selection", required=True, type=Path, help="the selection, which pins model and data")
    parser.add_argument("--output", required=True, type=Path, help="folder of the store")
    arguments = parser.parse_args(argv)
    params = read_section(CacheGradients, arguments.params)
    num_shards = len(read_value(arguments.shards))
    use_deterministic_algorithms()
    pinned = read_metadata(arguments.selection)
    selection = Selection.from_tensors(load_tensors(arguments.selection), pinned["mapping"])
    base_model, dataset = (pinned_folder(pinned["pins"][name]) for name in ("base_model", "dataset"))
    inputs = [arguments.selection, *(Path(p["path"]) / name for p in pinned["pins"].values() for name in p["files"])]
    with Outputs("cache_gradients", arguments.manifest, params.model_dump(), inputs) as outputs:
        model, tokenizer = load_masked_lm(base_model, device=pick_device())
        index, factual, alternative = _examples(
            dataset, pinned["target_classes"], tokenizer, max_tokens(model, tokenizer)
        )
        rows = _shard_rows(len(index), arguments.shard, num_shards, params.batch_size)
        dtype = getattr(torch, params.dtype)
        needed = store_bytes(rows.stop - rows.start, selection.n, dtype)
        logger.info(
            "rows %d to %d of %d, %d entries: %.1f MB", rows.start, rows.stop, len(index), selection.n, needed / 1e6
        )
        require_space(arguments.output, needed)
        matrices, error = _compute(model, selection, factual[rows], alternative[rows], params.batch_size)
        tensors, mapping = selection.to_tensors()
        tensors |= {name: matrix.to(dtype) for name, matrix in matrices.items()}
        tensor_file, index_file = shard_files(arguments.output, arguments.shard)
        metadata = _metadata(pinned, mapping, arguments.shard, num_shards)
        save_tensors(outputs.path(tensor_file), tensors, metadata)
        write_table(outputs.path(index_file), index[rows], INDEX)
        outputs.record(device=describe_device(pick_device()), shard=arguments.shard, self_check_relative_error=error)


def _examples(
    dataset: Path, target_classes: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[pd.DataFrame, list[Example], list[Example]]:
    """The index of the whole store, and the factual and the alternative example of every row."""
    training = read_table(dataset / TRAINING_FILE, TRAINING)
    neutral = usable_neutral(read_table(dataset / NEUTRAL_FILE, NEUTRAL), tokenizer, max_length)
    index = store_index(training, neutral, target_classes)
    names = [
        f"{TRAINING_FILE if kind == STORED else NEUTRAL_FILE}: row {row}"
        for kind, row in zip(index["type"], index["row"], strict=True)
    ]
    factual, alternative = (
        encode(tokenizer, index["masked"], index[kind], max_length=max_length, rows=names)
        for kind in ("factual", "alternative")
    )
    return index.assign(n_positions=[len(example.positions) for example in factual]), factual, alternative


def _shard_rows(n: int, shard: int, num_shards: int, batch_size: int) -> slice:
    """The rows of a shard; shards end where batches end, so that a row's batch does not depend on their number."""
    batches = -(-n // batch_size)
    start, stop = (min(n, batches * k // num_shards * batch_size) for k in (shard, shard + 1))
    return slice(start, stop)


def _compute(
    model: PreTrainedModel,
    selection: Selection,
    factual: list[Example],
    alternative: list[Example],
    batch_size: int,
) -> tuple[dict[str, Tensor], float]:
    """Both row matrices [rows, n] and the error found by the self-check of the first batch."""
    collector = GradientCollector(model, selection)
    matrices = {name: torch.empty(len(factual), selection.n) for name in ("alternative", "diff")}
    error = 0.0
    for start in track(range(0, len(factual), batch_size), "gradient batches"):
        chunk = slice(start, start + batch_size)
        rows = collector.rows(factual[chunk], alternative[chunk])
        if start == 0:
            error = verify_rows(model, selection, rows, factual[chunk], alternative[chunk])
            logger.info("self-check: largest relative error %.1e", error)
        matrices["alternative"][chunk], matrices["diff"][chunk] = rows
    return matrices, error


def _metadata(pinned: dict[str, Any], mapping: dict[str, Any], shard: int, num_shards: int) -> dict[str, Any]:
    return {
        "mapping": mapping,
        "target_classes": pinned["target_classes"],
        "base_model": pinned["pins"]["base_model"],
        "dataset": pinned["pins"]["dataset"],
        "shard": shard,
        "num_shards": num_shards,
    }
