"""Train one GRADIEND on stored gradients (semantics, section 6; departures: BUG-03, BUG-05, BUG-06)."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradiend_core.config.train import Train
from gradiend_core.devices import matmul_precision
from gradiend_core.errors import GradiendError
from gradiend_core.gradients.store import GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.progress import track
from gradiend_core.training.adam import FusedAdam
from gradiend_core.training.batches import Positions, batches
from gradiend_core.training.calendar import Calendar
from gradiend_core.training.checkpoint import Checkpoints, Progress
from gradiend_core.training.data import Data, named_rows
from gradiend_core.training.evaluation import correlation_interval, evaluate, r_squared, score
from gradiend_core.training.monitor import TensorBoard
from gradiend_core.training.optimizer import (
    build_optimizer,
    build_schedule,
    steps_per_epoch,
    total_steps,
    warmup_steps,
)
from gradiend_core.training.rows import RowSet
from gradiend_core.training.step import training_step
from gradiend_core.training.tune import Tuned, tune

__all__ = ["RowSet", "Trained", "build_optimizer", "evaluate", "r_squared", "train", "training_step"]

logger = logging.getLogger(__name__)

# Entries of gradient rows that are averaged at a time, 64 MiB of each quantity, so that every thread has some to do.
_AHEAD: Final = 2**24

# What changes sign when the model is turned around.
_SIGNED: Final = ["correlation", "mean_positive", "mean_negative", "mean_neutral"]

# Where the search of a learning rate begins: the defaults of this project and of the reference package.
_FIRST_RATE: Final = {"scale_free": 1.0e-2, "reference": 1.0e-5}


@dataclass(frozen=True)
class Trained:
    """What a training ends with.

    Attributes:
        model: the one that is kept, oriented, on the CPU.
        history: one line per evaluation, oriented like the model.
        best_step: the step that the model is of; the history has a line of it.
        correlation_interval: 95 % bootstrap interval of its correlation over validation rows, None where undefined.
        stopped: why training ended early, None if it did not.
        stopped_step: the step at which it did.
        tuned: the learning rates that were tried, None if one was given.
        runners_up: weights of the next best evaluations by their step, the best first, oriented, on the CPU.
    """

    model: GradiendModel
    history: pd.DataFrame
    best_step: int
    correlation_interval: tuple[float, float] | None = None
    stopped: str | None = None
    stopped_step: int | None = None
    tuned: Tuned | None = None
    runners_up: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


def train(
    store: GradientStore,
    params: Train,
    seed: int,
    checkpoints: Checkpoints | None = None,
    *,
    logging_dir: Path = Path("logs/tensorboard"),
) -> Trained:
    """Train on the train split, evaluate on the validation split, and keep the model of the best evaluation.

    The model is turned once, at the end, so that the first target class is encoded as positive, and the history with
    it; activations that cannot be turned leave it as it is. A training whose loss or weights are no longer finite
    ends there: the best finite weights of before are its result, and `stopped` says what happened.

    Args:
        checkpoints: an interrupted training goes on from them.
        logging_dir: folder of event files, if `report_to` asks for them.

    Raises:
        GradiendError: training rows are not finite, or a package that `report_to` names is missing.
    """
    with ExitStack() as stack:
        stack.enter_context(matmul_precision(params.float32_matmul_precision))
        board = stack.enter_context(TensorBoard(logging_dir)) if "tensorboard" in params.report_to else None
        data = Data.load(store, params, seed)
        training = _begun(store, data, params, seed, checkpoints)
        training.run(f"seed {seed}", checkpoints=checkpoints, board=board)
        return training.finish()


def _begun(store: GradientStore, data: Data, params: Train, seed: int, checkpoints: Checkpoints | None) -> "_Training":
    """The training as it was saved, else a new one, whose learning rate is searched for if there is none."""

    def at(rate: float, **others: Any) -> _Training:
        changed = params.model_copy(update={"learning_rate": rate, **others})
        return _Training(store, data, changed, seed)

    def probe(rate: float) -> float:
        # The beginning of the training itself, looked at once.
        training = at(rate, eval_strategy="no", save_strategy="no", logging_steps=0, logging_first_step=False)
        total = training.calendar.total
        until = min(total, warmup_steps(params, total) + params.learning_rate_probe_steps)
        training.run(f"seed {seed}, learning rate {rate:g}", until=until)
        return training.score()

    first = _FIRST_RATE[params.scaling] if params.learning_rate == "tune" else params.learning_rate
    training = at(first)
    if (checkpoints and training.restore(checkpoints)) or params.learning_rate != "tune":
        return training
    tuned = tune(
        probe,
        first,
        untrained=training.score(),
        max_probes=params.learning_rate_max_probes,
        lowest=params.lowest_learning_rate,
    )
    training = at(tuned.learning_rate)
    training.progress.tuned = tuned
    return training


class _Training:
    """A model in training: its optimiser and schedule, and how far it has got.

    Attributes:
        stopped: why and at which step it ended early; None if it did not.
    """

    def __init__(self, store: GradientStore, data: Data, params: Train, seed: int) -> None:
        self.data, self.params, self.seed = data, params, seed
        epoch = steps_per_epoch(list(data.groups.values()), params)
        self.calendar = Calendar(params, epoch, total_steps(epoch, params))
        self.device = data.training.source.device
        self.model = _new_model(store, params, data, seed)
        self._initialise()
        self.optimizer = build_optimizer(self.model, params)
        self.schedule = build_schedule(self.optimizer, params, self.calendar.total)
        self.compiled = _compiled(self.model, self.optimizer, params) if params.torch_compile else None
        self.progress = Progress()
        self.stopped: tuple[str, int] | None = None

    def restore(self, checkpoints: Checkpoints) -> bool:
        """Go back to the newest save, if there is a usable one."""
        progress = checkpoints.restore(self.model, self.optimizer, self.schedule)
        self.progress = progress or self.progress
        return progress is not None

    def run(
        self,
        description: str,
        *,
        until: int | None = None,
        checkpoints: Checkpoints | None = None,
        board: TensorBoard | None = None,
    ) -> None:
        """Take the steps that are left, or those up to `until`; stop where loss or weights are not finite."""
        progress, calendar, params = self.progress, self.calendar, self.params
        if board:
            board.begin(progress.step + 1 if progress.step else 0)
        if progress.step == 0 and calendar.evaluates(0):
            self._evaluate(0, math.nan, math.nan, board)
        last = calendar.total if until is None else until
        size = params.gradiend_batch_size * params.gradient_accumulation_steps
        order = batches(self.data.groups, params.train_batch_size, self.seed)
        inputs = _inputs(self.data.training, islice(order, progress.step * size, last * size), size)
        steps = track(range(progress.step + 1, last + 1), description, self._status)
        for step, (chosen, source, target) in zip(steps, inputs, strict=True):
            rate = self.optimizer.param_groups[-1]["lr"]
            if wrong := self._step(step, chosen, source, target):
                self.stopped = self._reason(step, wrong, chosen, source, target), step
                return
            loss = progress.losses[-1]
            if board:
                board.write(step, {"train/loss": loss, "train/learning_rate": rate})
            if calendar.logs(step):
                counts = (self.seed, step, calendar.total, loss, rate)
                logger.info("seed %d: step %d of %d: loss %.6g, rate %.3g", *counts)
            if calendar.evaluates(step):
                self._evaluate(step, float(np.mean(progress.losses)), rate, board)
                progress.losses.clear()
            if calendar.saves(step):
                if not params.load_best_model_at_end:
                    self._keep(step)
                if checkpoints:
                    checkpoints.save(self.model, self.optimizer, self.schedule, progress)

    def score(self) -> float:
        """How good the model is now; more is better, and -inf says that training has diverged."""
        return -math.inf if self.stopped else score(self._judged(), self.params)

    def finish(self) -> Trained:
        """Turn around what is kept, the best weights or the initial ones if none were looked at."""
        progress = self.progress
        runners_up = {step: self._turned(step) for step in list(progress.best)[1:]}
        if progress.best:
            self.model.load_state_dict(next(iter(progress.best.values())))
        else:
            self._initialise()
        best_step = next(iter(progress.best), 0)
        if best_step not in {line["step"] for line in progress.history}:  # only of a training that has stopped
            progress.history.append(self._line(best_step, math.nan, math.nan))
        history = pd.DataFrame(progress.history)
        if 0 in self._turn(best_step):
            history = history.assign(**-history[_SIGNED])
        if progress.tuned:
            self.model.metadata["learning_rate"] = progress.tuned.learning_rate
        interval = correlation_interval(self.model, self.data.validation.rows, self.seed)
        stopped, stopped_step = self.stopped or (None, None)
        if stopped:
            logger.error(stopped)
        return Trained(
            self.model.cpu(), history, best_step, interval, stopped, stopped_step, progress.tuned, runners_up
        )

    def _initialise(self) -> None:
        self.model.cpu().reset_parameters(self.seed, zero_decoder_bias=self.params.scaling == "scale_free")
        self.model.to(self.device)

    def _status(self) -> str:
        losses, history = self.progress.losses, self.progress.history
        loss = losses[-1] if losses else history[-1]["loss"]
        return f"loss {loss:.4g}" + (f", correlation {abs(history[-1]['correlation']):.3f}" if history else "")

    def _step(self, step: int, chosen: list[Positions], source: Tensor, target: Tensor) -> str:
        """Take a step; in words, what is not finite then."""
        try:
            loss = self._loss(chosen, source, target)
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            return str(error)
        self.schedule.step()
        self.progress.step = step
        self.progress.losses.append(loss)
        looked_at = self.calendar.evaluates(step) or self.calendar.saves(step)
        return _not_finite(loss, self.model, weights=looked_at)

    def _loss(self, chosen: list[Positions], source: Tensor, target: Tensor) -> float:
        """Take a step; the loss before it."""
        if self.compiled:
            return self.compiled(source, target)
        params, training = self.params, self.data.training
        labels = [training.labels[rows[0]] for rows in chosen]
        return training_step(
            self.model,
            self.optimizer,
            source,
            target,
            params.scaling,
            objective=params.objective,
            labels=torch.tensor(labels, dtype=torch.float32, device=self.device),
            passes=params.gradient_accumulation_steps,
            max_grad_norm=params.max_grad_norm,
            detect_anomaly=params.detect_anomaly,
        )

    def _reason(self, step: int, wrong: str, chosen: list[Positions], source: Tensor, target: Tensor) -> str:
        """Why training stops; raises `GradiendError` if it is for the rows."""
        rows = named_rows(self.data.positions[np.concatenate(chosen)])
        message = f"seed {self.seed} stopped at step {step}, at {rows} of the gradient store: {wrong}."
        if not (source.isfinite().all() and target.isfinite().all()):
            raise GradiendError(
                f"{message} These rows themselves hold values that are not finite: run cache_gradients again."
            )
        return f"{message} Lower learning_rate, set max_grad_norm, or add warm-up."

    def _judged(self) -> dict[str, float]:
        data, params = self.data, self.params
        return evaluate(self.model, data.validation, data.neutral, params.scaling, params.objective)

    def _line(self, step: int, loss: float, rate: float) -> dict[str, float]:
        """A line of the history."""
        return {"step": step, "loss": loss, "learning_rate": rate} | self._judged()

    def _evaluate(self, step: int, loss: float, rate: float, board: TensorBoard | None) -> None:
        line = self._line(step, loss, rate)
        self.progress.history.append(line)
        self._keep(step)
        if board:
            board.write(step, {f"eval/{name}": line[name] for name in line.keys() - {"step", "loss", "learning_rate"}})

    def _keep(self, step: int) -> None:
        """Keep the weights as they are now if they are among the best, or the last ones are wanted."""
        progress = self.progress
        wanted = [step]
        if self.params.load_best_model_at_end:
            ranked = sorted(progress.history, key=lambda line: score(line, self.params), reverse=True)
            wanted = [int(line["step"]) for line in ranked[: self.params.preserve_n_best]]
        if step in wanted:
            kept = progress.best | {step: {name: value.clone() for name, value in self.model.state_dict().items()}}
            progress.best = {step: kept[step] for step in wanted}

    def _turned(self, step: int) -> dict[str, Tensor]:
        """The weights that are kept of a step, oriented."""
        self.model.load_state_dict(self.progress.best[step])
        self._turn(step)
        return {name: value.cpu().clone() for name, value in self.model.state_dict().items()}

    def _turn(self, step: int) -> list[int]:
        """Turn every latent whose class means are in the wrong order at this step; the turned ones."""
        model, rows = self.model, self.data.validation.rows
        # A supervised decoder was told what +1 means; its encoder knows of nothing.
        if not model.can_flip or self.params.objective == "decoder":
            return []
        line = next(line for line in self.progress.history if line["step"] == step)
        turned = [] if line["mean_positive"] >= line["mean_negative"] else [0]
        if model.encoder.out_features > 1:
            with torch.no_grad():
                encoded = model.encode(rows.source)
            gaps = encoded[rows.labels > 0].mean(0) - encoded[rows.labels < 0].mean(0)
            turned += [latent for latent in range(1, len(gaps)) if gaps[latent] < 0]
        if turned:
            model.flip(turned)
        return turned


def _compiled(model: GradiendModel, optimizer: FusedAdam, params: Train) -> Callable[[Tensor, Tensor], float]:
    from gradiend_core.training.compiled import CompiledStep  # takes two seconds, for an option

    return CompiledStep(model, optimizer, params)


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


def _new_model(store: GradientStore, params: Train, data: Data, seed: int) -> GradiendModel:
    provenance: dict[str, Any] = {key: store.metadata[key]["path"] for key in ("base_model", "dataset")}
    return GradiendModel(
        store.selection,
        target_classes=tuple(store.metadata["target_classes"]),
        source=params.source,
        target=params.target,
        latent_dim=params.latent_dim,
        activation_encoder=params.activation_encoder,
        activation_decoder=params.activation_decoder,
        bias_decoder=params.bias_decoder,
        source_scale=data.source_scale,
        target_scale=data.target_scale,
        metadata=provenance | {"seed": seed},
    )


def _not_finite(loss: float, model: GradiendModel, *, weights: bool) -> str:
    """In words, what is not finite: the loss, the first such parameter; without a look at them if the loss is."""
    wrong = [] if math.isfinite(loss) else [f"the loss is {loss}"]
    if wrong or weights:
        bad = (name for name, value in model.named_parameters() if not bool(value.isfinite().all()))
        wrong += [f"{name} has values that are not finite" for name in islice(bad, 1)]
    return " and ".join(wrong)
