"""Training on planted gradients: order of rows, scale, orientation, the best step, and reproducibility."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.config.train import Train
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE, GradiendModel
from gradiend_core.tables import write_table
from gradiend_core.training import loop
from gradiend_core.training.batches import batches
from gradiend_core.training.convergence import failed_conditions
from gradiend_core.training.evaluation import Validation
from gradiend_core.training.loop import RowSet, Trained, build_optimizer, r_squared, train, training_step
from gradiend_core.training.tables import HISTORY

QUICK: dict[str, Any] = {"max_steps": 60, "eval_steps": 20}


def planted(n: int, *, rows: int = 60, scale: float = 1.0, noise: float = 1.0, common: float = 1.0) -> GradientStore:
    """A store whose gradients hold a common part, a class part on every third entry, and noise per row."""
    random = torch.Generator().manual_seed(1000)  # no seed of a model: equal seeds would align it with the data
    shared, direction = torch.randn(2, n, generator=random)
    direction[torch.arange(n) % 3 != 0] = 0
    index = pd.DataFrame({"row": range(2 * rows), "type": TRAINING})
    index["factual_class"] = ["A", "B"] * rows
    index["transition"] = ["A->B", "B->A"] * rows
    index["label"] = [1.0, -1.0] * rows
    index["split"] = np.where(index["row"] < rows, "train", np.where(index["row"] < 1.5 * rows, "validation", "test"))
    neutral = pd.DataFrame({"row": range(6), "type": "neutral_dataset", "label": 0.0, "split": "test"})
    index = pd.concat([index, neutral], ignore_index=True).assign(n_positions=1)
    label = torch.tensor(index["label"].to_numpy(), dtype=torch.float32)[:, None]
    alternative = common * shared - label * direction / 2 + noise * torch.randn(len(index), n, generator=random)
    diff = label * direction + noise * label.abs() * torch.randn(len(index), n, generator=random)
    shard = {"alternative": scale * alternative, "diff": scale * diff}
    metadata = {"target_classes": ["A", "B"], "base_model": {"path": "m"}, "dataset": {"path": "d"}}
    return GradientStore(index, Selection.everything({"w": torch.zeros(n)}), metadata, (shard,))


def encodings(trained: Trained, store: GradientStore, source: str = "alternative") -> torch.Tensor:
    with torch.no_grad():
        return trained.model.encode(store.rows(source, store.positions(kind=TRAINING)))[:, 0]  # type: ignore[arg-type]


def best_line(trained: Trained) -> dict[str, Any]:
    line = trained.history[trained.history["step"] == trained.best_step].iloc[0]
    return {"best_step": trained.best_step, **{str(name): float(value) for name, value in line.items()}}


def converged(trained: Trained) -> bool:
    return not failed_conditions(best_line(trained), SelectSeed.model_validate({}))


# --- the order of rows


def test_every_row_is_used_in_every_pass_and_groups_take_turns() -> None:
    groups = {"a": np.arange(10), "b": np.arange(10, 33)}  # BUG-06: the excess of large groups was never used
    order = list(itertools.islice(batches(groups, 4, seed=0), 60))
    assert all((batch < 10).all() if number % 2 == 0 else (batch >= 10).all() for number, batch in enumerate(order))
    for start, size, in_pass, rows in ((0, 3, 10, groups["a"]), (1, 6, 23, groups["b"])):
        passes = [order[start::2][k : k + size] for k in range(0, 30 - size, size)]
        assert all(sorted(np.concatenate(found)) == rows.tolist() for found in passes)
        assert len(passes[0][-1]) == in_pass % 4 or 4
        assert len({tuple(np.concatenate(found)) for found in passes}) == len(passes)  # shuffled anew each time


def test_order_depends_on_the_seed_and_not_on_the_order_of_groups() -> None:
    def first(groups: dict[str, Any], seed: int) -> list[list[int]]:
        return [batch.tolist() for batch in itertools.islice(batches(groups, 4, seed), 20)]

    groups = {"a": np.arange(10), "b": np.arange(10, 20)}
    assert first(groups, 1) == first(groups, 1) == first(dict(reversed(groups.items())), 1)
    assert first(groups, 1) != first(groups, 2)


def test_batch_means_weigh_rows_by_their_positions() -> None:
    source = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    rows = RowSet(source, -source, np.zeros(5), torch.tensor([1.0, 2.0, 1.0, 4.0, 1.0]))
    means, targets = rows.batch_means([np.array([3, 0, 1]), np.array([2])])
    expected = torch.stack([(4 * source[3] + source[0] + 2 * source[1]) / 7, source[2]])
    torch.testing.assert_close(means, expected)
    torch.testing.assert_close(targets, -means)


@pytest.mark.parametrize("n", [7, 5000])
def test_batch_mean_does_not_depend_on_its_neighbours(n: int) -> None:
    # Else the bytes of a training that continues in the middle would be others.
    random = np.random.default_rng(0)
    source = torch.randn(200, n, generator=torch.Generator().manual_seed(0))
    rows = RowSet(source, -source, np.zeros(200), torch.rand(200, generator=torch.Generator().manual_seed(1)))
    asked = [random.permutation(200)[:size] for size in (32, 32, 7, 32, 1, 32)]
    together = rows.batch_means(asked)[0]
    assert all(torch.equal(rows.batch_means([batch])[0][0], mean) for batch, mean in zip(asked, together, strict=True))


@pytest.mark.parametrize(("source", "sign"), [("factual", 1), ("diff", 1), ("alternative", -1)])
def test_labels_follow_the_source(source: str, sign: float) -> None:
    store = planted(4)
    rows = RowSet.load(store, Train.model_validate({"source": source}), torch.tensor([0, 1, 120]), torch.device("cpu"))
    assert rows.labels.tolist() == [sign, -sign, 0]
    assert torch.equal(rows.target, store.rows("diff", torch.tensor([0, 1, 120])))


# --- scale


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_scale_free_training_does_not_depend_on_the_size_of_gradients(scale: float) -> None:
    params = Train.model_validate(QUICK)
    one, other = planted(300), planted(300, scale=scale)
    expected, found = (encodings(train(store, params, 0), store) for store in (one, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_decoder_is_in_true_units_at_every_scale() -> None:
    params = Train.model_validate(QUICK)
    decoded = []
    for scale in (1.0, 100.0):
        model = train(planted(300, scale=scale), params, 0).model
        decoded.append(model.decode(torch.tensor([[1.0]])).detach() / scale)
    torch.testing.assert_close(decoded[1], decoded[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [100, 20_000])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_one_default_rate_converges_at_every_size(n: int, scale: float) -> None:
    # BUG-05. The class part shrinks relative to the noise as n falls, never the rate.
    params = Train.model_validate({"max_steps": 200})
    for seed in (0, 1):
        trained = train(planted(n, scale=scale), params, seed)
        assert converged(trained), (seed, best_line(trained))
        assert best_line(trained)["r2"] > 0


def test_reference_scaling_does_not_move_at_tiny_gradients() -> None:
    # BUG-05: the element-mean loss of small gradients falls below Adam's epsilon.
    store = planted(20_000, scale=1e-4)
    params = Train.model_validate(
        {"max_steps": 200, "scaling": "reference", "learning_rate": 1e-5, "weight_decay": 0.0}
    )
    trained = train(store, params, 0)
    start = GradiendModel(store.selection, target_classes=("A", "B"))
    start.reset_parameters(0, zero_decoder_bias=False)
    moved = (trained.model.encoder.weight.abs() - start.encoder.weight.abs()).detach().abs().max()
    assert float(moved) < 0.02 / 20_000**0.5  # of the size of an initial weight
    assert not converged(trained)
    assert trained.model.source_scale == trained.model.target_scale == 1.0


def test_scales_are_those_of_the_training_rows() -> None:
    store = planted(50, scale=7.0)
    model = train(store, Train.model_validate({"max_steps": 1}), 0).model
    rows = store.positions(split="train", kind=TRAINING)
    source, target = store.rows("alternative", rows), store.rows("diff", rows)
    assert model.source_scale == pytest.approx(float(source.square().mean(1).sqrt().median()), rel=1e-5)
    assert model.target_scale == pytest.approx(float(target.square().mean().sqrt()), rel=1e-5)


def test_a_few_large_gradients_do_not_hide_the_others() -> None:
    store = planted(300, common=0.0)
    large = store.positions(split="train", kind=TRAINING)[:4]  # two of each class
    store.matrix("alternative")[large] *= 300
    trained = train(store, Train.model_validate({"max_steps": 100, "train_batch_size": 4}), 0)
    assert converged(trained), best_line(trained)


def test_scale_is_that_of_all_rows_where_most_are_zero() -> None:
    store = planted(50)
    rows = store.positions(split="train", kind=TRAINING)
    store.matrix("alternative")[rows[4:]] = 0
    model = train(store, Train.model_validate({"max_steps": 1}), 0).model
    expected = store.rows("alternative", rows).square().mean().sqrt()
    assert model.source_scale == pytest.approx(float(expected), rel=1e-5)


def test_loss_of_both_scalings() -> None:
    store = planted(10)
    rows = store.rows("alternative", torch.arange(3)), store.rows("diff", torch.arange(3))
    for scaling, reduced in (("reference", 1 / 30), ("scale_free", 1 / 3)):
        params = Train.model_validate({"scaling": scaling})
        model = GradiendModel(store.selection, target_classes=("A", "B"), source_scale=2.0, target_scale=4.0)
        model.reset_parameters(0, zero_decoder_bias=False)
        expected = float(((model(rows[0]) - rows[1]) / 4).square().sum().detach()) * reduced
        optimizer = build_optimizer(model, params)
        assert training_step(model, optimizer, *rows, scaling) == pytest.approx(expected, rel=1e-5)
        unit = 1 / 10**0.5 if scaling == "scale_free" else 1.0
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 * unit, 0.01])


@pytest.mark.parametrize(("optim", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_optimizer_takes_every_parameter(optim: str, kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = GradiendModel(Selection.everything({"w": torch.zeros(4)}), target_classes=("A", "B"))
    params = Train.model_validate({"optim": optim, "weight_decay": 0.25, "adam_epsilon": 1e-3, "learning_rate": 0.1})
    optimizer = build_optimizer(model, params)
    weight = model.decoder.weight
    expected = torch.nn.Parameter(weight.detach().clone())
    weight.grad = expected.grad = torch.ones_like(expected)
    for one in (optimizer, kind([expected], lr=0.1, weight_decay=0.25, eps=1e-3)):
        one.step()
    torch.testing.assert_close(weight, expected)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(group["weight_decay"] == 0.25 and group["eps"] == 1e-3 for group in optimizer.param_groups)


# --- orientation and the best step


@pytest.mark.parametrize("source", ["factual", "alternative", "diff"])
def test_first_class_is_positive_for_every_seed_and_the_history_agrees(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, flips, flip = planted(60, noise=0.3, common=0.2), [], GradiendModel.flip

    def counted(model: GradiendModel, latents: list[int] | None = None) -> None:
        flips.append(model)
        flip(model, latents)

    monkeypatch.setattr(GradiendModel, "flip", counted)
    for seed in range(6):
        params = Train.model_validate(QUICK | {"source": source})
        trained = train(store, params, seed)
        rows = RowSet.load(store, params, store.positions(split="validation", kind=TRAINING), torch.device("cpu"))
        neutral = store.rows("factual", store.positions(kind="neutral_dataset"))
        again = loop.evaluate(trained.model, Validation.of(rows), neutral, "scale_free", "reconstruction")
        line = best_line(trained)
        assert line["mean_positive"] > 0 > line["mean_negative"]
        assert line["correlation"] > 0.5
        # BUG-12: every statistic of the history belongs to the oriented model.
        assert again == pytest.approx({name: line[name] for name in again}, abs=1e-6, rel=1e-6)
    assert 0 < len(flips) < 6  # both orientations occurred


def scripted(monkeypatch: pytest.MonkeyPatch, correlations: list[float]) -> None:
    """Make the evaluations of a run return these correlations, with means of the same sign."""
    lines = iter(correlations)

    def evaluate(*_: object) -> dict[str, float]:
        value = next(lines)
        means = {"mean_positive": value, "mean_negative": -value, "mean_neutral": 0.25}
        return {"eval_loss": 1 - abs(value), "correlation": value, "r2": 0.5} | means

    monkeypatch.setattr(loop, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("correlations", "best_step"),
    [
        ([0.1, 0.5, 0.9, 0.7], 4),
        ([0.1, -0.9, 0.8, 0.9], 2),  # the magnitude counts, and the first of equal ones
        ([0.9, 0.5, -0.9, 0.9], 0),  # step 0 takes part
        ([0.1, 0.2, 0.3, -0.4], 6),
    ],
)
def test_best_step_is_the_first_largest_correlation(
    monkeypatch: pytest.MonkeyPatch, correlations: list[float], best_step: int
) -> None:
    scripted(monkeypatch, correlations)
    trained = train(planted(10), Train.model_validate({"max_steps": 6, "eval_steps": 2}), 0)
    assert trained.best_step == best_step
    assert trained.history["step"].tolist() == [0, 2, 4, 6]
    sign = 1 if correlations[best_step // 2] > 0 else -1
    assert trained.history["correlation"].tolist() == [sign * value for value in correlations]
    assert trained.history["mean_negative"].tolist() == [-sign * value for value in correlations]
    assert (trained.history["mean_neutral"] == sign * 0.25).all()
    assert (trained.history["r2"] == 0.5).all()


def test_best_model_is_the_one_of_the_best_step(monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(10)
    scripted(monkeypatch, [0.1, 0.9])
    stopped = train(store, Train.model_validate({"max_steps": 2, "eval_steps": 2}), 0)
    scripted(monkeypatch, [0.1, 0.9, 0.5, 0.6])
    trained = train(store, Train.model_validate({"max_steps": 6, "eval_steps": 2}), 0)
    assert trained.best_step == 2
    assert torch.equal(trained.model.encoder.weight, stopped.model.encoder.weight)


def test_last_step_is_evaluated() -> None:
    trained = train(planted(10), Train.model_validate({"max_steps": 5, "eval_steps": 2}), 0)
    assert trained.history["step"].tolist() == [0, 2, 4, 5]
    assert trained.history["loss"].isna().tolist() == [True, False, False, False]


def test_neutral_rows_are_encoded_from_their_factual_gradient() -> None:
    store = planted(40)
    means = set()
    for source in ("alternative", "diff"):
        trained = train(store, Train.model_validate(QUICK | {"source": source}), 0)
        with torch.no_grad():
            mean = trained.model.encode(store.rows("factual", store.positions(kind="neutral_dataset"))).mean()
        assert best_line(trained)["mean_neutral"] == pytest.approx(float(mean), abs=1e-6)
        means.add(float(mean))
    assert len(means) == 2


# --- reproducibility


def test_training_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    for name in ("one", "two"):
        trained = train(planted(50), Train.model_validate(QUICK), 3)
        trained.model.save_pretrained(tmp_path / name)
        write_table(tmp_path / name / "history.parquet", trained.history, HISTORY)
        torch.manual_seed(2)  # global state must not matter
    for name in (WEIGHTS_FILE, CONFIG_FILE, "history.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_seeds_differ() -> None:
    one, other = (train(planted(50), Train.model_validate(QUICK), seed) for seed in (0, 1))
    assert not torch.equal(one.model.encoder.weight, other.model.encoder.weight)


def test_r_squared_of_the_mean_is_zero_and_of_the_target_is_one() -> None:
    target = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert r_squared(target, target) == 1
    assert r_squared(target, target.mean(0).expand(7, 3)) == pytest.approx(0, abs=1e-6)
    assert r_squared(target, target + 2) < 0
