"""The gradient store: what is written is what is read, however it is cut into shards."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from gradiend_core.data.tables import NEUTRAL, NEUTRAL_DATASET, NEUTRAL_FILE, TRAINING, TRAINING_FILE
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.objectives import encode
from gradiend_core.gradients.pins import pin, pinned_folder
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.store import INDEX, GradientStore, require_space, shard_files, store_bytes
from gradiend_core.gradients.tasks import store_index
from gradiend_core.lm.folder import load_masked_lm
from gradiend_core.tables import read_table, write_table
from gradiend_core.tensors import load_tensors, read_metadata, save_tensors
from pipeline import cache_gradients, pre_prune
from tests.unit.tiny import exact_rows, relative_error

PARAMS = {
    "one": [0],
    "three": [0, 1, 2],
    "many": list(range(12)),
    "pre_prune": {"topk": 0.1, "n_samples": 6},
    "rms": {"topk": 0.1, "source": "diff", "statistic": "mean"},
    "keep_all": {"topk": None},
    "count": {"topk": 7, "params": ["*.query.weight"]},
    "typo": {"params": ["bert.embeddings.word_embedding.weight"]},
    "gradients": {"batch_size": 4},
    "half": {"batch_size": 4, "dtype": "bfloat16"},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_folder: Path, reference_rows: pd.DataFrame) -> Path:
    """A working folder with params.yaml, the reference model and a dataset of its rows and five neutral rows."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS))
    shutil.copytree(reference_folder, "model")
    Path("dataset").mkdir()
    write_table(Path("dataset") / TRAINING_FILE, reference_rows, TRAINING)
    texts = ["the king slept", "the queen slept", "my friend sang", "my sister sang", "the bread was cold"]
    neutral = pd.DataFrame({"text": texts, "row": range(5), "type": NEUTRAL_DATASET, "split": "test"})
    neutral["factual"] = neutral["text"].str.split().str[1]
    neutral["masked"] = [text.replace(word, "[MASK]") for text, word in neutral[["text", "factual"]].to_numpy()]
    write_table(Path("dataset") / NEUTRAL_FILE, neutral, NEUTRAL)
    return tmp_path


def prune(
    section: str = "pre_prune", output: str = "selection.safetensors", classes: Sequence[str] = ("M", "F")
) -> Path:
    arguments = ["--params", section, "--manifest", "manifests/pre_prune.json", "--output", output]
    pre_prune.main([*arguments, "--base-model", "model", "--dataset", "dataset", "--target-classes", *classes])
    return Path(output)


def collect(shards: str, folder: str, section: str = "gradients", selection: str = "selection.safetensors") -> Path:
    for shard in PARAMS[shards]:
        manifest = f"manifests/{folder}-{shard}.json"
        arguments = ["--params", section, "--shards", shards, "--shard", str(shard), "--manifest", manifest]
        cache_gradients.main([*arguments, "--selection", selection, "--output", folder])
    return Path(folder)


def all_rows(store: GradientStore) -> torch.Tensor:
    positions = torch.arange(len(store.index))
    return torch.stack([store.rows(quantity, positions) for quantity in ("alternative", "diff", "factual")])


def test_stage_stores_the_rows_of_every_example(run: Path) -> None:
    prune()
    store = GradientStore.open(collect("one", "store"))
    model, tokenizer = load_masked_lm(run / "model")
    index = store.index
    assert list(index.columns) == list(INDEX)
    assert index["type"].tolist() == ["training"] * 20 + [NEUTRAL_DATASET] * 5
    assert index["label"].tolist() == ([1] * 8 + [-1] * 8 + [1, -1] * 2) + [0] * 5
    assert (index["n_positions"] == 1).all()
    assert store.metadata["target_classes"] == ["M", "F"]
    for quantity in ("factual", "alternative"):
        examples = encode(tokenizer, index["masked"], index[quantity], max_length=14)
        rows = store.rows(quantity, torch.arange(25))
        assert relative_error(rows, exact_rows(model, store.selection, examples)) <= 5e-6
    assert not store.rows("diff", torch.arange(20, 25)).any()  # neutral rows have no alternative


def test_number_of_shards_does_not_change_a_bit(run: Path) -> None:
    prune()
    one, three, many = (GradientStore.open(collect(shards, shards)) for shards in ("one", "three", "many"))
    assert len(many._shards) == 12  # more shards than batches: some are empty
    for other in (three, many):
        assert all_rows(one).numpy().tobytes() == all_rows(other).numpy().tobytes()
        pd.testing.assert_frame_equal(one.index, other.index)
        assert torch.equal(one.selection.base_global_indices(), other.selection.base_global_indices())
    assert [len(shard["diff"]) for shard in three._shards] == [8, 8, 9]


def test_stages_write_the_same_bytes_again(run: Path) -> None:
    first = (prune().read_bytes(), [path.read_bytes() for path in sorted(collect("three", "store").iterdir())])
    again = (prune().read_bytes(), [path.read_bytes() for path in sorted(collect("three", "store").iterdir())])
    assert first == again
    assert len(first[1]) == 6
    assert not list(run.rglob(".partial-*"))


def test_rows_are_read_by_position_across_shards(run: Path) -> None:
    prune()
    store = GradientStore.open(collect("three", "store"))
    whole = all_rows(store)
    positions = torch.tensor([24, 0, 8, 7, 8, 15])
    for row, quantity in enumerate(("alternative", "diff", "factual")):
        assert torch.equal(store.rows(quantity, positions), whole[row, positions])  # type: ignore[arg-type]
    torch.testing.assert_close(whole[2], whole[0] + whole[1], rtol=0, atol=0)


def test_positions_by_split_and_type(run: Path) -> None:
    prune()
    store = GradientStore.open(collect("three", "store"))
    assert store.positions().tolist() == list(range(25))
    assert store.positions(split="train").tolist() == list(range(16))
    assert store.positions(split="test", kind="training").tolist() == [18, 19]
    assert store.positions(kind=NEUTRAL_DATASET).tolist() == [20, 21, 22, 23, 24]


def test_bfloat16_halves_the_store(run: Path) -> None:
    prune()
    full, half = GradientStore.open(collect("one", "full")), GradientStore.open(collect("one", "half", "half"))
    assert half._shards[0]["diff"].dtype == torch.bfloat16
    rows = half.rows("alternative", torch.arange(25))
    assert rows.dtype == torch.float32
    assert relative_error(rows, full.rows("alternative", torch.arange(25))) < 3e-3
    assert store_bytes(25, full.n, torch.bfloat16) * 2 == store_bytes(25, full.n, torch.float32) == 25 * full.n * 8


@pytest.mark.parametrize(("section", "n"), [("pre_prune", 458), ("keep_all", 4576), ("count", 7), ("rms", 458)])
def test_pre_prune_keeps_as_many_as_asked(run: Path, section: str, n: int) -> None:
    path = prune(section)
    metadata = read_metadata(path)
    selection = Selection.from_tensors(load_tensors(path), metadata["mapping"])
    assert selection.n == n
    assert metadata["pins"]["base_model"] == pin(Path("model"), sorted(metadata["pins"]["base_model"]["files"]))
    if section == "count":
        assert all(name.endswith("query.weight") for name in selection.names)


def test_pre_prune_does_not_depend_on_the_order_of_classes_or_on_other_rows(run: Path) -> None:
    forward = load_tensors(prune())
    table = read_table(Path("dataset") / TRAINING_FILE, TRAINING)
    third = table.assign(factual_class="N", transition="N->F", masked="[MASK] slept .")
    write_table(Path("dataset") / TRAINING_FILE, pd.concat([table, third], ignore_index=True), TRAINING)
    backward = load_tensors(prune(classes=("F", "M")))
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_unknown_pattern_leaves_no_file(run: Path) -> None:
    with pytest.raises(GradiendError, match=r"did you mean 'bert\.embeddings\.word_embeddings\.weight'"):
        prune("typo")
    assert not Path("selection.safetensors").exists()


@pytest.mark.parametrize("changed", ["model/config.json", "dataset/training.parquet", "dataset/neutral.parquet"])
def test_changed_input_is_refused(run: Path, changed: str) -> None:
    prune()
    with Path(changed).open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(GradiendError, match=rf"{changed}: not the file that the selection was made for. Run pre_prune"):
        collect("one", "store")
    assert not Path("store").exists()


def test_pin_is_satisfied_by_the_pinned_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    pinned = pin(tmp_path, ["a"])
    (tmp_path / "b").write_text("another file does not matter")
    assert pinned_folder(pinned) == tmp_path
    (tmp_path / "a").unlink()
    with pytest.raises(GradiendError, match="cannot be read"):
        pinned_folder(pinned)


def test_damaged_or_missing_shard_is_named(run: Path) -> None:
    prune()
    folder = collect("three", "store")
    tensors, index = shard_files(folder, 1)
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-8])
    with pytest.raises(GradiendError, match=r"shard-1\.safetensors: damaged"):
        GradientStore.open(folder)
    tensors.unlink()
    with pytest.raises(GradiendError, match=r"shard-1\.safetensors: no such file"):
        GradientStore.open(folder)
    tensors.write_bytes(content)
    index.unlink()
    with pytest.raises(GradiendError, match=r"shard-1\.parquet: no such file"):
        GradientStore.open(folder)


def test_index_of_another_length_is_refused(run: Path) -> None:
    prune()
    folder = collect("three", "store")
    _, index = shard_files(folder, 2)
    write_table(index, read_table(index, INDEX).iloc[:-1], INDEX)
    with pytest.raises(GradiendError, match=r"shard-2\.parquet: damaged: 8 lines for 9 rows"):
        GradientStore.open(folder)


def test_foreign_shard_is_refused(run: Path) -> None:
    prune()
    folder = collect("three", "store")
    prune("rms", "other.safetensors")  # as many entries, of the same tensors, but not the same ones
    foreign = collect("three", "foreign", selection="other.safetensors")
    assert read_metadata(shard_files(folder, 1)[0]) == read_metadata(shard_files(foreign, 1)[0])
    for source, name in ((foreign, 1), (folder, 2)):  # of another selection; the right store's, in the wrong place
        shutil.copytree(folder, "mixed", dirs_exist_ok=True)
        for file, target in zip(shard_files(source, name), shard_files(Path("mixed"), 1), strict=True):
            shutil.copy(file, target)
        with pytest.raises(GradiendError, match=r"shard-1\.safetensors: damaged: it is not shard 1"):
            GradientStore.open("mixed")


def test_space_is_required_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return Usage(1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "not" / "yet", 980)
    assert asked == [tmp_path]
    with pytest.raises(GradiendError, match=r"needs 0\.00 GB, the disk has 0\.00 GB free.*bfloat16"):
        require_space(tmp_path, 981)


def test_index_holds_the_target_pair_and_neutral_rows(reference_rows: pd.DataFrame) -> None:
    third = reference_rows.assign(factual_class="N", transition="N->F")
    neutral = pd.DataFrame({"row": [0], "type": ["x"], "masked": ["[MASK]"], "split": ["test"], "factual": ["w"]})
    index = store_index(pd.concat([third, reference_rows]), neutral, ["F", "M"])
    assert len(index) == 21
    assert index["label"].tolist() == [-1] * 8 + [1] * 8 + [-1, 1] * 2 + [0]
    assert index.iloc[-1][["factual", "alternative"]].tolist() == ["w", "w"]
    assert index.iloc[-1][["factual_class", "transition"]].isna().all()


def test_tensor_files_are_byte_stable(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3), "a": torch.from_numpy(np.ones((2, 3)).T)}
    save_tensors(tmp_path / "1", tensors, {"y": 1, "x": [2]})
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), {"x": [2], "y": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
