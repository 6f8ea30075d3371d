"""`transformers.Trainer` for masked language models: one result for any number of processes, and after any kill."""

import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler
from transformers import BertForMaskedLM, EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from gradiend_core.config.base_models import MaskedLMTraining
from gradiend_core.config.optimization import OptimizerGroup, group_of
from gradiend_core.devices import matmul_precision
from gradiend_core.errors import GradiendError
from gradiend_core.lm.masking import IGNORED, Batch, Encoded, MaskedOnce, Masker, share
from gradiend_core.lm.trainer_checkpoints import TrainerCheckpoints
from gradiend_core.tensors import disk_errors, load_tensors, save_tensors

logger = logging.getLogger(__name__)

# A checkpoint's part that transformers does not know: where the masker's random generator stands.
_MASKING_FILE: Final = "masking.safetensors"
_STATE: Final = "generator_state"

# Settings that are called as in `transformers.TrainingArguments`, but written in another way.
_TRANSLATED: Final = {
    *("gradient_checkpointing", "logging_steps", "max_grad_norm", "num_train_epochs"),
    *("optim", "report_to", "save_total_limit", "warmup_steps"),
}


class MaskedBert(BertForMaskedLM):  # type: ignore[no-untyped-call]
    """The usual model, but the vocabulary is scored at masked positions only: the same loss in half the time."""

    accepts_loss_kwargs = True
    # Tied to the embeddings, so that checkpoints lack them; transformers would warn of each.
    _keys_to_ignore_on_save = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]  # noqa: RUF012

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The cross entropy over masked positions, summed, by `num_items_in_batch`: those of all passes and processes.

        In evaluation the "logits" are float64 (batch, 3): for each text the summed cross entropy, the masked positions
        and how many of them are guessed right.
        """
        masked = labels != IGNORED
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        scores, truth = self.cls(hidden[masked]).float(), labels[masked]
        items = masked.sum() if num_items_in_batch is None else num_items_in_batch
        loss = nn.functional.cross_entropy(scores, truth, reduction="sum") / items.clamp(min=1)
        return {"loss": loss} if self.training else {"loss": loss, "logits": _per_text(masked, scores, truth)}


class MaskedTrainer(Trainer):
    """Trains on whole batches that every process masks alike and takes its share of, so that N times b texts are one.

    Args:
        model: of which the weights are trained.
        args: from `training_arguments`.
        params: the settings that `args` cannot say.
        masker: of the texts to train on.
        texts: token ids of the texts to train on.
        validation: masked texts to evaluate on, if any.
        checkpoints: where an interrupted training is continued from.
        callbacks: told what happens, besides those of transformers.
    """

    def __init__(
        self,
        model: MaskedBert,
        args: TrainingArguments,
        params: MaskedLMTraining,
        masker: Masker,
        texts: Encoded,
        validation: MaskedOnce | None,
        checkpoints: TrainerCheckpoints,
        callbacks: list[TrainerCallback],
    ) -> None:
        self._params, self._masker, self._checkpoints = params, masker, checkpoints
        self._texts, self._model = texts, model
        self._masked: Tensor | None = None  # the generator's state once the batch at hand was masked
        super().__init__(
            model=model,
            args=args,
            train_dataset=texts,
            eval_dataset=validation,
            data_collator=_padded,
            compute_metrics=_metrics,
            callbacks=callbacks,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of all processes in the same order everywhere, of which this one's rows are given."""
        # Every process masks whole batches: which tokens are masked must not depend on how rows are spread.
        loader = DataLoader(
            self._texts,
            batch_size=self._params.per_device_train_batch_size * self.args.world_size,
            sampler=RandomSampler(self._texts),
            collate_fn=self._collate,
        )
        prepared: DataLoader[Any] = prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.seed,
        )
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam or AdamW with the groups of `optimizer_groups`."""
        if self.optimizer is None:
            trained = self._model if model is None else model
            groups = parameter_groups(trained, self.get_decay_parameter_names(trained), self._params)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = (torch.optim.Adam if self._params.optim == "adam" else kind)(groups, **settings)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Tensor:
        """One forward and backward pass."""
        # The loader works ahead: only a state that comes with its batch is that of this step.
        self._masked = inputs.pop(_STATE)
        return super().training_step(model, inputs, *arguments, **options)

    def continue_training(self) -> tuple[int, float]:
        """Train from the last checkpoint on, if there is one; steps done in all, and the mean loss of those just done.

        Raises:
            GradiendError: weights are not finite, or anomaly detection found what made a NaN.
        """
        if not self._params.logging_steps:
            total = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
            self.args.logging_steps = math.ceil(total * self.args.logging_steps)  # of a share it would warn below
        last = self._checkpoints.latest()
        if last is not None:
            logger.info("continued after step %s", last.name.rpartition("-")[2])
            self._masker.generator.set_state(load_tensors(last / _MASKING_FILE)[_STATE].clone())
        with matmul_precision(self._params.float32_matmul_precision):
            try:
                with torch.autograd.set_detect_anomaly(self._params.detect_anomaly):
                    result = self.train(resume_from_checkpoint=None if last is None else str(last))
            except RuntimeError as error:
                if "returned nan values" not in str(error):
                    raise
                raise self._diverged(str(error)) from None
        self._check_finite()
        return result.global_step, result.training_loss

    def _collate(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        batch = share(self._masker(rows), self.args.process_index, self.args.world_size)
        return {**batch, _STATE: self._masker.generator.get_state()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        last = self.state.global_step >= self.state.max_steps
        if last and not self.args.load_best_model_at_end:
            return
        self._check_finite()
        with disk_errors(self._checkpoints.folder):
            super()._save_checkpoint(model, trial)
        # All processes write; only then is it complete. Transformers cannot continue after the last step.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero() and self._masked is not None and not last:
            folder = self._checkpoints.folder / f"checkpoint-{self.state.global_step}"
            save_tensors(folder / _MASKING_FILE, {_STATE: self._masked}, {})
            self._checkpoints.complete(folder)
            rotate_checkpoints(
                str(self._checkpoints.folder), self._params.save_total_limit, self.state.best_model_checkpoint
            )
        self.accelerator.wait_for_everyone()

    def _check_finite(self) -> None:
        for name, parameter in self._model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._diverged(f"{name} is not finite")

    def _diverged(self, why: str) -> GradiendError:
        return GradiendError(
            f"training stopped at step {self.state.global_step}: {why}."
            " Use a lower learning_rate, more warmup_steps or a smaller max_grad_norm."
        )


def training_arguments(params: MaskedLMTraining, folder: Path, *, bar: bool, device: torch.device) -> TrainingArguments:
    """What `transformers.Trainer` is told; `folder` holds its checkpoints."""
    known = {field.name for field in fields(TrainingArguments)} - _TRANSLATED
    given = {name: value for name, value in params if name in known}
    backend = "gloo" if device.type == "cpu" else "nccl"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=max(params.num_train_epochs, 0),
        per_device_eval_batch_size=params.per_device_train_batch_size,
        warmup_steps=params.warmup_steps or params.warmup_ratio,
        max_grad_norm=params.max_grad_norm or 0.0,
        logging_steps=params.logging_steps or 0.2,
        activation_checkpointing=params.gradient_checkpointing,
        report_to="none",
        disable_tqdm=not bar,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        ddp_backend=backend if params.processes > 1 else None,
        ddp_find_unused_parameters=False,
        **given,
    )
    # One process trains on one GPU, however many the machine has: results must not depend on that.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def parameter_groups(model: nn.Module, decayed: Sequence[str], params: MaskedLMTraining) -> list[dict[str, Any]]:
    """The optimiser's parameter groups: for each of `optimizer_groups` one with weight decay and one without."""
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        group = group_of(name, params.optimizer_groups)
        number = len(params.optimizer_groups) if group is None else params.optimizer_groups.index(group)
        members.setdefault((number, name not in decayed), []).append(parameter)
    settings = [_settings(group, params) for group in [*params.optimizer_groups, None]]
    return [
        {"params": parameters, **settings[number], **({"weight_decay": 0.0} if plain else {})}
        for (number, plain), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _settings(group: OptimizerGroup | None, params: MaskedLMTraining) -> dict[str, Any]:
    def setting(name: str) -> Any:
        own = None if group is None else getattr(group, name)
        return getattr(params, name) if own is None else own

    return {
        "lr": setting("learning_rate"),
        "weight_decay": setting("weight_decay"),
        "betas": (setting("adam_beta1"), setting("adam_beta2")),
        "eps": setting("adam_epsilon"),
    }


def _per_text(masked: Tensor, scores: Tensor, truth: Tensor) -> Tensor:
    rows = masked.nonzero()[:, 0]
    losses = nn.functional.cross_entropy(scores, truth, reduction="none")
    columns = torch.stack([losses, torch.ones_like(losses), (scores.argmax(-1) == truth).to(losses)], dim=1)
    # A product, because index_add_ is not deterministic on a GPU; in float64, which no matmul precision shortens.
    return nn.functional.one_hot(rows, len(masked)).double().T @ columns.double()


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss and accuracy over all masked positions, whatever the sizes of batches."""
    loss, items, right = np.asarray(prediction.predictions, np.float64).sum(0)
    return {"loss": loss / items, "accuracy": right / items} if items else {"loss": math.nan, "accuracy": math.nan}


def _padded(rows: Sequence[Batch]) -> dict[str, Tensor]:
    # The attention mask hides padding, so that any token will do.
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence([row["attention_mask"] for row in rows], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
    }
