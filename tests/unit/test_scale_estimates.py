"""The numbers of docs/scale.md: by hand where they can be counted, against real models where they cannot."""

import re
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from bench.scale.estimate import (
    BERT_BASE,
    LLAMA_3B,
    LLAMA_70B,
    MODELS,
    STUDY,
    TRAIN,
    Shape,
    Study,
    cache_gradients_bytes,
    forwards,
    gradiend_bytes,
    kept,
    pre_prune_bytes,
    store_bytes,
    tables,
    train_bytes,
    weights_bytes,
)
from bench.scale.study import params, runs_for, stages_of
from gradiend_core.config.params import Params, validate_params
from gradiend_core.gradients.importance import importance_bytes
from gradiend_core.gradients.selection import Selection, backbone_parameters
from gradiend_core.gradients.store import store_bytes as product_store_bytes
from gradiend_core.model.gradiend import GradiendModel
from project import ROOT

LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
LLAMA_3B_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 28,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
}
LLAMA_70B_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert-base": BertConfig(),
    "Llama-3.2-3B": LlamaConfig(**LLAMA, **LLAMA_3B_CONFIG, tie_word_embeddings=True),
    "Llama-3-70B": LlamaConfig(**LLAMA, **LLAMA_70B_CONFIG),
}
TINY = Shape("tiny", 2, 4, 8, 2 * 4, vocab=10, gated=False, tied=True, extra=5, weight_bytes=2)


@pytest.fixture(scope="module", params=MODELS, ids=lambda shape: shape.name)
def built(request: pytest.FixtureRequest) -> tuple[Shape, PreTrainedModel]:
    """A shape and the real architecture, without memory for its weights."""
    shape: Shape = request.param
    config = CONFIGS[shape.name]
    made: Any = AutoModelForMaskedLM if isinstance(config, BertConfig) else AutoModelForCausalLM
    with torch.device("meta"):
        return shape, made.from_config(config)


def test_backbones_have_as_many_entries_as_the_real_architectures(built: tuple[Shape, PreTrainedModel]) -> None:
    shape, model = built
    assert shape.backbone == sum(parameter.numel() for parameter in backbone_parameters(model).values())


def test_weights_are_those_of_the_real_architectures_but_for_the_head_of_a_masked_model(
    built: tuple[Shape, PreTrainedModel],
) -> None:
    shape, model = built
    head = model.num_parameters() - shape.entries
    assert 0 <= head <= 0.01 * shape.entries
    assert head == 0 or shape is BERT_BASE


def test_layers_matrices_are_the_real_ones(built: tuple[Shape, PreTrainedModel]) -> None:
    shape, model = built
    layers = [p for name, p in backbone_parameters(model).items() if ".layer" in name]
    assert shape.linear == sum(parameter.numel() for parameter in layers if parameter.ndim == 2)


def test_memory_of_pre_prune_is_what_the_stage_says(built: tuple[Shape, PreTrainedModel]) -> None:
    shape, model = built
    whole: torch.nn.Module = model
    whole.to(torch.bfloat16 if shape.weight_bytes == 2 else torch.float32)
    said = importance_bytes(model, backbone_parameters(model))
    assert pre_prune_bytes(shape) == pytest.approx(said, rel=0.01)


def test_stores_and_models_take_the_bytes_that_the_product_writes() -> None:
    assert store_bytes(7, 3, 4) == product_store_bytes(3, 7, torch.float32) == 2 * 3 * 7 * 4
    assert store_bytes(7, 3, 2) == product_store_bytes(3, 7, torch.bfloat16)
    model = GradiendModel(Selection.everything({"w": torch.empty(7)}), target_classes=("A", "B"))
    assert gradiend_bytes(7) == sum(parameter.nbytes for parameter in model.parameters())


def test_a_small_study_by_hand() -> None:
    study = Study(features=2, seeds=3, shards=4, rows=10, tokens=3, n_samples=5, scored=6)
    assert study.jobs == 2 * (1 + 4 + 3 + 7) + 3
    assert TINY.linear == 2 * (4 * 4 * 4 + 2 * 4 * 8)
    assert TINY.backbone == TINY.entries == 256 + 40 + 5
    assert TINY.forward_flops(3, scored=2) == 2 * (256 * 3 + 40 * 2)
    assert weights_bytes(TINY) == 602
    assert pre_prune_bytes(TINY) == 602 + 4 * 301 + 3 * 40 * 2
    assert cache_gradients_bytes(TINY, 7, study) == 602 + 8 * 4 * 32 * 7 + 32 * 3 * 2 * 4 * 2
    assert train_bytes(7, study) == 2 * 10 * 7 * 4 + 4 * 4 * 22
    work = forwards(study)
    assert work["pre_prune"] == 15
    assert work["cache_gradients"] == 10 * 3.33
    assert work["evaluate_decoder"] % 6 == 0


def test_one_percent_is_what_the_product_keeps_of_bert_base() -> None:
    assert kept(BERT_BASE)["1 %"] == 1_088_917
    assert kept(LLAMA_70B)["1 %"] == 695_030_334
    assert kept(LLAMA_3B)["10⁶"] == 10**6


def test_the_simulated_study_is_valid_and_has_as_many_stages_as_it_says() -> None:
    runs = runs_for(10_000)
    assert runs_for(stages_of(runs)) == runs
    assert stages_of(runs - 1) < 10_000 <= stages_of(runs)
    valid = validate_params(yaml.safe_load(params(3)), "params")
    assert isinstance(valid, Params)
    assert len(valid.runs) == len(valid.datasets) == 3
    per_run = 1 + len(valid.gradient_shards) + len(valid.seeds) + 7
    assert stages_of(3) == 3 + 3 * per_run
    assert STUDY.seeds == len(valid.seeds)
    assert TRAIN.max_steps == 500  # of which docs/scale.md speaks


def test_the_tables_of_the_docs_are_the_computed_ones() -> None:
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    found = re.search(r"<!-- computed: begin -->\n\n(.*?)\n\n<!-- computed: end -->", text, re.DOTALL)
    assert found is not None
    docs = "\n\n".join(part for part in found[1].split("\n\n") if part.startswith("|"))
    assert docs == tables(), "run `python -m bench.scale.estimate` and put its tables into docs/scale.md"
