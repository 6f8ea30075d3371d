"""Train one GRADIEND on stored gradients (semantics, section 6; departures: BUG-03, BUG-05, BUG-06)."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradiend_core.config.train import Train
from gradiend_core.devices import pick_device
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.progress import track
from gradiend_core.training.batches import Positions, batches
from gradiend_core.training.checkpoint import Checkpoints, Progress
from gradiend_core.training.evaluation import Validation, evaluate, r_squared
from gradiend_core.training.optimizer import build_optimizer, build_schedule, steps_per_epoch, total_steps
from gradiend_core.training.rows import RowSet
from gradiend_core.training.step import training_step

__all__ = ["RowSet", "Trained", "build_optimizer", "evaluate", "r_squared", "train", "training_step"]

logger = logging.getLogger(__name__)

# Entries of gradient rows that are averaged at a time, 64 MiB of each quantity, so that every thread has some to do.
_AHEAD: Final = 2**24

# What changes sign when the model is turned around.
_SIGNED: Final = ["correlation", "mean_positive", "mean_negative", "mean_neutral"]


@dataclass(frozen=True)
class Trained:
    """The model that a run keeps, oriented, the step it is of, and the history (one line per evaluation)."""

    model: GradiendModel
    history: pd.DataFrame
    best_step: int


@dataclass(frozen=True)
class _Calendar:
    """Which steps are evaluated, saved and logged."""

    params: Train
    epoch: int  # steps
    total: int

    def evaluates(self, step: int) -> bool:
        strategy, delay = self.params.eval_strategy, self.params.eval_delay
        if step in {0, self.total} or strategy == "no":
            return step == self.total or (strategy != "no" and delay == 0)
        every, unit = (self.params.eval_steps, 1) if strategy == "steps" else (self.epoch, self.epoch)
        return step % every == 0 and step >= delay * unit

    def saves(self, step: int) -> bool:
        strategy = self.params.save_strategy
        every = self.params.save_steps if strategy == "steps" else self.epoch
        return strategy != "no" and step % every == 0 and step < self.total

    def logs(self, step: int) -> bool:
        steps = self.params.logging_steps
        return (steps > 0 and step % steps == 0) or (self.params.logging_first_step and step == 1)


def train(store: GradientStore, params: Train, seed: int, checkpoints: Checkpoints | None = None) -> Trained:
    """Train on the train split, evaluate on the validation split, and keep the model of the best evaluation.

    The model is turned once, at the end, so that the first target class is encoded as positive, and the history with
    it; activations that cannot be turned leave it as it is. With `checkpoints`, an interrupted training goes on.

    Raises:
        GradiendError: loss or weights are not finite; checkpoints stay for a look at the last good state.
    """
    with _matmul_precision(params.float32_matmul_precision):
        return _train(store, params, seed, checkpoints)


def _train(store: GradientStore, params: Train, seed: int, checkpoints: Checkpoints | None) -> Trained:
    device = pick_device()
    positions, groups = _training_rows(store, params, seed)
    training = RowSet.load(store, params, positions, device)
    validation = RowSet.load(store, params, store.positions(split="validation", kind=TRAINING), device)
    # Neutral rows have no difference to encode: their factual gradient is, whatever the source (semantics 7.1).
    others = torch.from_numpy((store.index["type"] != TRAINING).to_numpy().nonzero()[0])
    neutral = store.rows("factual", others).to(device)
    model = _new_model(store, params, training, positions, seed).to(device)
    epoch = steps_per_epoch(list(groups.values()), params)
    calendar = _Calendar(params, epoch, total_steps(epoch, params))
    optimizer = build_optimizer(model, params)
    schedule = build_schedule(optimizer, params, calendar.total)
    judge = Validation.of(validation)

    def judged(step: int, loss: float, rate: float) -> dict[str, float]:
        line: dict[str, float] = {"step": step, "loss": loss, "learning_rate": rate}
        return line | evaluate(model, judge, neutral, params.scaling, params.objective)

    progress = checkpoints.restore(model, optimizer, schedule) if checkpoints else None
    if progress is None:
        progress = Progress()
        if calendar.evaluates(0):
            _note(progress, model, judged(0, math.nan, math.nan), params)
    order = batches(groups, params.train_batch_size, seed)
    steps = range(progress.step + 1, calendar.total + 1)
    size = params.gradiend_batch_size * params.gradient_accumulation_steps
    inputs = _inputs(training, islice(order, progress.step * size, calendar.total * size), size)
    for step, (chosen, source, target) in zip(track(steps, f"seed {seed}"), inputs, strict=True):
        labels = torch.tensor([training.labels[rows[0]] for rows in chosen], dtype=torch.float32, device=device)
        rate = optimizer.param_groups[-1]["lr"]
        try:
            loss = training_step(
                model,
                optimizer,
                source,
                target,
                params.scaling,
                objective=params.objective,
                labels=labels,
                passes=params.gradient_accumulation_steps,
                max_grad_norm=params.max_grad_norm,
                detect_anomaly=params.detect_anomaly,
            )
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            raise _diverged(
                seed, step, str(error), positions[np.concatenate(chosen)], source, target, checkpoints
            ) from None
        schedule.step()
        progress.step = step
        progress.losses.append(loss)
        looked_at = calendar.evaluates(step) or calendar.saves(step)
        if wrong := _not_finite(loss, model, weights=looked_at):
            raise _diverged(seed, step, wrong, positions[np.concatenate(chosen)], source, target, checkpoints)
        if calendar.logs(step):
            logger.info("seed %d: step %d of %d: loss %.6g, rate %.3g", seed, step, calendar.total, loss, rate)
        if calendar.evaluates(step):
            _note(progress, model, judged(step, float(np.mean(progress.losses)), rate), params)
            progress.losses.clear()
        if checkpoints and calendar.saves(step):
            checkpoints.save(model, optimizer, schedule, progress)
    if params.load_best_model_at_end:
        model.load_state_dict(progress.best)
    else:
        progress.best_step = calendar.total
    trained = Trained(model.cpu(), pd.DataFrame(progress.history), progress.best_step)
    # A supervised decoder was told what +1 means; its encoder knows of nothing.
    return trained if params.objective == "decoder" else _orient(trained, validation)


def _training_rows(store: GradientStore, params: Train, seed: int) -> tuple[Tensor, dict[str, Positions]]:
    """Positions of the rows to train on, and for each transition where among them its own stand."""
    positions = store.positions(split="train", kind=TRAINING)
    transitions = store.index["transition"].to_numpy()[positions.numpy()]
    names = np.unique(transitions)
    if params.train_max_size is not None:
        random = np.random.default_rng([seed, len(names)])  # batches draw from [seed, 0 … len(names)-1]
        own = (np.flatnonzero(transitions == name) for name in names)
        kept = np.sort(np.concatenate([random.permutation(rows)[: params.train_max_size] for rows in own]))
        positions, transitions = positions[torch.from_numpy(kept)], transitions[kept]
    return positions, {name: np.flatnonzero(transitions == name) for name in names}


def _inputs(
    training: RowSet, order: Iterator[Positions], size: int
) -> Iterator[tuple[list[Positions], Tensor, Tensor]]:
    """For each step its `size` batches of rows, and their mean source and target gradients [size, n]."""
    steps = max(1, _AHEAD // training.source.shape[1] // size)
    while chosen := list(islice(order, steps * size)):
        source, target = training.batch_means(chosen)
        for start in range(0, len(chosen), size):
            step = slice(start, start + size)
            yield chosen[step], source[step], target[step]


def _note(progress: Progress, model: GradiendModel, line: dict[str, float], params: Train) -> None:
    """Add an evaluation to the history, and keep the weights if it is the best."""
    metric = params.metric_for_best_model
    greater = metric != "loss" if params.greater_is_better is None else params.greater_is_better

    def score(of: dict[str, float]) -> float:
        value = abs(of["correlation"]) if metric == "correlation" else of["eval_loss" if metric == "loss" else metric]
        return -math.inf if math.isnan(value) else value if greater else -value

    if all(score(line) > score(earlier) for earlier in progress.history):
        progress.best_step = int(line["step"])
        progress.best = {name: value.clone() for name, value in model.state_dict().items()}
    progress.history.append(line)


def _new_model(store: GradientStore, params: Train, training: RowSet, positions: Tensor, seed: int) -> GradiendModel:
    scale_free = params.scaling == "scale_free"
    provenance: dict[str, Any] = {key: store.metadata[key]["path"] for key in ("base_model", "dataset")}
    model = GradiendModel(
        store.selection,
        target_classes=tuple(store.metadata["target_classes"]),
        source=params.source,
        target=params.target,
        latent_dim=params.latent_dim,
        activation_encoder=params.activation_encoder,
        activation_decoder=params.activation_decoder,
        bias_decoder=params.bias_decoder,
        source_scale=_scale(training.source, positions, params.source) if scale_free else 1.0,
        target_scale=_scale(training.target, positions, params.target) if scale_free else 1.0,
        metadata=provenance | {"seed": seed},
    )
    model.reset_parameters(seed, zero_decoder_bias=scale_free)
    return model


def _scale(rows: Tensor, positions: Tensor, quantity: str) -> float:
    """Root mean square of training rows; 1 if they are all zero."""
    scale = float(rows.double().square().mean().sqrt())
    if not math.isfinite(scale):
        bad = positions[~rows.isfinite().all(1).cpu()].tolist()
        raise GradiendError(
            f"training rows {_shown(bad)} of the gradient store hold {quantity} gradients that are not finite."
            " Run cache_gradients again; if they are there again, load the base model in another dtype."
        )
    return scale or 1.0


def _not_finite(loss: float, model: GradiendModel, *, weights: bool) -> str:
    """In words, what is not finite: the loss, the first such parameter; without a look at them if the loss is."""
    wrong = [] if math.isfinite(loss) else [f"the loss is {loss}"]
    if wrong or weights:
        bad = (name for name, value in model.named_parameters() if not bool(value.isfinite().all()))
        wrong += [f"{name} has values that are not finite" for name in islice(bad, 1)]
    return " and ".join(wrong)


def _diverged(
    seed: int, step: int, wrong: str, rows: Tensor, source: Tensor, target: Tensor, checkpoints: Checkpoints | None
) -> GradiendError:
    advice = "Lower learning_rate, set max_grad_norm, or add warm-up."
    if not (source.isfinite().all() and target.isfinite().all()):
        advice = "These rows themselves hold values that are not finite: run cache_gradients again."
    for save in checkpoints.saves()[:1] if checkpoints else ():
        advice += f" The last good state is {save}."
    return GradiendError(
        f"seed {seed} stopped at step {step}, at rows {_shown(rows.tolist())} of the gradient store: {wrong}. {advice}"
    )


def _shown(rows: list[int], most: int = 64) -> str:
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _orient(trained: Trained, validation: RowSet) -> Trained:
    """Turn every latent whose class means are in the wrong order; the history follows the first one."""
    model = trained.model
    if not model.can_flip:
        return trained
    line = trained.history.loc[trained.history["step"] == trained.best_step].iloc[0]
    turned = [] if line["mean_positive"] >= line["mean_negative"] else [0]
    if model.encoder.out_features > 1:
        with torch.no_grad():
            encoded = model.encode(validation.source.cpu())
        gaps = encoded[validation.labels > 0].mean(0) - encoded[validation.labels < 0].mean(0)
        turned += [latent for latent in range(1, len(gaps)) if gaps[latent] < 0]
    if turned:
        model.flip(turned)
    history = trained.history.assign(**-trained.history[_SIGNED]) if 0 in turned else trained.history
    return Trained(model, history, trained.best_step)
