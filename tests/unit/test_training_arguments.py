"""What the arguments of training do: steps and epochs, evaluations, the kept model, row caps, logs, and precision."""

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gradiend_core.config.section import validate
from gradiend_core.config.train import Train
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.training import loop
from gradiend_core.training.evaluation import Validation, evaluate, r_squared
from gradiend_core.training.loop import RowSet, Trained
from gradiend_core.training.step import losses
from gradiend_core.training.tables import HISTORY
from tests.unit.test_training import QUICK, best_line, planted, scripted

CPU = torch.device("cpu")


def run(store: GradientStore | None = None, seed: int = 0, **settings: Any) -> Trained:
    return loop.train(store or planted(20), validate(Train, settings, "train"), seed)


def evaluated(**settings: Any) -> list[int]:
    return [int(step) for step in run(planted(4), **settings).history["step"]]


def weights(trained: Trained) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trained.model.parameters()])


# --- steps and epochs: `planted` has 30 training rows per transition, so 8 batches of 4 and 16 in turn


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_train_epochs": 1.0}, 16),
        ({"num_train_epochs": 2.5}, 40),
        ({"num_train_epochs": 0.01}, 1),
        ({"num_train_epochs": 1.0, "gradiend_batch_size": 3}, 6),
        ({"num_train_epochs": 1.0, "gradiend_batch_size": 2, "gradient_accumulation_steps": 2}, 4),
        ({"num_train_epochs": 1.0, "max_steps": 3}, 3),
        ({"num_train_epochs": 1.0, "max_steps": -1}, 16),
        ({"num_train_epochs": -1.0, "max_steps": 5}, 5),
        ({"num_train_epochs": 1.0, "train_max_size": 6}, 4),
        ({}, 500),
    ],
)
def test_length_of_training(settings: dict[str, Any], steps: int) -> None:
    assert evaluated(train_batch_size=4, eval_strategy="no", **settings) == [steps]


def test_an_epoch_uses_every_row_of_the_largest_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(4)
    split = store.index["split"].to_numpy().copy()
    split[20:60:2] = "test"  # 10 rows of A->B are left for training, and all 30 of B->A
    uneven = GradientStore(store.index.assign(split=split), store.selection, store.metadata, store._shards)
    used: list[int] = []
    original = RowSet.batch_means

    def batch_means(self: RowSet, batches: Any) -> Any:
        used.extend(np.concatenate(batches).tolist())
        return original(self, batches)

    monkeypatch.setattr(RowSet, "batch_means", batch_means)
    run(uneven, num_train_epochs=1.0, train_batch_size=4)
    counts = np.bincount(used)
    assert len(counts) == 40
    assert sorted(counts)[:30] == [1] * 30
    assert sum(sorted(counts)[30:]) == 28  # three passes of three batches, less one


# --- evaluations


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_steps": 4}, [0, 4, 8, 10]),
        ({"eval_steps": 4, "eval_delay": 5}, [8, 10]),
        ({"eval_steps": 4, "eval_delay": 8}, [8, 10]),
        ({"eval_strategy": "no"}, [10]),
        ({"eval_strategy": "no", "eval_delay": 3}, [10]),
        ({"eval_strategy": "epoch", "train_batch_size": 15}, [0, 4, 8, 10]),
        ({"eval_strategy": "epoch", "train_batch_size": 15, "eval_delay": 2}, [8, 10]),
    ],
)
def test_evaluated_steps(settings: dict[str, Any], steps: list[int]) -> None:
    assert evaluated(max_steps=10, **settings) == steps


@pytest.mark.parametrize("activation_decoder", ["id", "tanh"])
@pytest.mark.parametrize("bias_decoder", [True, False])
@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("scaling", ["scale_free", "reference"])
def test_expanded_error_is_the_plain_one(
    activation_decoder: str, bias_decoder: bool, latent_dim: int, scaling: str
) -> None:
    store = planted(30)
    params = validate(Train, {"scaling": scaling}, "train")
    rows = RowSet.load(store, params, store.positions(split="validation", kind=TRAINING), CPU)
    model = GradiendModel(
        store.selection,
        target_classes=("A", "B"),
        latent_dim=latent_dim,
        activation_decoder=activation_decoder,
        bias_decoder=bias_decoder,
        source_scale=2.0,
        target_scale=1.0 if scaling == "reference" else 3.0,
    )
    model.reset_parameters(0, zero_decoder_bias=False)
    line = evaluate(model, Validation.of(rows), rows.source[:0], scaling, "reconstruction")
    with torch.no_grad():
        plain = losses(model, rows.source, rows.target, scaling, "reconstruction", None).mean()
        encoded = model.encode(rows.source)[:, 0].double().numpy()
        assert line["r2"] == pytest.approx(r_squared(rows.target, model(rows.source)), abs=1e-6)
    assert line["eval_loss"] == pytest.approx(float(plain), rel=1e-5)
    for name, label in (("positive", 1), ("negative", -1)):
        assert line[f"mean_{name}"] == pytest.approx(encoded[rows.labels == label].mean())
        assert line[f"std_{name}"] == pytest.approx(encoded[rows.labels == label].std())
    assert np.isnan(line["mean_neutral"])


def test_rate_of_the_last_step_is_in_the_history() -> None:
    trained = run(lr_scheduler_type="linear", max_steps=10, eval_steps=5, learning_rate=0.1)
    assert trained.history["learning_rate"].tolist() == pytest.approx([np.nan, 0.06, 0.01], nan_ok=True)


# --- which model is kept


@pytest.mark.parametrize(
    ("settings", "best_step"),
    [
        ({}, 4),
        ({"metric_for_best_model": "loss"}, 4),  # scripted as 1 - |correlation|
        ({"greater_is_better": False}, 2),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, 2),
        ({"metric_for_best_model": "r2"}, 0),  # the same everywhere: the first
        ({"load_best_model_at_end": False}, 6),
    ],
)
def test_metric_of_the_best_step(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], best_step: int) -> None:
    scripted(monkeypatch, [0.5, 0.1, -0.9, 0.2])
    trained = run(max_steps=6, eval_steps=2, **settings)
    assert trained.best_step == best_step
    assert (trained.history["correlation"] > 0).tolist()[best_step // 2]


def test_last_model_is_the_one_of_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.9, 0.5, 0.6] * 2)
    best, last = (run(max_steps=6, eval_steps=2, load_best_model_at_end=kept) for kept in (True, False))
    monkeypatch.undo()
    expected = run(max_steps=6, eval_strategy="no")
    assert torch.equal(weights(last).abs(), weights(expected).abs())
    assert not torch.equal(weights(best).abs(), weights(expected).abs())


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_every_latent_is_turned_to_the_first_class(latent_dim: int) -> None:
    store = planted(60, noise=0.3, common=0.2)
    for seed in range(4):
        trained = run(store, seed, latent_dim=latent_dim, **QUICK)
        positions = store.positions(split="validation", kind=TRAINING)
        labels = -store.index["label"].to_numpy()[positions.numpy()]
        with torch.no_grad():
            encoded = trained.model.encode(store.rows("alternative", positions)).numpy()
        assert encoded.shape[1] == latent_dim
        assert (encoded[labels > 0].mean(0) > encoded[labels < 0].mean(0)).all()
        assert best_line(trained)["mean_positive"] == pytest.approx(encoded[labels > 0, 0].mean(), abs=1e-6)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu"])
def test_encoders_that_cannot_be_turned_train_all_the_same(activation: str) -> None:
    store = planted(60, noise=0.3, common=0.2)
    trained = run(store, activation_encoder=activation, **QUICK)
    assert trained.model.activation_encoder == activation
    assert best_line(trained)["eval_loss"] < trained.history["eval_loss"].iloc[0]


@pytest.mark.parametrize("seed", range(4))
def test_interval_of_the_correlation_is_that_of_the_kept_model(seed: int) -> None:
    store = planted(60, common=0.2)
    trained = run(store, seed, **QUICK)
    positions = store.positions(split="validation", kind=TRAINING)
    with torch.no_grad():
        encoded = trained.model.encode(store.rows("alternative", positions))[:, 0].double().numpy()
    labels = -store.index["label"].to_numpy()[positions.numpy()]
    random = np.random.default_rng(seed)
    drawn = [random.integers(len(labels), size=len(labels)) for _ in range(1000)]
    expected = np.quantile([np.corrcoef(encoded[rows], labels[rows])[0, 1] for rows in drawn], [0.025, 0.975])
    assert trained.correlation_interval == pytest.approx(tuple(expected), abs=1e-6)
    low, high = trained.correlation_interval or (0, 0)
    assert low < best_line(trained)["correlation"] < high
    assert run(store, seed, **QUICK).correlation_interval == (low, high)


def test_correlation_of_constant_encodings_has_no_interval() -> None:
    trained = run(planted(10, scale=0.0), max_steps=1)
    assert best_line(trained)["correlation"] == 0
    assert trained.correlation_interval is None


def test_runners_up_are_the_next_best_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    correlations = [0.3, -0.9, 0.8, 0.2, -0.8]
    scripted(monkeypatch, correlations * 2)
    one, three = (run(max_steps=8, eval_steps=2, preserve_n_best=count) for count in (1, 3))
    assert one.runners_up == {}
    assert torch.equal(weights(one), weights(three))
    assert list(three.runners_up) == [4, 8]  # of equal ones the first
    for step, kept in three.runners_up.items():
        scripted(monkeypatch, correlations[step // 2 :])
        last = run(max_steps=step, eval_strategy="no")
        assert all(torch.equal(kept[name], value) for name, value in last.model.state_dict().items())


# --- rows


def test_row_cap_is_per_transition_and_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = planted(6), []
    original = RowSet.load

    def load(store: GradientStore, params: Train, positions: torch.Tensor, device: torch.device) -> RowSet:
        asked.append(positions.tolist())
        return original(store, params, positions, device)

    monkeypatch.setattr(RowSet, "load", load)
    for seed in (0, 0, 1):
        run(store, seed, max_steps=1, train_max_size=7)
    run(store, 0, max_steps=1, train_max_size=100)
    *capped, everything = asked[::2]
    assert everything == list(range(60))
    assert all(len(rows) == len(set(rows)) == 14 and sum(row % 2 for row in rows) == 7 for rows in capped)
    assert capped[0] == capped[1] != capped[2]


def test_several_passes_train_the_model_of_one() -> None:
    settings = QUICK | {"train_batch_size": 4}
    one = run(gradiend_batch_size=4, **settings)
    other = run(gradiend_batch_size=2, gradient_accumulation_steps=2, batch_size=4, **settings)
    torch.testing.assert_close(weights(other), weights(one), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(weights(run(gradiend_batch_size=2, **settings)), weights(one), atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 1e-3, "adam_epsilon": 1.0},
        {"lr_scheduler_type": "cosine"},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"optimizer_groups": [{"pattern": "encoder", "learning_rate": 0.1}]},
        {"latent_dim": 2},
        {"activation_encoder": "smht"},
        {"activation_decoder": "gelu"},
    ],
)
def test_arguments_change_the_result(settings: dict[str, Any]) -> None:
    changed, plain = run(**QUICK, **settings), run(**QUICK)
    assert weights(changed).shape != weights(plain).shape or not torch.allclose(weights(changed), weights(plain))


# --- supervised baselines


def validation_rows(store: GradientStore) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source and target gradients of the validation rows, and the labels of the sources."""
    positions = store.positions(split="validation", kind=TRAINING)
    labels = torch.tensor(-store.index["label"].to_numpy()[positions.numpy()], dtype=torch.float32)
    return store.rows("alternative", positions), store.rows("diff", positions), labels


def test_supervised_encoder_reaches_the_labels() -> None:
    store = planted(300)
    trained = run(store, supervised_encoder=True, max_steps=200, metric_for_best_model="loss")
    source, _, labels = validation_rows(store)
    start = GradiendModel(store.selection, target_classes=("A", "B"))
    start.reset_parameters(0, zero_decoder_bias=True)
    assert torch.equal(trained.model.decoder.weight.abs(), start.decoder.weight.abs())
    assert not torch.equal(trained.model.encoder.weight.abs(), start.encoder.weight.abs())
    with torch.no_grad():
        error = (trained.model.encode(source)[:, 0] - labels).square().mean()
    assert best_line(trained)["eval_loss"] == pytest.approx(float(error), rel=1e-4)
    assert best_line(trained)["correlation"] > 0.9


@pytest.mark.parametrize("seed", range(4))
def test_supervised_decoder_reconstructs_from_the_labels(seed: int) -> None:
    store = planted(300)
    trained = run(store, seed, supervised_decoder=True, max_steps=200, metric_for_best_model="r2")
    _, target, labels = validation_rows(store)
    start = GradiendModel(store.selection, target_classes=("A", "B"))
    start.reset_parameters(seed, zero_decoder_bias=True)
    assert torch.equal(trained.model.encoder.weight, start.encoder.weight)
    with torch.no_grad():
        reached = r_squared(target, trained.model.decode(labels[:, None]))
    assert reached == pytest.approx(best_line(trained)["r2"], abs=1e-4)
    assert reached > 0.1


# --- logs and modes


def test_logged_steps(caplog: pytest.LogCaptureFixture) -> None:
    def logged(**settings: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(planted(4), max_steps=10, **settings)
        return [record.getMessage() for record in caplog.records if "loss" in record.getMessage()]

    assert logged() == []
    assert [line.split(":")[1] for line in logged(logging_steps=4)] == [" step 4 of 10", " step 8 of 10"]
    assert len(logged(logging_steps=4, logging_first_step=True)) == 3
    (line,) = logged(logging_first_step=True, learning_rate=0.5)
    assert line.startswith("seed 0: step 1 of 10: loss ")
    assert line.endswith("rate 0.5")


@pytest.mark.parametrize("eval_delay", [0, 3])
def test_progress_says_loss_and_correlation(monkeypatch: pytest.MonkeyPatch, eval_delay: int) -> None:
    said: list[str] = []

    def track(steps: range, description: str, status: Callable[[], str]) -> Iterator[int]:
        for step in steps:
            yield step
            said.append(status())

    monkeypatch.setattr(loop, "track", track)
    history = run(max_steps=6, eval_steps=2, eval_delay=eval_delay).history.set_index("step")
    for step, words in enumerate(said, start=1):
        evaluated = history.index[history.index <= step]
        shown = re.fullmatch(r"loss ([\d.e+]+)(?:, correlation (\d\.\d+))?", words)
        assert shown
        assert (shown[2] is None) == evaluated.empty
        if not evaluated.empty:
            assert float(shown[2]) == pytest.approx(abs(history["correlation"])[evaluated[-1]], abs=1e-3)
        if step in history.index:
            assert float(shown[1]) == pytest.approx(history["loss"][step], rel=1e-3)
    assert len(said) == 6


def test_precision_of_matrix_products_holds_during_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_float32_matmul_precision(), []
    original = loop.training_step

    def training_step(*arguments: Any, **options: Any) -> float:
        seen.append(torch.get_float32_matmul_precision())
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "training_step", training_step)
    run(max_steps=1, float32_matmul_precision="medium")
    run(max_steps=1)
    assert seen == ["medium", "highest"]
    assert torch.get_float32_matmul_precision() == before


# --- values that are not finite


def spoilt(quantity: str, value: float, row: int) -> GradientStore:
    store = planted(10)
    shard = {name: matrix.clone() for name, matrix in store._shards[0].items()}
    shard[quantity][row, 3] = value
    return GradientStore(store.index, store.selection, store.metadata, (shard,))


@pytest.mark.parametrize(("quantity", "value"), [("alternative", np.nan), ("diff", np.inf)])
def test_rows_that_are_not_finite_are_named(quantity: str, value: float) -> None:
    with pytest.raises(GradiendError, match=rf"training rows 41 of the gradient store hold {quantity} gradients"):
        run(spoilt(quantity, value, 41))
    with pytest.raises(
        GradiendError,
        match=r"seed 3 stopped at step \d+, at rows [^a-z]*\b41\b[^a-z]* of .*the loss is nan.*themselves",
    ):
        run(spoilt("diff", np.nan, 41), 3, scaling="reference", train_batch_size=4, max_steps=30)


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, name: str = "decoder.weight") -> None:
    """Let one value of a parameter be infinite after this step."""
    original, taken = loop.training_step, []

    def training_step(model: GradiendModel, *arguments: Any, **options: Any) -> float:
        loss = original(model, *arguments, **options)
        taken.append(1)
        if len(taken) == step:
            model.get_parameter(name).data.flatten()[0] = torch.inf
        return loss

    monkeypatch.setattr(loop, "training_step", training_step)


def test_a_training_that_diverges_ends_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    trained = run(learning_rate=1e38, scaling="reference")
    says = r"seed 0 stopped at step 2, at rows [\d, ]+ of .*the loss is (inf|nan).*coder\.weight has.*Lower"
    assert re.match(says, trained.stopped or "")
    assert trained.stopped_step == 2
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [trained.stopped]
    assert (trained.best_step, trained.history["step"].tolist()) == (0, [0])
    whole = run(max_steps=2)
    assert (whole.stopped, whole.stopped_step) == (None, None)


@pytest.mark.parametrize(
    ("settings", "kept", "steps"),
    [
        ({"eval_steps": 5, "metric_for_best_model": "loss"}, 5, [0, 5, 10]),
        ({"eval_steps": 5, "metric_for_best_model": "loss", "greater_is_better": True}, 10, [0, 5, 10]),
        ({"eval_steps": 5, "load_best_model_at_end": False, "save_strategy": "no"}, 10, [0, 5, 10]),
        ({"eval_steps": 5, "load_best_model_at_end": False, "save_steps": 11}, 11, [0, 5, 10, 11]),
        ({"eval_strategy": "no"}, 0, [0]),
        ({"eval_steps": 5, "eval_delay": 50}, 0, [0]),
        ({"eval_strategy": "no", "load_best_model_at_end": False, "save_steps": 4}, 8, [8]),
    ],
)
def test_what_is_kept_of_a_training_that_diverges(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], kept: int, steps: list[int]
) -> None:
    with monkeypatch.context() as patch:
        poisoned(patch, 12)
        trained = run(**settings)
    assert trained.stopped_step in {12, 13}
    assert (trained.best_step, trained.history["step"].tolist()) == (kept, steps)
    assert np.isfinite(trained.history.drop(columns=["loss", "learning_rate"])).all(axis=None)
    if kept:
        expected = run(max_steps=kept, load_best_model_at_end=False, eval_strategy="no")
        line, last = best_line(trained), best_line(expected)
        assert {name: line[name] for name in line.keys() - {"loss", "learning_rate"}} == {
            name: last[name] for name in line.keys() - {"loss", "learning_rate"}
        }
        assert torch.equal(weights(trained), weights(expected))
    else:
        start = GradiendModel(planted(20).selection, target_classes=("A", "B"))
        start.reset_parameters(0, zero_decoder_bias=True)
        assert torch.equal(weights(trained).abs(), torch.cat([p.detach().flatten() for p in start.parameters()]).abs())
        assert best_line(trained)["mean_positive"] >= best_line(trained)["mean_negative"]


def test_saturated_weights_are_found_before_they_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 1, "encoder.bias")  # tanh of it is 1, so that no loss tells
    trained = run(eval_steps=3)
    assert re.search(r"stopped at step 3, .*store: encoder\.bias has values that are not finite", trained.stopped or "")
    assert trained.history["step"].tolist() == [0]


def test_only_nan_gradients_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for message, stops in (("Function 'X' returned nan values in its 0th output.", True), ("out of memory", False)):

        def training_step(*_: Any, message: str = message, **__: Any) -> float:
            raise RuntimeError(message)

        monkeypatch.setattr(loop, "training_step", training_step)
        if stops:
            assert "stopped at step 1, at rows" in (run().stopped or "")
        else:
            with pytest.raises(RuntimeError, match="out of memory"):
                run()


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_anomaly_detection_names_step_rows_and_operation() -> None:
    with pytest.raises(GradiendError, match=r"stopped at step \d+, at rows .*Function '\w+' returned nan values"):
        run(spoilt("diff", np.nan, 41), scaling="reference", train_batch_size=4, max_steps=30, detect_anomaly=True)


def test_history_has_the_columns_of_its_table() -> None:
    assert set(run(max_steps=2).history.columns) == set(HISTORY)


def test_torch_compile_takes_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def uncompiled(function: Any, **_: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)  # tests/unit/test_compiled.py compiles
    plain, found = (run(torch_compile=on) for on in (False, True))
    assert len(compiled) == 1
    torch.testing.assert_close(found.model.decoder.weight, plain.model.decoder.weight, rtol=1e-3, atol=1e-5)
