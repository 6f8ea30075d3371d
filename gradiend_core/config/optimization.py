"""What sections about an optimiser share."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from gradiend_core.config.section import Section, near_miss

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]

# Where transformers' polynomial schedule ends.
POLYNOMIAL_END: Final = 1.0e-7


class OptimizerGroup(Section):
    """Settings of the optimiser for some of the model's parameters; what is null is that of the others."""

    pattern: str = Field(description="regular expression, searched for in the names of parameters")
    learning_rate: float | None = Field(None, gt=0, description="as above, for these parameters")
    weight_decay: float | None = Field(None, ge=0, description="as above, for these parameters")
    adam_beta1: float | None = Field(None, ge=0, lt=1, description="as above, for these parameters")
    adam_beta2: float | None = Field(None, ge=0, lt=1, description="as above, for these parameters")
    adam_epsilon: float | None = Field(None, gt=0, description="as above, for these parameters")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern


class Stepped(Section):
    """A section with `max_steps` and `num_train_epochs`, of which one says how long training is."""

    @field_validator("max_steps", check_fields=False)
    @classmethod
    def _some_or_none(cls, steps: int) -> int:
        if steps == 0 or steps < -1:
            raise ValueError("must be -1, or greater than or equal to 1")
        return steps

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default_steps(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "num_train_epochs" in data and "max_steps" not in data:
            return {**data, "max_steps": -1}
        return data


def group_of(parameter: str, groups: Sequence[OptimizerGroup]) -> OptimizerGroup | None:
    """The first of the groups that a parameter belongs to, if any."""
    return next((group for group in groups if re.search(group.pattern, parameter)), None)


def group_problems(groups: Sequence[OptimizerGroup], names: Sequence[str]) -> list[str]:
    """One line for each group that none of the parameters `names` belongs to."""
    used = [group_of(name, groups) for name in names]
    problems = []
    for number, group in enumerate(groups):
        where = f"optimizer_groups[{number}].pattern {group.pattern!r}"
        if not any(re.search(group.pattern, name) for name in names):
            problems.append(f"{where} is found in no trained parameter{near_miss(group.pattern, names)}")
        elif not any(group is other for other in used):
            problems.append(f"{where}: its parameters belong to an earlier group; put it first")
    return problems


def step_problems(
    *,
    max_steps: int,
    num_train_epochs: float,
    warmup_steps: int,
    warmup_ratio: float,
    lr_scheduler_type: Schedule,
    learning_rate: float | Literal["tune"],
) -> list[str]:
    """One line for each contradiction between number of steps, warm-up, schedule and rate (`tune` fits all)."""
    problems = []
    if max_steps <= 0 and num_train_epochs <= 0:
        problems.append("nothing to train: give max_steps or num_train_epochs a value above 0")
    if warmup_steps and warmup_ratio:
        problems.append("warmup_steps and warmup_ratio are the same thing: give one of them")
    if (warmup_steps or warmup_ratio) and lr_scheduler_type == "constant":
        problems.append("lr_scheduler_type constant has no warm-up: take constant_with_warmup")
    if 0 < max_steps < warmup_steps:
        problems.append(f"warmup_steps {warmup_steps} exceeds max_steps {max_steps}")
    if lr_scheduler_type == "polynomial" and learning_rate != "tune" and learning_rate <= POLYNOMIAL_END:
        problems.append(f"lr_scheduler_type polynomial ends at {POLYNOMIAL_END:g}: take a higher learning_rate")
    return problems
