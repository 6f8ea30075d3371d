"""One training of a masked language model, as each of its processes runs it."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from gradiend_core.config.base_models import MaskedLMTraining
from gradiend_core.config.optimization import group_problems
from gradiend_core.devices import pick_device
from gradiend_core.errors import GradiendError
from gradiend_core.lm.masked_trainer import MaskedBert, MaskedTrainer, training_arguments
from gradiend_core.lm.masking import Encoded, MaskedOnce, Masker
from gradiend_core.lm.trainer_checkpoints import TrainerCheckpoints
from gradiend_core.tensors import load_tensors, read_metadata, save_tensors

logger = logging.getLogger(__name__)

_RESULT: Final = "trained.safetensors"


@dataclass(frozen=True)
class TrainingJob:
    """All that a training depends on. `events` is the folder for what `training.report_to` asks for."""

    texts: Sequence[str]
    validation: Sequence[str]
    tokenizer: PreTrainedTokenizerFast
    model_config: Mapping[str, Any]
    training: MaskedLMTraining
    checkpoints: TrainerCheckpoints
    events: Path | None


@dataclass(frozen=True)
class TrainedMaskedLM:
    """The model that a training keeps, in evaluation mode, and the evaluation of it, if there was one."""

    model: BertForMaskedLM
    validation: dict[str, float]  # step, loss, accuracy


def new_model(job: TrainingJob) -> MaskedBert:
    """The model with the initial weights of the seed."""
    torch.manual_seed(job.training.seed)
    return MaskedBert(_bert_config(job))


def train_share(job: TrainingJob) -> None:
    """Train together with the other processes, if there are any; the first writes the result for `read_result`."""
    # The trainer seeds the global generators; the caller gets its own state back.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        trainer = _new_trainer(job)
        steps, loss = trainer.continue_training()
        weights = trainer.accelerator.get_state_dict(trainer.model)
    logger.info("trained %d steps, mean loss %.3f", steps, loss)
    if trainer.is_world_process_zero():
        best = trainer.state.best_global_step if job.training.load_best_model_at_end else None
        metadata = {"validation": _evaluation_of(best or steps, trainer.state.log_history)}
        save_tensors(job.checkpoints.folder / _RESULT, _separate(weights), metadata)


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, because tied weights are one tensor, which a file cannot hold twice."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def read_result(job: TrainingJob) -> TrainedMaskedLM:
    """What `train_share` has trained."""
    file = job.checkpoints.folder / _RESULT
    with torch.random.fork_rng([]):
        model = BertForMaskedLM(_bert_config(job))
    model.load_state_dict(load_tensors(file))
    nn.Module.to(model.eval(), pick_device())  # type: ignore[no-untyped-call]
    return TrainedMaskedLM(model, read_metadata(file)["validation"])


def check_job(job: TrainingJob) -> None:
    """Raise a `GradiendError` for settings that this machine, this model or these texts cannot honour."""
    training = job.training
    with torch.device("meta"):
        names = [name for name, _ in MaskedBert(_bert_config(job)).named_parameters()]
    problems = group_problems(training.optimizer_groups, names)
    gpus = torch.cuda.device_count()
    if 0 < gpus < training.processes:
        problems.append(f"processes: {training.processes}, but there are {gpus} GPUs here; set it to {gpus} or less")
    if training.eval_strategy != "no" and not job.validation:
        problems.append("eval_strategy: the corpus has no validation texts; set it to no, or change its splits")
    if "tensorboard" in training.report_to and find_spec("tensorboard") is None:
        problems.append("report_to: tensorboard is not installed: pip install 'gradiend-pipeline[tensorboard]'")
    if problems:
        raise GradiendError("\n".join(problems))


def _bert_config(job: TrainingJob) -> BertConfig:
    vocabulary = {"vocab_size": len(job.tokenizer), "pad_token_id": job.tokenizer.pad_token_id}
    return BertConfig(use_cache=False, **vocabulary, **job.model_config)


def _new_trainer(job: TrainingJob) -> MaskedTrainer:
    training = job.training
    bar = sys.stderr.isatty()
    arguments = training_arguments(training, job.checkpoints.folder, bar=bar, device=pick_device())
    evaluates = training.eval_strategy != "no"
    texts = Encoded(job.tokenizer, job.texts)
    trainer = MaskedTrainer(
        new_model(job),
        arguments,
        training,
        _masker(job),
        texts,
        MaskedOnce(_masker(job), Encoded(job.tokenizer, job.validation)) if evaluates else None,
        job.checkpoints,
        [_Watcher(training, len(texts)), *_event_files(job, first=arguments.process_index == 0)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _masker(job: TrainingJob) -> Masker:
    return Masker(job.tokenizer, job.training.mlm_probability, job.training.seed)


class _Watcher(TrainerCallback):
    """Says what happens, and has every evaluated model saved that may be the best."""

    def __init__(self, training: MaskedLMTraining, texts: int) -> None:
        self._training, self._texts = training, texts

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        training = self._training
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.processes
        passes = state.max_steps * batch / self._texts
        logger.info("%d steps of %d texts, %.3g passes over %d texts", state.max_steps, batch, passes, self._texts)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            logger.info("step %d of %d: loss %s", state.global_step, state.max_steps, logs["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        loss, accuracy = (known["metrics"][f"eval_{name}"] for name in ("loss", "accuracy"))
        logger.info("step %d: validation loss %.4f, accuracy %.3f", state.global_step, loss, accuracy)
        control.should_save = control.should_save or self._training.load_best_model_at_end


def _event_files(job: TrainingJob, *, first: bool) -> list[TrainerCallback]:
    if not (first and job.events and "tensorboard" in job.training.report_to):
        return []
    # Optional, and slow to import.
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    last = job.checkpoints.latest()
    done = 0 if last is None else int(last.name.rpartition("-")[2])
    writer = SummaryWriter(str(job.events), purge_step=done + 1)
    return [TensorBoardCallback(writer)]  # type: ignore[no-untyped-call]


def _evaluation_of(step: int, history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = [line for line in history if line["step"] == step and "eval_loss" in line]
    return {"step": step, "loss": found[0]["eval_loss"], "accuracy": found[0]["eval_accuracy"]} if found else {}
