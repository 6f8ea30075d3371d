"""Parameters of the base_model stages."""

import inspect
import math
from typing import Literal, Self

from pydantic import Field, model_validator

from gradiend_core.config.optimization import OptimizerGroup, Schedule, Stepped, step_problems
from gradiend_core.config.section import DataPath, Name, Section, Seed


class BertShape(Section):
    """The shape of a small BERT, under the names of `transformers.BertConfig`."""

    hidden_size: int = Field(128, ge=1, description="width of the residual stream")
    num_hidden_layers: int = Field(2, ge=1, description="transformer layers")
    num_attention_heads: int = Field(2, ge=1, description="attention heads; must divide hidden_size")
    intermediate_size: int = Field(512, ge=1, description="width of the feed-forward layers")
    max_position_embeddings: int = Field(64, ge=4, description="longest input, in tokens")
    hidden_dropout_prob: float = Field(0.0, ge=0, lt=1, description="dropout of layer outputs during training")
    attention_probs_dropout_prob: float = Field(0.0, ge=0, lt=1, description="dropout of attention during training")
    initializer_range: float = Field(0.1, gt=0, description="standard deviation of the initial weights")


class MaskedLMTraining(Stepped):
    """How the model is trained, by `transformers.Trainer`. Keys that `train` has, too, mean the same there."""

    max_steps: int = Field(
        1000, description="optimiser steps; -1: as num_train_epochs says, which is the default once that is given"
    )
    num_train_epochs: float = Field(
        -1.0, ge=-1, description="passes over the texts; may be a fraction; a max_steps above 0 overrides it; -1: none"
    )
    per_device_train_batch_size: int = Field(
        64, ge=1, description="texts per forward and backward pass of each process"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="passes whose gradients make one optimiser step")
    processes: int = Field(
        1, ge=1, description="processes that train together, each on its own GPU, or on a core where there is no GPU"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="texts per optimiser step, as a check: per_device_train_batch_size times"
        " gradient_accumulation_steps times processes; null leaves it to them",
    )
    learning_rate: float = Field(1.0e-3, gt=0, description="peak learning rate")
    lr_scheduler_type: Schedule = Field("linear", description="learning-rate schedule, as in transformers")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="the same as a share of all steps, rounded up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay; none of biases and layer norms")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="first beta of Adam")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="second beta of Adam")
    adam_epsilon: float = Field(1.0e-8, gt=0, description="epsilon of Adam")
    optim: Literal["adamw", "adam"] = Field("adamw", description="optimiser")
    optimizer_groups: list[OptimizerGroup] = Field(
        [],
        description="`{pattern: …}` with other learning_rate, weight_decay, adam_beta1, adam_beta2 or adam_epsilon for"
        " the parameters in which the regular expression is found, e.g. `embeddings`; the first that fits counts",
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients of all parameters together are scaled down to this norm; null: never"
    )
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "no", description="when to evaluate on the validation split; unless no, the last step always is"
    )
    eval_steps: int = Field(50, ge=1, description="steps between evaluations (eval_strategy steps)")
    eval_delay: int = Field(
        0, ge=0, description="steps (epochs, if eval_strategy is epoch) before the first evaluation"
    )
    metric_for_best_model: Literal["loss", "accuracy"] = Field(
        "loss", description="validation metric by which the best step is told"
    )
    greater_is_better: bool | None = Field(
        None, description="whether more of that metric is better; null: yes for accuracy, no for loss"
    )
    load_best_model_at_end: bool = Field(False, description="keep the model of the best evaluation; false: of the last")
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "steps", description="when to save what an interrupted training continues from; it goes when training is done"
    )
    save_steps: int = Field(100, ge=1, description="steps between saves (save_strategy steps)")
    save_total_limit: int = Field(1, ge=1, description="saves kept, the newest ones, and that of the best model")
    logging_steps: int = Field(0, ge=0, description="steps between log lines; 0: five lines in all")
    logging_first_step: bool = Field(False, description="log the first step, too")
    report_to: list[Literal["tensorboard"]] = Field(
        [], description="where else log lines and evaluations go: `[tensorboard]`, to logs/tensorboard"
    )
    bf16: bool = Field(False, description="compute in bfloat16 where that is safe (autocast); weights stay float32")
    float32_matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", description="precision of float32 matrix products, as torch.set_float32_matmul_precision has it"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, a third more time"
    )
    torch_compile: bool = Field(False, description="compile the model with torch.compile")
    detect_anomaly: bool = Field(
        False, description="differentiate with torch's anomaly detection, which names the operation that made a NaN"
    )
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of tokens masked")
    seed: Seed = Field(0, description="seed of initialisation, order and masks")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        of_steps = {name: getattr(self, name) for name in inspect.signature(step_problems).parameters}
        problems = [*step_problems(**of_steps), *self._of_batches(), *self._of_saves()]
        if self.eval_strategy == "steps" and 0 < self.max_steps < self.eval_delay:
            problems.append(f"eval_delay {self.eval_delay} exceeds max_steps {self.max_steps}: nothing is evaluated")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _of_batches(self) -> list[str]:
        sizes = (self.per_device_train_batch_size, self.gradient_accumulation_steps, self.processes)
        if self.batch_size is None or self.batch_size == math.prod(sizes):
            return []
        return [
            f"batch_size {self.batch_size} is not per_device_train_batch_size * gradient_accumulation_steps *"
            f" processes = {' * '.join(map(str, sizes))} = {math.prod(sizes)}"
        ]

    def _of_saves(self) -> list[str]:
        if not self.load_best_model_at_end:
            return []
        if self.eval_strategy == "no":
            return ["load_best_model_at_end needs evaluations: set eval_strategy to steps or epoch"]
        if self.save_strategy != self.eval_strategy:
            return [f"load_best_model_at_end saves what it evaluates: set save_strategy to {self.eval_strategy}, too"]
        if self.eval_strategy == "steps" and self.save_steps % self.eval_steps:
            return [
                f"load_best_model_at_end: save_steps {self.save_steps} is not a multiple of eval_steps"
                f" {self.eval_steps}"
            ]
        return []


class TrainedBaseModel(Section):
    """A small BERT and its WordPiece tokenizer, trained on a corpus as an ordinary masked language model."""

    corpus: Name = Field(description="the corpus to train on (its train split)")
    vocab_size: int = Field(8000, ge=10, description="entries of the tokenizer, at most")
    model: BertShape = Field(description="shape of the model")
    training: MaskedLMTraining = Field(description="training arguments")
    probe_words: list[str] = Field(
        [], description="words whose masked-prediction accuracy on the test split is reported"
    )


class LocalBaseModel(Section):
    """A model folder that `AutoModelForMaskedLM.from_pretrained` loads."""

    path: DataPath = Field(description="folder with config.json, weights (safetensors) and tokenizer")


class HubBaseModel(Section):
    """A model of the Hugging Face hub."""

    repo_id: str = Field(description="e.g. google-bert/bert-base-uncased")
    revision: str = Field(
        min_length=7, pattern=r"^[0-9a-f]+$", description="commit hash; a branch name would not be reproducible"
    )
