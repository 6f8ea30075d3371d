"""Compute one shard of a run's gradient store: per-example gradients at the selected entries."""

import logging
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerFast

from gradiend_core.config.cache_gradients import CacheGradients
from gradiend_core.config.section import read_section, read_value
from gradiend_core.data.tables import NEUTRAL, NEUTRAL_FILE, TRAINING, TRAINING_FILE
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.files import sha256_file
from gradiend_core.gradients.collector import GradientCollector
from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.pins import pinned_folder
from gradiend_core.gradients.plan import batches_at_once, rows_per_batch, shard_batches, shard_rows
from gradiend_core.gradients.pool import CollectorPool
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.shard_writer import QUEUED_BATCHES, ShardWriter
from gradiend_core.gradients.store import INDEX, require_space, shard_files, store_bytes
from gradiend_core.gradients.store import TRAINING as STORED
from gradiend_core.gradients.tasks import store_index, usable_neutral
from gradiend_core.gradients.verify import verify_rows
from gradiend_core.lm.folder import max_tokens
from gradiend_core.progress import track
from gradiend_core.tables import read_table, write_table
from gradiend_core.tensors import load_tensors, read_metadata
from pipeline.language_model import load_for_gradients
from pipeline.stage import Outputs, code_digest, environment, stage_parser

logger = logging.getLogger(__name__)

Blocks = list[list[list[int]]]

# Waiting for the disk costs time, too: a kill may cost so much computing.
_SECONDS_BETWEEN_CHECKPOINTS = 5.0


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
    dtype = getattr(torch, params.dtype)
    with Outputs("cache_gradients", arguments.manifest, params.model_dump(), inputs) as outputs:
        model, tokenizer = load_for_gradients(base_model, params)
        index, factual, alternative = _examples(
            dataset, pinned["target_classes"], tokenizer, max_tokens(model, tokenizer)
        )
        batch_size = rows_per_batch(params.batch_size, selection.n)
        rows = shard_rows(len(index), arguments.shard, num_shards, batch_size)
        needed = store_bytes(len(rows), selection.n, dtype)
        logger.info(
            "rows %d to %d of %d, %d entries: %.1f MB", rows.start, rows.stop, len(index), selection.n, needed / 1e6
        )
        tensors, mapping = selection.to_tensors()
        metadata = _metadata(pinned, mapping, arguments.shard, num_shards)
        tensor_file, index_file = shard_files(arguments.output, arguments.shard)
        aside = outputs.resumable(tensor_file)
        require_space(arguments.output, needed - (aside.stat().st_blocks * 512 if aside.exists() else 0))
        identity = {
            "params": params.model_dump(),
            "selection": sha256_file(arguments.selection),
            "device": describe_device(pick_device()),
            "code": code_digest(),
        }
        writer = outputs.hold(
            ShardWriter(
                aside,
                rows=len(rows),
                n=selection.n,
                dtype=dtype,
                constants=tensors,
                metadata=metadata,
                identity=identity | environment(),
            )
        )
        collector = GradientCollector(model, selection)
        blocks = shard_batches(rows, factual, alternative, batch_size)
        error = _self_check(collector, blocks, factual, alternative, len(rows) - writer.done)
        threads = torch.get_num_threads() if model.device.type == "cpu" else 1
        at_once = batches_at_once(threads, batch_size, selection.n, QUEUED_BATCHES)
        _fill(writer, collector, at_once, rows.start, blocks, factual, alternative)
        write_table(outputs.path(index_file), index[rows.start : rows.stop], INDEX)
        outputs.record(device=identity["device"], shard=arguments.shard, self_check_relative_error=error)


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


def _self_check(
    collector: GradientCollector, blocks: Blocks, factual: list[Example], alternative: list[Example], remaining: int
) -> float:
    """The error of the first batch, before anything is written; its time tells what the whole will take."""
    if not blocks:
        return 0.0
    batch = blocks[0][0]
    pairs = [factual[row] for row in batch], [alternative[row] for row in batch]
    started = time.monotonic()
    rows = collector.rows(*pairs)
    seconds = (time.monotonic() - started) / len(batch) * remaining
    error = verify_rows(collector.model, collector.selection, rows, *pairs)
    logger.info(
        "self-check: largest relative error %.1e; %d rows will take at most about %.0f s", error, remaining, seconds
    )
    return error


def _fill(
    writer: ShardWriter,
    collector: GradientCollector,
    at_once: int,
    first: int,
    blocks: Blocks,
    factual: list[Example],
    alternative: list[Example],
) -> None:
    """Write the rows that are not there yet; row `first` of the store is the shard's row 0."""
    end = first + writer.done
    remaining = [block for block in blocks if min(map(min, block)) >= end]
    recorded = time.monotonic()
    batches = [*chain(*remaining)]
    pairs = (([factual[row] for row in batch], [alternative[row] for row in batch]) for batch in batches)
    # While some are computed, the writer holds those that are queued.
    with CollectorPool(collector, at_once, largest=max(map(len, batches), default=0), held=QUEUED_BATCHES) as pool:
        rows = pool.rows(pairs)
        for block in track(remaining, "blocks of rows"):
            for batch in block:
                writer.write(torch.tensor(batch) - first, *next(rows))
            end += sum(map(len, block))
            if time.monotonic() - recorded >= _SECONDS_BETWEEN_CHECKPOINTS:
                writer.checkpoint(end - first)
                recorded = time.monotonic()
        writer.finish()


def _metadata(pinned: dict[str, Any], mapping: dict[str, Any], shard: int, num_shards: int) -> dict[str, Any]:
    return {
        "mapping": mapping,
        "target_classes": pinned["target_classes"],
        "base_model": pinned["pins"]["base_model"],
        "dataset": pinned["pins"]["dataset"],
        "shard": shard,
        "num_shards": num_shards,
    }
