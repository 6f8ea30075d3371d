"""Which steps of a training are evaluated, saved and logged."""

from dataclasses import dataclass

from gradiend_core.config.train import Train


@dataclass(frozen=True)
class Calendar:
    """The steps 0 … `total`, of which `epoch` make a pass over the rows of the largest transition."""

    params: Train
    epoch: int
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
