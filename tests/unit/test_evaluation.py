"""Encoder metrics, the decoder's grid and the choice from it, intervals, and base-model folders."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.config.evaluate_decoder import EvaluateDecoder
from gradiend_core.config.evaluate_encoder import EvaluateEncoder
from gradiend_core.data.tables import NEUTRAL_DATASET
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.errors import GradiendError
from gradiend_core.evaluation.decoder import class_words, evaluate_grid, select_candidates
from gradiend_core.evaluation.encoder import all_metrics, encode_store, encoder_metrics
from gradiend_core.evaluation.scoring import ClassScorer, LanguageModelScorer
from gradiend_core.evaluation.tables import BASE_ID, ENCODINGS, GRID
from gradiend_core.gradients.selection import Selection, backbone_parameters
from gradiend_core.gradients.store import GradientStore
from gradiend_core.lm.folder import MODEL_FILES, load_masked_lm, max_tokens, save_masked_lm
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.model.rewriting import rewrite
from gradiend_core.statistics import bootstrap_interval, pearson, ratio_interval
from gradiend_core.tables import read_table, write_table
from tests.unit.tiny import build, wordpiece

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerFast]
NEUTRAL_TEXTS = ["the king slept .", "the queen slept .", "my friend sang .", "the bread was cold ."]


# --- the encoder


def store() -> GradientStore:
    """Three splits of four training rows, and two neutral rows; 5 of 8 entries of a tensor."""
    index = pd.DataFrame({"row": range(12), "type": "training", "split": ["train", "validation", "test"] * 4})
    index["factual_class"] = ["A"] * 6 + ["B"] * 6
    index["alternative_class"] = ["B"] * 6 + ["A"] * 6
    index["label"] = [1.0] * 6 + [-1.0] * 6
    index["transition"] = index["factual_class"] + "->" + index["alternative_class"]
    neutral = pd.DataFrame({"row": range(2), "type": NEUTRAL_DATASET, "split": "test", "label": 0.0})
    index = pd.concat([index, neutral], ignore_index=True)
    index = index.assign(masked="[MASK]", factual="x", alternative="y", n_positions=1)
    random = torch.Generator().manual_seed(0)
    label = torch.tensor(index["label"].to_numpy())[:, None]
    rows = {"alternative": (-label + 0.3 * torch.randn(14, 5, generator=random)).float()}
    rows["diff"] = (label.abs() * (label + torch.randn(14, 5, generator=random))).float()
    selection = Selection.everything({"w": torch.zeros(8)}).prune(torch.tensor([0, 2, 3, 6, 7]))
    return GradientStore(index, selection, {}, (rows,))


def model(source: str) -> GradiendModel:
    made = GradiendModel(store().selection, target_classes=("A", "B"), source=source)  # type: ignore[arg-type]
    made.reset_parameters(0, zero_decoder_bias=False)
    return made


@pytest.mark.parametrize(
    ("source", "sign", "column"),
    [("factual", 1, "factual_class"), ("alternative", -1, "alternative_class"), ("diff", 1, "transition")],
)
def test_encodings_of_every_row(source: str, sign: float, column: str, tmp_path: Path) -> None:
    opened, made = store(), model(source)
    table = encode_store(made, opened)
    assert table["label"].tolist() == [sign] * 6 + [-sign] * 6 + [0, 0]
    assert table["source_id"].iloc[:12].tolist() == opened.index[column].iloc[:12].tolist()
    assert table["source_id"].iloc[12:].isna().all()
    neutral, rows = opened.rows("factual", torch.tensor([12, 13])), torch.arange(12)
    sources = torch.cat([opened.rows(source, rows), neutral])  # type: ignore[arg-type]
    assert table["encoded"].to_numpy() == pytest.approx(made.encode(sources)[:, 0].detach().numpy(), abs=1e-6)
    write_table(tmp_path / "encodings.parquet", table, ENCODINGS)
    pd.testing.assert_frame_equal(read_table(tmp_path / "encodings.parquet", ENCODINGS), table, check_dtype=False)


def test_pruned_model_reads_its_entries_of_the_store() -> None:
    opened, made = store(), model("alternative")
    pruned = made.prune(2)
    coordinates = opened.selection.locate(pruned.selection)
    assert torch.equal(opened.selection.base_global_indices()[coordinates], pruned.selection.base_global_indices())
    encoded = encode_store(pruned, opened)["encoded"]
    expected = pruned.encode(opened.rows("alternative", torch.arange(12))[:, coordinates])[:, 0].detach()
    assert encoded.iloc[:12].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_metrics_of_every_split_with_intervals() -> None:
    opened, made = store(), model("diff")
    table = encode_store(made, opened)
    params = EvaluateEncoder.model_validate({"bootstrap_samples": 200})
    metrics = all_metrics(table, opened, made, params)
    assert list(metrics) == ["train", "validation", "test"]
    for split, found in metrics.items():
        rows = table[(table["split"] == split) & (table["type"] == "training")]
        assert found["correlation"] == pytest.approx(np.corrcoef(rows["encoded"], rows["label"])[0, 1])
        assert found["correlation_low"] <= found["correlation"] <= found["correlation_high"]
        positions = opened.positions(split=split, kind="training")
        target, guess = opened.rows("diff", positions), made(opened.rows("diff", positions)).detach()
        r2 = 1 - float((target - guess).square().sum() / (target - target.mean(0)).square().sum())
        assert found["r2"] == pytest.approx(r2, rel=1e-5)
        assert found["all_data"]["n"] == len(rows) + 2 * (split == "test")
    assert metrics == all_metrics(table, opened, made, params)


def test_accuracy_cuts() -> None:
    frame = pd.DataFrame({"encoded": [0.5, 0.49, -0.5, -0.49, 0.0], "label": [1.0, 1.0, -1.0, -1.0, 1.0]})
    frame = frame.assign(type="training", source_id="A", split="test")
    metrics = encoder_metrics(frame)
    assert metrics["training_only"]["accuracy"] == 0.4
    assert metrics["target_classes_only"]["accuracy"] == 1.0
    assert set(metrics["by_label"]) == {"+1", "-1"}
    assert metrics["by_label"]["-1"]["n"] == 2


# --- intervals


def test_pearson_of_a_constant_is_zero() -> None:
    x = np.arange(5.0)
    assert pearson(x, 3 * x + 1) == pytest.approx(1)
    assert pearson(x, -x) == pytest.approx(-1)
    assert pearson(x, np.ones(5)) == 0


def test_ratio_interval_of_means_covers_the_truth() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = random.normal(1.0, 1.0, size=40)
        value, low, high = ratio_interval(sample, np.ones(40), samples=300, confidence=0.9, seed=trial)
        assert value == pytest.approx(sample.mean())
        covered += low <= 1.0 <= high
    assert 165 <= covered <= 195


def test_ratio_interval_is_of_the_ratio_of_sums() -> None:
    numerators, denominators = np.array([1.0, 0.0, 9.0]), np.array([1.0, 1.0, 18.0])
    value, low, high = ratio_interval(numerators, denominators, samples=500, confidence=0.95, seed=0)
    assert value == 0.5
    assert low < value <= high
    assert (value, low, high) == ratio_interval(numerators, denominators, samples=500, confidence=0.95, seed=0)


def test_bootstrap_interval_agrees_with_the_ratio_interval() -> None:
    values = np.random.default_rng(0).normal(size=30)
    one = bootstrap_interval(lambda at: float(values[at].mean()), 30, samples=2000, confidence=0.8, seed=1)
    _, *other = ratio_interval(values, np.ones(30), samples=2000, confidence=0.8, seed=1)
    assert one == pytest.approx(other, abs=0.03)


# --- the decoder


def decoder_model(base: PreTrainedModel) -> GradiendModel:
    selection = Selection.everything(backbone_parameters(base, ["*.layer.1.*", "*word_embeddings*"]))
    made = GradiendModel(selection, target_classes=("M", "F"), target_scale=0.3)
    made.reset_parameters(0, zero_decoder_bias=False)
    return made


def grid_params(**changes: Any) -> EvaluateDecoder:
    return EvaluateDecoder.model_validate({"lrs": [20.0, 1.0], "bootstrap_samples": 50, "eval_batch_size": 3} | changes)


def neutral_table(texts: list[str] = NEUTRAL_TEXTS, split: str = "test") -> pd.DataFrame:
    return pd.DataFrame({"text": texts, "type": NEUTRAL_DATASET, "split": split})


def test_grid_scores_every_candidate_as_a_rewritten_copy_would_be(
    reference_model: Loaded, reference_folder: Path, reference_rows: pd.DataFrame
) -> None:
    base, tokenizer = reference_model
    made, params = decoder_model(base), grid_params(split="train")
    before = {name: p.clone() for name, p in base.named_parameters()}
    grid = evaluate_grid(made, base, tokenizer, reference_rows, neutral_table(), params)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert list(grid.columns) == list(GRID)
    assert grid["id"].drop_duplicates().tolist() == [BASE_ID, "+1, 20", "+1, 1", "-1, 20", "-1, 1"]
    assert len(grid) == 5 * 4
    rows = reference_rows[reference_rows["split"] == "train"]
    for name, lines in grid.groupby("id"):
        copy, _ = load_masked_lm(reference_folder)
        if name != BASE_ID:
            factor, rate = map(float, str(name).split(", "))
            rewrite(copy, made, learning_rate=rate, feature_factor=factor)
        scorer = ClassScorer.prepare(tokenizer, list(rows["masked"]), {"M": ["he"], "F": ["she"]}, max_length=14)
        expected = scorer.probabilities(copy, 100)
        texts = LanguageModelScorer.prepare(tokenizer, NEUTRAL_TEXTS, mlm_probability=0.15, seed=42, max_length=14)
        correct, masked = texts.correct(copy, 100)
        for line in lines.to_dict("records"):
            own = (rows["factual_class"] == line["dataset_class"]).to_numpy()
            assert line["probability"] == pytest.approx(expected[line["scored_class"]][own].mean(), rel=1e-4)
            assert line["probability_low"] <= line["probability"] <= line["probability_high"]
            assert line["lms"] == pytest.approx(correct.sum() / masked.sum())


def test_grid_caps_rows_and_texts(reference_model: Loaded, reference_rows: pd.DataFrame) -> None:
    base, tokenizer = reference_model
    params = grid_params(split="train", max_size_training_like=2, max_size_neutral=1, lrs=[1.0])
    one, again = (
        evaluate_grid(decoder_model(base), base, tokenizer, reference_rows, neutral_table(), params) for _ in range(2)
    )
    pd.testing.assert_frame_equal(one, again)
    whole = grid_params(split="train", lrs=[1.0])
    other = evaluate_grid(decoder_model(base), base, tokenizer, reference_rows, neutral_table(), whole)
    assert not np.allclose(one["probability"], other["probability"])


def test_grid_needs_neutral_texts(reference_model: Loaded, reference_rows: pd.DataFrame) -> None:
    base, tokenizer = reference_model
    with pytest.raises(GradiendError, match="no neutral text"):
        evaluate_grid(decoder_model(base), base, tokenizer, reference_rows, neutral_table([]), grid_params())


def test_words_of_a_class_are_as_the_data_has_them() -> None:
    rows = pd.DataFrame(
        {"factual_class": ["A", "A", "A", "B", "B", "C"], "factual": ["she", "She", "her", "I", "me", "x"]}
    )
    assert class_words(rows, ("A", "B")) == {"A": ["her", "she"], "B": ["I", "me"]}


def grid(*candidates: tuple[float, float, float, float], base_lms: float = 0.8) -> pd.DataFrame:
    """A grid of (factor, rate, lms, P(M) on F rows); P(F) on M rows is one minus it."""
    lines = []
    for factor, rate, lms, probability in [(np.nan, np.nan, base_lms, 0.1), *candidates]:
        name = BASE_ID if np.isnan(factor) else f"{factor:+g}, {rate:g}"
        shared = {
            "id": name,
            "feature_factor": factor,
            "learning_rate": rate,
            "lms": lms,
            "lms_low": 0.0,
            "lms_high": 1.0,
        }
        for scored, dataset, value in (("M", "F", probability), ("F", "M", 1 - probability), ("M", "M", 0.99)):
            interval = {"probability": value, "probability_low": 0.0, "probability_high": 1.0}
            lines.append(shared | interval | {"dataset_class": dataset, "scored_class": scored})
    return pd.DataFrame(lines)


def choose(table: pd.DataFrame, source: str = "alternative") -> dict[str, Any]:
    made = GradiendModel(store().selection, target_classes=("M", "F"), source=source)  # type: ignore[arg-type]
    return select_candidates(table, made, 0.99)


def test_largest_probability_among_those_that_keep_the_score() -> None:
    found = choose(grid((1, 0.1, 0.8, 0.2), (1, 1.0, 0.792, 0.5), (1, 10.0, 0.79, 0.9), (-1, 1.0, 0.8, 0.3)))
    assert (found["M"]["id"], found["M"]["value"], found["M"]["fallback"]) == ("+1, 1", 0.5, False)
    assert (found["F"]["id"], found["F"]["value"], found["F"]["base_value"]) == ("-1, 1", 0.7, 0.9)


def test_source_decides_the_sign() -> None:
    found = choose(grid((1, 1.0, 0.8, 0.5), (-1, 1.0, 0.8, 0.3)), source="factual")
    assert (found["M"]["id"], found["F"]["id"]) == ("-1, 1", "+1, 1")


def test_fallback_is_the_smallest_rate_and_flagged() -> None:
    found = choose(grid((1, 10.0, 0.1, 0.9), (1, 0.1, 0.2, 0.2), (1, 1.0, 0.3, 0.5), (-1, 1.0, 0.8, 0.3)))
    assert (found["M"]["id"], found["M"]["fallback"]) == ("+1, 0.1", True)  # WEAK-07
    assert found["F"]["fallback"] is False


def test_first_of_equal_candidates_is_kept() -> None:
    found = choose(grid((1, 5.0, 0.8, 0.5), (1, 1.0, 0.8, 0.5), (-1, 1.0, 0.8, 0.3)))
    assert found["M"]["id"] == "+1, 5"


def test_missing_sign_is_said() -> None:
    with pytest.raises(GradiendError, match="none has the sign of -1, which strengthens 'F'"):
        choose(grid((1, 1.0, 0.8, 0.5)))


# --- base-model folders and devices


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_folder_round_trip(kind: str, tmp_path: Path) -> None:
    saved, tokenizer = build(kind)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_masked_lm(tmp_path / name, saved, tokenizer)
    assert {path.name for path in (tmp_path / "one").iterdir()} >= set(MODEL_FILES)
    for name in MODEL_FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    loaded, again = load_masked_lm(tmp_path / "one")
    assert not loaded.training
    assert all(torch.equal(p, dict(loaded.named_parameters())[name]) for name, p in saved.named_parameters())
    assert again("he said")["input_ids"] == tokenizer("he said")["input_ids"]


@pytest.mark.parametrize(("kind", "limit"), [("bert", 24), ("roberta", 24), ("distilbert", 24), ("deberta", 24)])
def test_longest_input_fits_and_one_more_does_not_pass_the_limit(kind: str, limit: int) -> None:
    loaded, tokenizer = build(kind)
    tokenizer.model_max_length = 1000
    assert max_tokens(loaded, tokenizer) == limit  # the tiny RoBERTa has 26 positions, two of them reserved
    loaded(input_ids=torch.full((1, limit), 6))
    tokenizer.model_max_length = 10
    assert max_tokens(loaded, tokenizer) == 10


def test_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GradiendError, match=r"not a masked language model .* It needs config\.json"):
        load_masked_lm(tmp_path)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_folder_is_refused(tmp_path: Path, reference_folder: Path, damage: str) -> None:
    shutil.copytree(reference_folder, tmp_path / "model")
    path = tmp_path / "model" / damage
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(GradiendError, match="not a masked language model"):
        load_masked_lm(tmp_path / "model")


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path, reference_folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):  # transformers would make a tokenizer without words
        shutil.copy(reference_folder / name, tmp_path)
    with pytest.raises(GradiendError, match=r"knows no words\. Is tokenizer\.json missing"):
        load_masked_lm(tmp_path)


def test_weights_without_head_are_refused(tmp_path: Path) -> None:
    saved, tokenizer = build("bert")
    saved.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(GradiendError, match=r"the weights lack cls\.predictions"):
        load_masked_lm(tmp_path)


def test_tokenizer_must_have_a_mask_token_and_fit_the_model(tmp_path: Path) -> None:
    saved, tokenizer = build("bert")
    saved.save_pretrained(tmp_path)
    wordpiece(extra=["more", "words"]).save_pretrained(tmp_path)
    with pytest.raises(GradiendError, match=r"the tokenizer has \d+ entries, the model only"):
        load_masked_lm(tmp_path)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(GradiendError, match="with a mask token"):
        load_masked_lm(tmp_path)


def test_device_is_described_and_made_deterministic() -> None:
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert describe_device(torch.device("cpu")) == torch.backends.cpu.get_cpu_capability()
    use_deterministic_algorithms()
    assert torch.are_deterministic_algorithms_enabled()
