"""Parameters of the train stage."""

import inspect
import math
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from gradiend_core.config.optimization import (
    POLYNOMIAL_END,
    OptimizerGroup,
    Schedule,
    Stepped,
    group_of,
    group_problems,
    step_problems,
)

Quantity = Literal["factual", "alternative", "diff"]
Objective = Literal["reconstruction", "encoder", "decoder"]
Activation = Literal["tanh", "relu", "leakyrelu", "gelu", "silu", "elu", "sigmoid", "smht", "id"]

PARAMETERS: Final = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def _rate_or_tune(value: Any) -> float | str:
    """number > 0 or `tune`"""
    if value == "tune":
        return "tune"
    if type(value) in {int, float} and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"Input should be a {_rate_or_tune.__doc__}")


LearningRate = Annotated[float | Literal["tune"], PlainValidator(_rate_or_tune)]


class Train(Stepped):
    """How a GRADIEND is trained on stored gradients."""

    source: Quantity = Field("alternative", description="gradient the encoder reads")
    target: Quantity = Field("diff", description="gradient the decoder predicts")
    scaling: Literal["scale_free", "reference"] = Field(
        "scale_free",
        description="scale_free: gradients divided by their usual size, summed loss, one rate for every n;"
        " reference: raw gradients, element-mean loss (docs/reference.md, BUG-05)",
    )
    supervised_encoder: bool = Field(
        False, description="baseline: train the encoder alone to give the labels +1 and -1; the decoder stays as it is"
    )
    supervised_decoder: bool = Field(
        False, description="baseline: train the decoder alone from the labels +1 and -1; the encoder stays as it is"
    )
    latent_dim: int = Field(1, ge=1, description="encoder units; the first is the one that is evaluated")
    activation_encoder: Activation = Field(
        "tanh", description="encoder non-linearity; only tanh, smht and id can be turned to have the first class at +1"
    )
    activation_decoder: Activation = Field("id", description="decoder non-linearity")
    bias_decoder: bool = Field(True, description="decoder bias on or off")
    train_max_size: int | None = Field(
        None, ge=1, description="training rows per transition, drawn by the seed; null takes all"
    )
    train_batch_size: int = Field(32, ge=1, description="examples of one transition averaged into one gradient row")
    gradiend_batch_size: int = Field(1, ge=1, description="gradient rows per forward and backward pass")
    gradient_accumulation_steps: int = Field(1, ge=1, description="passes whose gradients make one optimiser step")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="gradient rows per optimiser step, as a check:"
        " gradiend_batch_size times gradient_accumulation_steps; null leaves it to them",
    )
    max_steps: int = Field(
        500, description="optimiser steps; -1: as num_train_epochs says, which is the default once that is given"
    )
    num_train_epochs: float = Field(
        -1.0,
        ge=-1,
        description="passes over the rows of the largest transition, of which the smaller ones take as many batches;"
        " may be a fraction; a max_steps above 0 overrides it; -1: none",
    )
    learning_rate: LearningRate = Field(
        0.01,
        description="peak rate; of the decoder under scale_free, whose encoder takes it divided by √n; tune: searched"
        " for by short trainings of each seed (docs/training.md)",
    )
    learning_rate_probe_steps: int = Field(
        100, ge=1, description="steps of such a short training after warm-up (learning_rate tune)"
    )
    learning_rate_max_probes: int = Field(12, ge=1, description="most short trainings (learning_rate tune)")
    lr_scheduler_type: Schedule = Field("constant", description="learning-rate schedule, as in transformers")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="the same as a share of all steps, rounded up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="first beta of Adam")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="second beta of Adam")
    adam_epsilon: float = Field(1.0e-8, gt=0, description="epsilon of Adam")
    optim: Literal["adamw", "adam"] = Field("adamw", description="optimiser")
    optimizer_groups: list[OptimizerGroup] = Field(
        [],
        description="`{pattern: …}` with other learning_rate, weight_decay, adam_beta1, adam_beta2 or adam_epsilon for"
        " the parameters in which the regular expression is found; the first that fits counts. Parameters are"
        f" {', '.join(PARAMETERS)}",
    )
    max_grad_norm: float | None = Field(
        None, gt=0, description="gradients of all parameters together are scaled down to this norm; null: never"
    )
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "steps", description="when to evaluate on the validation split; the last step always is"
    )
    eval_steps: int = Field(50, ge=1, description="steps between evaluations (eval_strategy steps)")
    eval_delay: int = Field(
        0, ge=0, description="steps (epochs, if eval_strategy is epoch) before the first evaluation; 0 evaluates step 0"
    )
    metric_for_best_model: Literal["correlation", "loss", "r2"] = Field(
        "correlation", description="validation metric by which the best step is told; of the correlation its magnitude"
    )
    greater_is_better: bool | None = Field(
        None, description="whether more of that metric is better; null: yes for correlation and r2, no for loss"
    )
    load_best_model_at_end: bool = Field(True, description="keep the model of the best evaluation; false: of the last")
    preserve_n_best: int = Field(
        1, ge=1, description="evaluations whose weights are kept: the model, and next to it the runners-up"
    )
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "steps", description="when to save what an interrupted training continues from; it goes when training is done"
    )
    save_steps: int = Field(100, ge=1, description="steps between saves (save_strategy steps)")
    save_total_limit: int = Field(1, ge=1, description="saves kept, the newest ones")
    logging_steps: int = Field(0, ge=0, description="steps between log lines; 0: none")
    logging_first_step: bool = Field(False, description="log the first step, too")
    report_to: list[Literal["tensorboard"]] = Field(
        [],
        description="tensorboard: also write loss, rate and every evaluation to logs/tensorboard/"
        " (needs the package tensorboard); changes no result",
    )
    torch_compile: bool = Field(
        False,
        description="compile the training step with torch.compile: 0.6 of the time from n = 10⁶ on, after some"
        " seconds; for one latent, a linear decoder and no accumulation or clipping",
    )
    detect_anomaly: bool = Field(
        False, description="differentiate with torch's anomaly detection, which names the operation that made a NaN"
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", description="precision of float32 matrix products, as torch.set_float32_matmul_precision has it"
    )

    @property
    def objective(self) -> Objective:
        """What is trained: both parts on the reconstruction, or one of them on the labels."""
        return "encoder" if self.supervised_encoder else "decoder" if self.supervised_decoder else "reconstruction"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that are trained."""
        names = PARAMETERS if self.bias_decoder else PARAMETERS[:-1]
        return tuple(name for name in names if self.objective in {"reconstruction", name.partition(".")[0]})

    @property
    def lowest_learning_rate(self) -> float:
        """The rate that the schedule ends at, above which the peak has to be."""
        return POLYNOMIAL_END if self.lr_scheduler_type == "polynomial" else 0.0

    def group_of(self, parameter: str) -> OptimizerGroup | None:
        """The first of the optimiser groups that a parameter belongs to, if any."""
        return group_of(parameter, self.optimizer_groups)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        of_steps = {name: getattr(self, name) for name in inspect.signature(step_problems).parameters}
        problems = [*self._of_batches(), *step_problems(**of_steps)]
        problems += [*group_problems(self.optimizer_groups, self.parameters), *self._of_supervision()]
        problems += self._of_compilation() if self.torch_compile else []
        if self.preserve_n_best > 1 and not self.load_best_model_at_end:
            problems.append(f"preserve_n_best {self.preserve_n_best} ranks evaluations: set load_best_model_at_end")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _of_batches(self) -> list[str]:
        product = self.gradiend_batch_size * self.gradient_accumulation_steps
        if self.batch_size is None or self.batch_size == product:
            return []
        if self.gradiend_batch_size > self.batch_size:
            return [f"gradiend_batch_size {self.gradiend_batch_size} exceeds batch_size {self.batch_size}"]
        return [
            f"batch_size {self.batch_size} is not gradiend_batch_size * gradient_accumulation_steps ="
            f" {self.gradiend_batch_size} * {self.gradient_accumulation_steps} = {product}"
        ]

    def _of_compilation(self) -> list[str]:
        needed = {
            "latent_dim": 1,
            "activation_decoder": "id",
            "gradient_accumulation_steps": 1,
            "max_grad_norm": None,
            "supervised_encoder": False,
            "supervised_decoder": False,
            "detect_anomaly": False,
        }
        others = [name for name, value in needed.items() if getattr(self, name) != value]
        return [f"torch_compile compiles the usual step: leave out {', '.join(others)}"] if others else []

    def _of_supervision(self) -> list[str]:
        problems = []
        if self.supervised_encoder and self.supervised_decoder:
            problems.append("supervised_encoder and supervised_decoder: give one of them")
        if self.objective != "reconstruction" and self.latent_dim > 1:
            problems.append(f"a supervised {self.objective} has one label per row: latent_dim must be 1")
        if self.objective == "decoder" and self.metric_for_best_model == "correlation":
            problems.append("supervised_decoder leaves the encoder as it is: set metric_for_best_model to loss or r2")
        if self.objective == "encoder" and self.metric_for_best_model == "r2":
            problems.append("supervised_encoder leaves the decoder as it is: set metric_for_best_model to correlation")
        return problems
