"""Post-pruning: what is kept, and what the scores before and after say."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gradiend_core.errors import GradiendError
from gradiend_core.evaluation.pruning import pruning_scores
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.store import INDEX, GradientStore, shard_files
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.tables import write_table
from gradiend_core.tensors import save_tensors
from pipeline.post_prune import main

N = 9
PARTS = ["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"]


def selection() -> Selection:
    return Selection.everything({"w": torch.zeros(12)}).prune(torch.tensor([0, 1, 3, 4, 6, 7, 8, 10, 11]))


def store(folder: Path) -> GradientStore:
    """16 rows of noise around the label in the first entries; half of them are validation rows."""
    label = np.array([1.0, -1.0] * 8)
    index = pd.DataFrame({"type": "training", "row": range(16), "label": label, "n_positions": 1, "masked": "[MASK]"})
    index["split"] = ["train"] * 8 + ["validation"] * 8
    index["factual_class"], index["alternative_class"] = np.where(label > 0, ["A"], "B"), np.where(label > 0, "B", "A")
    index["factual"], index["alternative"] = index["factual_class"], index["alternative_class"]
    index["transition"] = index["factual_class"] + "->" + index["alternative_class"]
    strength = torch.linspace(1.5, 0, N)
    noise = torch.randn(2, 16, N, generator=torch.Generator().manual_seed(2))
    rows = torch.tensor(label).float()[:, None] * strength + 0.5 * noise
    tensors, mapping = selection().to_tensors()
    folder.mkdir()
    tensor_file, index_file = shard_files(folder, 0)
    matrices = {"alternative": -rows[0], "diff": rows[1]}
    save_tensors(tensor_file, tensors | matrices, {"mapping": mapping, "shard": 0, "num_shards": 1})
    write_table(index_file, index, INDEX)
    return GradientStore.open(folder)


def model(**changes: Any) -> GradiendModel:
    settings: dict[str, Any] = {"target_classes": ("A", "B"), "source_scale": 0.7, "target_scale": 1.3}
    made = GradiendModel(selection(), **settings | changes)
    made.reset_parameters(6, zero_decoder_bias=False)
    return made


def masked(full: GradiendModel, kept: torch.Tensor) -> GradiendModel:
    """The full model with the weights of the other entries at 0."""
    zeroed = full._like(full.selection)
    mask = torch.zeros(N).index_fill(0, kept, 1)
    shaped = {"encoder.weight": mask, "decoder.weight": mask[:, None], "decoder.bias": mask}
    zeroed.load_state_dict({name: tensor * shaped.get(name, 1) for name, tensor in full.state_dict().items()})
    return zeroed


def expected_scores(made: GradiendModel, opened: GradientStore, columns: list[int]) -> tuple[float, float]:
    """Correlation of a model's encodings, and R² over some of its entries, by the definitions in double precision."""
    rows = torch.arange(8, 16)
    source, target = (opened.rows(quantity, rows) for quantity in (made.source, made.target))
    sign = -1 if made.source == "alternative" else 1
    encoded = made.encode(source).detach()[:, 0].double().numpy()
    correlation = np.corrcoef(encoded, sign * opened.index["label"].to_numpy()[8:])[0, 1]
    given, decoded = target[:, columns].double().numpy(), made(source).detach()[:, columns].double().numpy()
    return float(correlation), float(1 - ((given - decoded) ** 2).sum() / ((given - given.mean(0)) ** 2).sum())


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("source", ["alternative", "factual", "diff"])
@pytest.mark.parametrize("topk", [1, 4, 9])
def test_scores_of_the_pruned_are_those_of_the_masked_full_model(
    topk: int, source: str, latent_dim: int, tmp_path: Path
) -> None:
    opened, full = store(tmp_path / "store"), model(source=source, latent_dim=latent_dim)
    pruned = full.prune(topk)
    scores = pruning_scores(full, pruned, opened)
    assert (scores["entries_before"], scores["entries_after"]) == (N, topk)
    everything = list(range(N))
    before = expected_scores(full, opened, everything)
    assert (scores["correlation_before"], scores["r2_before"]) == pytest.approx(before, rel=1e-5)
    kept = full.selection.locate(pruned.selection)
    zeroed = masked(full, kept)
    after = expected_scores(zeroed, opened, everything)
    assert (scores["correlation_after"], scores["r2_after_all_entries"]) == pytest.approx(after, rel=1e-5)
    assert scores["r2_after"] == pytest.approx(expected_scores(zeroed, opened, kept.tolist())[1], rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    part=st.sampled_from(PARTS),
    topk=st.none() | st.integers(1, 2 * N) | st.floats(0.01, 1),
    quantile=st.none() | st.floats(0, 1),
    allowed=st.none() | st.lists(st.booleans(), min_size=N, max_size=N).filter(any),
    latent_dim=st.integers(1, 3),
    bias=st.booleans(),
)
def test_pruned_model_is_the_full_one_with_the_other_entries_at_zero(
    part: Any, topk: Any, quantile: float | None, allowed: list[bool] | None, latent_dim: int, bias: bool
) -> None:
    full = model(latent_dim=latent_dim, bias_decoder=bias)
    mask = torch.tensor(allowed or [True] * N)
    importance = full.importance(part)
    threshold = None if quantile is None else float(importance[mask].quantile(quantile, interpolation="lower"))
    left = [int(i) for i in importance.argsort(descending=True, stable=True) if mask[i]]
    left = [i for i in left if threshold is None or importance[i] >= threshold]
    count = len(left) if topk is None else topk if isinstance(topk, int) else int(np.ceil(topk * len(left)))
    pruned = full.prune(topk, part, threshold=threshold, mask=mask if allowed else None)
    kept = full.selection.locate(pruned.selection)
    assert kept.tolist() == sorted(left[:count])
    gradients = torch.randn(5, N, generator=torch.Generator().manual_seed(3))
    zeroed = masked(full, kept)
    encoded = zeroed.encode(gradients)
    torch.testing.assert_close(pruned.encode(gradients[:, kept]), encoded)
    torch.testing.assert_close(pruned.decode(encoded), zeroed.decode(encoded)[:, kept])
    dropped = [i for i in range(N) if i not in kept]
    assert not zeroed.decode(encoded)[:, dropped].any()


def test_pruning_nothing_costs_nothing(tmp_path: Path) -> None:
    full = model()
    scores = pruning_scores(full, full.prune(), store(tmp_path / "store"))
    assert scores["correlation_after"] == scores["correlation_before"] != 0
    assert scores["r2_after"] == scores["r2_before"] == scores["r2_after_all_entries"]


def test_r2_of_targets_that_do_not_vary_is_left_out(tmp_path: Path) -> None:
    opened = store(tmp_path / "store")
    opened._shards[0]["diff"].zero_()
    scores = pruning_scores(model(), model().prune(3), opened)
    assert not [name for name in scores if name.startswith("r2")]


def run_stage(section: str) -> dict[str, Any]:
    """Run the stage in the working folder on seed 1 of a report; its metrics."""
    Path("params.yaml").write_text(f"runs: {{one: {{post_prune: {section}}}}}\n")
    if not Path("store").exists():
        store(Path("store"))
        model().save_pretrained("seeds/1")
        Path("report.json").write_text(json.dumps({"best_seed": 1}))
    arguments = ["--params", "runs.one.post_prune", "--seed-report", "report.json", "--seed-runs", "seeds"]
    main([*arguments, "--gradients", "store", "--output", "model", "--manifest", "manifest.json"])
    metrics: dict[str, Any] = json.loads(Path("model/metrics.json").read_text())
    return metrics


@pytest.mark.parametrize("part", PARTS)
def test_stage_prunes_by_threshold_then_topk(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    importance = model().importance(part)
    threshold = float(importance.sort().values[3]) * 0.9999
    for section, options in (
        ("{}", {}),
        (f"{{part: {part}, topk: 2}}", {"topk": 2}),
        (f"{{part: {part}, threshold: {threshold!r}}}", {"threshold": threshold}),
        (f"{{part: {part}, threshold: {threshold!r}, topk: 0.5}}", {"threshold": threshold, "topk": 0.5}),
    ):
        metrics = run_stage(section)
        expected = model().prune(part=part, **options)
        found = GradiendModel.from_pretrained("model")
        assert torch.equal(found.selection.base_global_indices(), expected.selection.base_global_indices())
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
        assert metrics["entries_after"] == {0: 9, 1: 2 if "topk" in options else 6, 2: 3}[len(options)]
        assert metrics == pruning_scores(model(), expected, GradientStore.open("store"))


def test_without_pruning_the_files_are_those_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_stage("{}")
    for name in ("model.safetensors", "config.json"):
        assert Path("model", name).read_bytes() == Path("seeds/1", name).read_bytes()
    manifest = json.loads(Path("manifest.json").read_text())
    assert {"seeds/1/model.safetensors", "store/shard-0.parquet"} <= manifest["inputs"].keys()
    assert "model/metrics.json" in manifest["outputs"]


def test_threshold_that_no_entry_reaches_names_the_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GradiendError, match=r"^runs\.one\.post_prune: threshold: no entry's decoder-weight"):
        run_stage("{threshold: 100.0}")
    assert not Path("model/model.safetensors").exists()


def write_mask(**tensors: torch.Tensor) -> str:
    """Write own.safetensors; its SHA-256."""
    save_file(tensors, "own.safetensors")
    return hashlib.sha256(Path("own.safetensors").read_bytes()).hexdigest()


def test_stage_prunes_by_a_mask_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = torch.tensor([True, False, True, True, False, True, False, False, True])
    section = "{topk: 3, mask: {path: own.safetensors, sha256: %s}}"
    first = write_mask(mask=mask)
    run_stage(section % first)
    found, expected = GradiendModel.from_pretrained("model"), model().prune(3, mask=mask)
    assert torch.equal(found.selection.base_global_indices(), expected.selection.base_global_indices())
    assert expected.selection.n == 3
    assert not torch.equal(expected.selection.base_global_indices(), model().prune(3).selection.base_global_indices())
    manifest = json.loads(Path("manifest.json").read_text())
    assert manifest["inputs"]["own.safetensors"] == manifest["params"]["mask"]["sha256"] == first
    second = write_mask(mask=~mask)
    with pytest.raises(GradiendError, match=f"^runs.one.post_prune: mask: own.safetensors has the SHA-256 {second}"):
        run_stage(section % first)
    run_stage(section % second)
    assert GradiendModel.from_pretrained("model").selection.n == 3


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {"other": torch.ones(N, dtype=torch.bool)},
            "mask: own.safetensors holds other, but no tensor of the name mask",
        ),
        ({"mask": torch.ones(N - 1, dtype=torch.bool)}, r"mask: must be a bool tensor \[9\]"),
    ],
)
def test_file_without_a_usable_mask_is_refused(
    tensors: dict[str, torch.Tensor], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GradiendError, match=f"^runs.one.post_prune: {says}"):
        run_stage(f"{{mask: {{path: own.safetensors, sha256: {write_mask(**tensors)}}}}}")
    assert not Path("model").exists()
