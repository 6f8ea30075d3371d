"""How much of the truly important entries pre-pruning finds: `python -m bench.importance` in the repository.

For each feature, statistic, source, number of rows and share of entries kept: the recall of the *true* top entries, as
the mean over features and over samples that differ in their seed. The truth is that of the difference gradients (what
the decoder is trained to give) of those training rows that are in none of a seed's samples, in two definitions:

- mean: |difference of the two classes' mean gradients|, the quantity that aligned_mean estimates;
- effect: that difference divided by the pooled standard deviation of the rows, which no statistic estimates.

Lines called `the truth's own` order the entries by the truth's formula, applied to the sampled rows: what these rows
can tell at most. Choosing blindly finds the share that is kept. Prints Markdown tables and writes JSON.
"""

import argparse
import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.data.tables import TRAINING, TRAINING_FILE
from gradiend_core.gradients.collector import GradientCollector
from gradiend_core.gradients.importance import aligned_weights, mean_gradient, stratified_sample
from gradiend_core.gradients.labels import Source, class_label
from gradiend_core.gradients.moments import second_moment
from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.selection import Selection, backbone_parameters, top_k
from gradiend_core.lm.folder import load_masked_lm, max_tokens
from gradiend_core.progress import track
from gradiend_core.tables import read_table

SOURCES: tuple[Source, ...] = get_args(Source)
SHARES = (0.01, 0.1)
SIZES = (8, 32, 64, 128, 256)
FEATURES = ("pronoun_number:3SG:3PL", "pronoun_gender:masculine:feminine")
BATCH_SIZE = 32


class Feature(NamedTuple):
    """The training rows of a feature."""

    table: pd.DataFrame
    positive: Tensor  # whether the factual class is the first of the two [N]
    factual: list[Example]
    alternative: list[Example]
    diff: Tensor  # difference gradients [N, n]


def main() -> None:
    """Measure, print and write."""
    arguments = parse_arguments()
    model, tokenizer = load_masked_lm(arguments.base_model)
    parameters = backbone_parameters(model, arguments.params)
    n = sum(p.numel() for p in parameters.values())
    records = []
    for name in arguments.features:
        dataset, *classes = name.split(":")
        feature = read_feature(model, tokenizer, parameters, arguments.datasets / dataset, classes)
        for seed in track(range(arguments.seeds), f"samples of {dataset}"):
            found = measure(model, parameters, feature, classes, seed)
            records += [{"feature": dataset, "seed": seed} | record for record in found]
    print(
        f"{n} entries of {arguments.base_model}; {', '.join(arguments.features)}; {arguments.seeds} samples of each\n"
    )
    print("\n".join(tables(pd.DataFrame(records))))
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings = {"params": arguments.params, "entries": n, "n_samples": SIZES, "samples": arguments.seeds}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "settings": settings, "recall": list(summary(pd.DataFrame(records)))}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line; defaults are the artifacts of the project's own params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m bench.importance", description=__doc__.partition("\n")[0])
    parser.add_argument("features", nargs="*", default=FEATURES, help="dataset:class:class, e.g. %(default)s")
    parser.add_argument("--base-model", type=Path, default=Path("artifacts/base_models/demo-bert"))
    parser.add_argument("--datasets", type=Path, default=Path("artifacts/datasets"), help="folder of the datasets")
    parser.add_argument("--params", nargs="*", help="patterns of parameters, as in pre_prune.params")
    parser.add_argument("--seeds", type=int, default=5, help="samples of each size")
    parser.add_argument("--output", type=Path, default=Path("bench/results/importance.json"))
    return parser.parse_args()


def read_feature(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    parameters: dict[str, nn.Parameter],
    dataset: Path,
    classes: Sequence[str],
) -> Feature:
    """The rows of the train split between two classes, encoded, with their gradients."""
    table = read_table(dataset / TRAINING_FILE, TRAINING)
    between = table["factual_class"].isin(classes) & table["alternative_class"].isin(classes)
    table = table[between & (table["split"] == "train")].reset_index(drop=True)
    factual, alternative = (
        encode(tokenizer, table["masked"], table[kind], max_length=max_tokens(model, tokenizer))
        for kind in ("factual", "alternative")
    )
    selection = Selection.everything(parameters)
    collector = GradientCollector(model, selection)
    diff = torch.empty(len(table), selection.n)
    for start in track(range(0, len(table), BATCH_SIZE), f"gradients of {dataset.name}"):
        chunk = slice(start, start + BATCH_SIZE)
        diff[chunk] = collector.rows(factual[chunk], alternative[chunk]).diff
    return Feature(table, torch.tensor(table["factual_class"] == classes[0]), factual, alternative, diff)


def measure(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    feature: Feature,
    classes: Sequence[str],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The recall of every setting, for nested samples of one seed and the truth of all rows in none of them."""
    transitions = feature.table["transition"]
    samples = {size: stratified_sample(transitions, size, seed) for size in SIZES}
    truths = orders(feature, sorted(set(range(len(transitions))) - set(samples[max(SIZES)])))
    for size, sample in samples.items():
        guesses = dict(importances(model, parameters, feature, classes, sample))
        own = orders(feature, sample)
        for share, (truth, true) in itertools.product(SHARES, truths.items()):
            wanted = top_k(true, share)
            for (statistic, source), guess in {**guesses, ("the truth's own", "diff"): own[truth]}.items():
                recall = float(torch.isin(wanted, top_k(guess, share)).float().mean())
                setting = {"n_samples": size, "statistic": statistic, "source": source}
                yield {"truth": truth, "topk": share, **setting, "recall": recall}


def orders(feature: Feature, rows: Sequence[int]) -> dict[str, Tensor]:
    """For each definition of the truth how important the entries are, by some rows [n]: two or more of each class."""
    chosen = torch.tensor(rows)
    groups = [feature.diff[chosen[feature.positive[chosen] == side]] for side in (True, False)]
    difference = (groups[0].mean(0) - groups[1].mean(0)).abs()
    squares = torch.stack([group.var(0) * (len(group) - 1) for group in groups]).sum(0)
    spread = (squares / (len(rows) - 2)).sqrt()
    return {"mean": difference, "effect": torch.where(spread > 0, difference / spread, 0.0)}


def importances(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    feature: Feature,
    classes: Sequence[str],
    sample: Sequence[int],
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """The importance of all entries by each statistic and source, as the pre_prune stage computes it [n]."""
    plus, minus = ([examples[row] for row in sample] for examples in (feature.factual, feature.alternative))
    for source in SOURCES:
        aligned = aligned_weights(class_label(feature.table.iloc[list(sample)], classes, source))
        for statistic, weights in (("aligned_mean", aligned), ("mean", np.ones(len(aligned)))):
            mean = mean_gradient(model, parameters, plus, minus, weights, source=source, batch_size=BATCH_SIZE)
            yield (statistic, source), mean.abs()
        squares = second_moment(model, parameters, plus, minus, source=source, batch_size=BATCH_SIZE)
        yield ("rms", source), squares.sqrt()


def summary(records: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For every feature and setting the mean, lowest and highest recall over samples, of each number of rows."""
    names = ["feature", "truth", "topk", "statistic", "source"]
    for setting, part in records.groupby(names, sort=False):
        recall = part.groupby("n_samples")["recall"]
        found = {"mean": recall.mean(), "low": recall.min(), "high": recall.max()}
        yield dict(zip(names, setting, strict=True)) | {name: list(each.round(4)) for name, each in found.items()}


def tables(records: pd.DataFrame) -> Iterator[str]:
    """A Markdown table for each truth and share, the best with the largest sample first."""
    for (truth, share), part in records.groupby(["truth", "topk"], sort=False):
        yield f"Recall of the top {share:.0%} of the entries by the `{truth}` of the rows not sampled:\n"
        yield f"| statistic | source | {' | '.join(f'{size} rows' for size in SIZES)} |"
        yield f"|---|---|{'---:|' * len(SIZES)}"
        recall = part.groupby(["n_samples", "statistic", "source"])["recall"].mean()
        for statistic, source in recall[max(SIZES)].sort_values(ascending=False).index:
            cells = [f"{recall[size, statistic, source]:.2f}" for size in SIZES]
            yield f"| {statistic} | {source} | {' | '.join(cells)} |"
        yield ""


if __name__ == "__main__":
    main()
