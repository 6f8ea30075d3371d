"""The gradient store: what is written is what is read, however it is cut into shards."""

import shutil
from collections.abc import Callable, Sequence
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
from gradiend_core.gradients.store import INDEX, GradientStore, Quantity, require_space, shard_files, store_bytes
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
    "gradients": {"batch_size": 2},
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


# --- reading: every method against the whole matrices, whatever the shards and the format

N = 11
CUTS = {"one": [30], "three": [0, 13, 17], "many": [1] * 30}
FORMATS = [torch.float32, torch.bfloat16]
QUANTITIES: tuple[Quantity, ...] = ("factual", "alternative", "diff")
POSITIONS = [[], [5], [3, 4, 5, 6], [12, 13, 14], [29, 0, 1, 1, 12, 13, 2], list(range(30)), list(range(29, -1, -1))]


def made(folder: Path, cuts: str = "three", dtype: torch.dtype = torch.float32, n: int = N) -> GradientStore:
    """A store of 30 rows of noise, written by hand and opened."""
    rows = torch.randn(2, 30, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = pd.DataFrame({"type": "training", "row": range(30), "masked": "[MASK]", "factual": "a", "alternative": "b"})
    index["split"] = ["train", "validation"] * 15
    index["factual_class"] = ["A", "B", "C"] * 10
    index["alternative_class"] = ["B", "C", "A"] * 10
    index["transition"] = index["factual_class"] + "->" + index["alternative_class"]
    index["label"], index["n_positions"] = 1.0, [1, 2, 1, 3, 1] * 6
    index.loc[27:, ["factual_class", "alternative_class", "transition", "type"]] = [None, None, None, NEUTRAL_DATASET]
    selection = Selection(("v", "w"), ((n - 3,), (4, 4)), (None, torch.tensor([0, 7, 9])))
    tensors, mapping = selection.to_tensors()
    folder.mkdir(exist_ok=True)
    start = 0
    for shard, count in enumerate(CUTS[cuts]):
        tensor_file, index_file = shard_files(folder, shard)
        stop = start + count
        matrices = {"alternative": rows[0, start:stop], "diff": rows[1, start:stop]}
        metadata = {"mapping": mapping, "shard": shard, "num_shards": len(CUTS[cuts])}
        save_tensors(tensor_file, tensors | matrices, metadata)
        write_table(index_file, index.iloc[start:stop], INDEX)
        start = stop
    return GradientStore.open(folder)


def whole(dtype: torch.dtype = torch.float32, n: int = N) -> dict[Quantity, torch.Tensor]:
    """The rows of `made`, from the same noise."""
    alternative, diff = torch.randn(2, 30, n, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    return {"alternative": alternative, "diff": diff, "factual": alternative + diff}


def test_store_tells_what_it_is(tmp_path: Path) -> None:
    store = made(tmp_path, dtype=torch.bfloat16)
    assert (len(store), store.n, store.dtype) == (30, N, torch.bfloat16)
    assert repr(store) == "GradientStore(30 rows of 11 entries, torch.bfloat16, shards: 3)"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("positions", POSITIONS, ids=len)
def test_rows_are_those_at_the_positions(tmp_path: Path, cuts: str, dtype: torch.dtype, positions: list[int]) -> None:
    store, chosen = made(tmp_path, cuts, dtype), torch.tensor(positions, dtype=torch.int64)
    for quantity, rows in whole(dtype).items():
        found = store.rows(quantity, chosen)
        assert found.dtype == torch.float32
        assert torch.equal(found, rows[chosen])
        assert torch.equal(torch.cat([*store.iterate(quantity, chosen, 4), torch.empty(0, N)]), rows[chosen])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("positions", POSITIONS, ids=len)
def test_rows_at_a_part_of_the_entries(tmp_path: Path, cuts: str, dtype: torch.dtype, positions: list[int]) -> None:
    store, chosen, columns = made(tmp_path, cuts, dtype), torch.tensor(positions, dtype=torch.int64), [0, 3, 8, 10]
    part = store.selection.prune(torch.tensor(columns))
    for quantity, rows in whole(dtype).items():
        assert torch.equal(store.rows(quantity, chosen, part), rows[chosen][:, columns])


def test_large_rows_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradiend_core.gradients.store._CHUNK", 4 * N + 1)
    for dtype in FORMATS:
        for positions in POSITIONS:
            test_rows_are_those_at_the_positions(tmp_path, "three", dtype, positions)
            test_rows_at_a_part_of_the_entries(tmp_path, "three", dtype, positions)
            test_projections_are_inner_products(tmp_path, "three", dtype, positions)


def test_rows_are_the_callers_and_the_mapping_is_not(tmp_path: Path) -> None:
    store = made(tmp_path, "one")
    store.rows("diff", torch.arange(30)).zero_()
    assert torch.equal(store.rows("diff", torch.arange(30)), whole()["diff"])
    store.matrix("diff")[3] = 7
    assert (store.rows("diff", torch.tensor([3])) == 7).all()
    assert torch.equal(GradientStore.open(tmp_path).rows("diff", torch.arange(30)), whole()["diff"])


def test_matrix_is_the_mapped_memory(tmp_path: Path) -> None:
    store = made(tmp_path)
    assert [len(store.matrix("diff", shard)) for shard in range(3)] == CUTS["three"]
    matrix = store.matrix("alternative", 1)
    assert torch.equal(matrix, whole()["alternative"][:13])
    assert matrix.data_ptr() == store.matrix("alternative", 1).data_ptr()
    assert matrix.numpy().__array_interface__["data"][0] == matrix.data_ptr()
    assert matrix.numpy().dtype == np.float32
    half = made(tmp_path / "half", dtype=torch.bfloat16).matrix("diff", 2)
    assert half.view(torch.int16).numpy().__array_interface__["data"][0] == half.data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert any(_covers(line, matrix.data_ptr()) and line.endswith("shard-1.safetensors") for line in maps)


def _covers(line: str, address: int) -> bool:
    start, stop = (int(part, 16) for part in line.split()[0].split("-"))
    return start <= address < stop


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cuts", CUTS)
def test_batch_means_weigh_rows_by_their_positions(tmp_path: Path, cuts: str, dtype: torch.dtype) -> None:
    store = made(tmp_path, cuts, dtype)
    batches = [torch.tensor(batch) for batch in ([4], [0, 1, 2, 3], [29, 13, 12, 1, 1], [20, 21])]
    counts = torch.tensor([1.0, 2, 1, 3, 1] * 6, dtype=torch.float64)
    other = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    for quantity, rows in whole(dtype).items():
        for weights, used in ((None, counts), (other, other), (other.float(), other), (torch.ones(30), counts**0)):
            means = store.batch_means(quantity, batches, weights)
            expected = torch.stack([used[batch] @ rows[batch].double() / used[batch].sum() for batch in batches])
            assert means.dtype == torch.float32
            torch.testing.assert_close(means.double(), expected, rtol=0, atol=1e-6)


def test_batch_means_of_long_rows_and_of_equal_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradiend_core.gradients.store._CACHED", 4)
    batches = torch.randperm(30, generator=torch.Generator().manual_seed(3)).view(6, 5)
    for dtype in FORMATS:
        store, rows = made(tmp_path, "three", dtype), whole(dtype)["factual"]
        means = store.batch_means("factual", batches, torch.ones(30))
        torch.testing.assert_close(means, rows[batches].mean(1), rtol=0, atol=1e-6)
        assert torch.equal(means, store.batch_means("factual", list(batches), torch.ones(30)))
        assert store.batch_means("diff", []).shape == (0, N)


def test_bfloat16_means_are_not_rounded_to_bfloat16(tmp_path: Path) -> None:
    means = made(tmp_path, "one", torch.bfloat16).batch_means("diff", [torch.arange(3)])
    assert not torch.equal(means, means.bfloat16().float())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("positions", [None, *POSITIONS], ids=lambda positions: str(positions and len(positions)))
def test_projections_are_inner_products(
    tmp_path: Path, cuts: str, dtype: torch.dtype, positions: list[int] | None
) -> None:
    store = made(tmp_path, cuts, dtype)
    chosen = None if positions is None else torch.tensor(positions, dtype=torch.int64)
    vectors = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for quantity, rows in whole(dtype).items():
        expected = (rows if chosen is None else rows[chosen]) @ vectors.detach()
        torch.testing.assert_close(store.project(quantity, vectors, chosen), expected, rtol=0, atol=1e-5)
        one = store.project(quantity, vectors[:, 1].double(), chosen)  # of a vector that requires gradients
        torch.testing.assert_close(one, expected[:, 1], rtol=0, atol=1e-5)
        assert not one.requires_grad


def test_positions_by_values(tmp_path: Path) -> None:
    store = made(tmp_path)
    index = store.index
    assert store.positions(transition="A->B").tolist() == list(range(0, 27, 3))
    assert store.positions(factual_class=["A", "C"], split="train").tolist() == [
        row for row in range(27) if row % 3 != 1 and row % 2 == 0
    ]
    kinds = ["training", NEUTRAL_DATASET]
    assert store.positions(alternative_class=["A"], kind=kinds).tolist() == list(range(2, 27, 3))
    assert store.positions(split=["validation", "train"]).tolist() == list(range(30))
    assert store.positions(split="test").tolist() == []  # a split that happens to be empty
    assert store.positions(split=[]).tolist() == []
    assert index["split"].iloc[store.positions(split="validation").numpy()].unique().tolist() == ["validation"]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda store: store.positions(split="dev"), "split 'dev': this store has test, train, validation"),
        (lambda store: store.positions(kind="neutral"), "type 'neutral': this store has neutral_dataset, training"),
        (lambda store: store.positions(transition=["A->B", "A->C"]), r"transition 'A->C'.* A->B, B->C, C->A"),
        (lambda store: store.positions(factual_class="D"), "factual_class 'D': this store has A, B, C"),
        (lambda store: store.positions(alternative_class="D"), "alternative_class 'D': this store has A, B, C"),
        (lambda store: store.rows("fact", torch.arange(2)), "quantity 'fact': there are factual, alternative, diff"),
        (lambda store: store.project("fact", torch.zeros(N)), "quantity 'fact'"),
        (lambda store: store.batch_means("fact", []), "quantity 'fact'"),
        (lambda store: store.rows("diff", torch.tensor([3, 30])), "position 30: this store has rows 0 to 29"),
        (lambda store: store.rows("factual", torch.tensor([-1])), "position -1"),
        (lambda store: store.batch_means("diff", [torch.tensor([0]), torch.tensor([31])]), "position 31"),
        (lambda store: store.project("diff", torch.zeros(N), torch.tensor([40])), "position 40"),
        (lambda store: store.rows("diff", torch.ones(30, dtype=torch.bool)), r"torch.bool .*mask.nonzero\(\)"),
        (lambda store: store.rows("diff", torch.zeros(2, 2, dtype=torch.int64)), r"shape \[2, 2\]"),
        (lambda store: store.project("diff", torch.zeros(N + 1)), r"\[12\]: this store needs \[11\] or \[11, k\]"),
        (lambda store: store.project("diff", torch.zeros(N, 1, 1)), r"\[11, 1, 1\]: this store needs"),
        (lambda store: store.batch_means("diff", [torch.arange(2), torch.arange(0)]), "batch 1: it is empty"),
        (lambda store: store.batch_means("diff", [torch.arange(2)], torch.zeros(30)), "batch 0: .*weights sum to 0"),
        (lambda store: store.batch_means("diff", [torch.arange(2)], torch.ones(2)), r"weights of shape \[2\].*\[30\]"),
        (lambda store: store.matrix("factual"), "stored are alternative and diff"),
        (lambda store: store.matrix("diff", 3), "shard 3: this store has shards 0 to 2"),
        (lambda store: store.matrix("diff", -1), "shard -1"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, ask: Callable[[GradientStore], Any], message: str) -> None:
    with pytest.raises(GradiendError, match=message):
        ask(made(tmp_path))


# --- damage


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


def test_file_that_is_no_shard_is_refused(tmp_path: Path) -> None:
    tensor_file, _ = shard_files(tmp_path, 0)
    save_tensors(tensor_file, {}, {"pins": {}})
    with pytest.raises(GradiendError, match=r"shard-0\.safetensors: damaged: it is not a shard of a gradient store"):
        GradientStore.open(tmp_path)


@pytest.mark.parametrize(
    "matrices",
    [
        {},
        {"diff": torch.zeros(13, N)},
        {"alternative": torch.zeros(13, N)},
        {"alternative": torch.zeros(13, N), "diff": torch.zeros(13, N + 1)},
        {"alternative": torch.zeros(13, N), "diff": torch.zeros(12, N)},
        {"alternative": torch.zeros(13, N - 1), "diff": torch.zeros(13, N - 1)},
    ],
)
def test_shard_without_its_matrices_is_refused(tmp_path: Path, matrices: dict[str, torch.Tensor]) -> None:
    store = made(tmp_path)
    tensor_file, _ = shard_files(tmp_path, 1)
    save_tensors(tensor_file, store.selection.to_tensors()[0] | matrices, read_metadata(tensor_file))
    with pytest.raises(GradiendError, match=r"shard-1\.safetensors: damaged: .*alternative and diff .*\[rows, 11\]"):
        GradientStore.open(tmp_path)


def test_shard_of_another_format_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    made(tmp_path / "half", dtype=torch.bfloat16)
    shutil.copy(shard_files(tmp_path / "half", 2)[0], tmp_path)
    with pytest.raises(GradiendError, match=r"shard-2\.safetensors: damaged: it is not shard 2"):
        GradientStore.open(tmp_path)


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
