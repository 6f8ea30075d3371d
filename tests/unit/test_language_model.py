"""A base model in other number formats, checkpointed, or spread over devices gives the same gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from gradiend_core.config.language_model import GradientPass
from gradiend_core.devices import place_model
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.collector import GradientCollector
from gradiend_core.gradients.verify import TOLERANCE, verify_rows
from gradiend_core.lm.checkpointing import checkpoint_layers
from gradiend_core.lm.folder import WEIGHTS_FILE, load_masked_lm
from pipeline.language_model import load_for_gradients
from tests.unit.tiny import build, everything, pairs, relative_error


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_checkpointed_layers_give_the_same_bits(kind: str) -> None:
    model, tokenizer = build(kind)
    factual, alternative = pairs(tokenizer)
    expected = GradientCollector(model, everything(model)).rows(factual, alternative)
    calls = count_layer_calls(model)
    checkpoint_layers(model)
    collector = GradientCollector(model, everything(model))
    rows = collector.rows(factual[:1], alternative[:1])
    assert calls.count("layer") == 2 * 3  # two layers: forward, and again in each of two backward passes
    rows = collector.rows(factual, alternative)
    assert not collector.one_by_one
    assert torch.equal(rows.alternative, expected.alternative)
    assert torch.equal(rows.diff, expected.diff)
    verify_rows(model, everything(model), rows, factual, alternative)


def count_layer_calls(model: Any) -> list[str]:
    """Grows by one with every run of a layer, whoever starts it."""
    calls: list[str] = []
    for module in model.modules():
        if type(module).__name__.endswith("Intermediate") or type(module).__name__ == "FFN":
            module.register_forward_pre_hook(lambda *_: calls.append("layer"))
    return calls


def test_model_without_layers_to_checkpoint_is_refused() -> None:
    model, _ = build("albert")
    with pytest.raises(GradiendError, match=r"AlbertForMaskedLM has no layers.*Set it to false"):
        checkpoint_layers(model)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision_is_off_by_its_rounding(dtype: torch.dtype, limit: float) -> None:
    model, tokenizer = build("bert")
    factual, alternative = pairs(tokenizer)
    exact = GradientCollector(model, everything(model)).rows(factual, alternative)
    rows = GradientCollector(model.to(dtype), everything(model)).rows(factual, alternative)
    assert rows.alternative.dtype == torch.float32
    for ours, expected in zip(rows, exact, strict=True):
        assert 1e-4 < relative_error(ours, expected) <= limit
    assert verify_rows(model, everything(model), rows, factual, alternative) < TOLERANCE[dtype]


def test_modules_that_a_dispatcher_wraps_are_still_tapped() -> None:
    model, tokenizer = build("bert")
    factual, alternative = pairs(tokenizer)
    expected = GradientCollector(model, everything(model)).rows(factual, alternative)
    places: Any = {"bert.embeddings": "cpu", "bert.encoder": "cpu", "cls": "cpu"}
    dispatched = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in dispatched.modules())
    collector = GradientCollector(dispatched, everything(dispatched))
    rows = collector.rows(factual, alternative)
    assert not collector.one_by_one
    assert torch.equal(rows.diff, expected.diff)


def test_section_decides_how_the_model_is_loaded(reference_folder: Path) -> None:
    precision = torch.get_float32_matmul_precision()
    params = GradientPass(
        base_model_dtype="bfloat16", gradient_checkpointing=True, float32_matmul_precision="high", batch_size=2
    )
    try:
        model, _ = load_for_gradients(reference_folder, params)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config.use_cache is False


def test_large_models_are_spread_over_the_gpus(
    reference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place_model(reference_folder / WEIGHTS_FILE).type == "cpu"  # type: ignore[union-attr]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    size = (reference_folder / WEIGHTS_FILE).stat().st_size
    for free, expected in ((2 * size, torch.device("cuda")), (size, "auto")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        assert place_model(reference_folder / WEIGHTS_FILE) == expected


def test_model_that_does_not_fit_on_the_gpus_is_refused(reference_folder: Path) -> None:
    # There is no GPU here, so that all of it lands on the CPU.
    with pytest.raises(GradiendError, match="does not fit on the GPUs of this machine"):
        load_masked_lm(reference_folder, device="auto")
