"""Models of common sizes with random weights, and batches of random rows for them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from gradiend_core.gradients.objectives import Example
from gradiend_core.gradients.selection import Selection, backbone_parameters

DEMO = Path("artifacts/base_models/demo-bert")


class Size(NamedTuple):
    """A model to measure: its config (None: trained, in the folder `DEMO`) and how many rows a batch has."""

    kind: str
    rows: int
    config: dict[str, Any] | None
    big: bool = False


def _bert(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": 4 * width,
        "use_cache": False,
    }


SIZES = {
    "bert-base": Size("bert", 16, _bert(768, 12, 30522), big=True),
    "gpt2": Size("gpt2", 16, {"use_cache": False}, big=True),  # 12x768, vocabulary 50257
    "bert 4x128": Size("bert", 32, _bert(128, 4, 30522)),
    "demo-bert": Size("bert", 32, None),  # trained by the pipeline's demo
    "tiny": Size("bert", 4, _bert(16, 2, 50)),  # for the tests of these scripts
}


def build(name: str) -> PreTrainedModel:
    """The model of a size, in evaluation mode."""
    size = SIZES[name]
    torch.manual_seed(0)
    model: PreTrainedModel
    if size.config is None:
        model = AutoModelForMaskedLM.from_pretrained(DEMO, local_files_only=True)
    elif size.kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**size.config))
    else:
        model = BertForMaskedLM(BertConfig(**size.config))
    model.train(False)
    return model


def batch(model: PreTrainedModel, rows: int, tokens: int = 32) -> tuple[list[Example], list[Example]]:
    """Factual and alternative examples of random tokens; every other row has two labelled positions, the rest one."""
    random = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    factual, alternative = [], []
    for row in range(rows):
        ids = tuple(torch.randint(5, vocabulary, (tokens,), generator=random).tolist())
        count = 1 + row % 2
        positions = tuple(sorted(torch.randperm(tokens - 1, generator=random)[:count].tolist()))
        plus, minus = (tuple([5 + (row + side) % 2] * count) for side in (0, 1))
        slots = tuple(range(count))
        factual.append(Example(ids, positions, plus, slots))
        alternative.append(Example(ids, positions, minus, slots))
    return factual, alternative


def random_selection(model: PreTrainedModel, share: float) -> Selection:
    """A random share of the entries of the backbone."""
    whole = Selection.everything(backbone_parameters(model))
    return whole.prune(random_coordinates(whole.n, share))


def random_coordinates(n: int, share: float) -> Tensor:
    """About a share of 0 … n - 1, drawn at random, in order (int64)."""
    return (torch.rand(n, generator=torch.Generator().manual_seed(0)) < share).nonzero()[:, 0]


def largest_selection(model: PreTrainedModel, gradient: Tensor, share: float) -> Selection:
    """The share of the backbone's entries with the largest gradient, which stand together in rows and columns."""
    whole = Selection.everything(backbone_parameters(model))
    return whole.prune(gradient.abs().topk(round(share * whole.n)).indices.sort().values)
