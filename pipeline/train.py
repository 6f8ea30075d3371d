"""Train one seed of a run on its gradient store; no language model is loaded."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from gradiend_core.config.section import read_section
from gradiend_core.config.train import Train
from gradiend_core.devices import describe_device, pick_device, use_deterministic_algorithms
from gradiend_core.files import write_json
from gradiend_core.gradients.store import GradientStore
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE
from gradiend_core.tables import write_table
from gradiend_core.training.checkpoint import Checkpoints
from gradiend_core.training.loop import Trained, train
from gradiend_core.training.runners_up import save_runners_up
from gradiend_core.training.tables import HISTORY, HISTORY_FILE, METRICS_FILE, RUNNERS_UP_FILE
from pipeline.stage import Outputs, code_digest, environment, stage_parser

# Logs, not results: no other stage reads them, and nothing is computed again for want of them.
_EVENTS: Final = Path("logs/tensorboard")


def main(argv: list[str]) -> None:
    """Write model.safetensors, config.json, runners_up.safetensors, history.parquet and metrics.json."""
    parser = stage_parser("train", __doc__)
    parser.add_argument("--seed", required=True, type=int, help="seed of initial weights and row order")
    parser.add_argument("--gradients", required=True, type=Path, help="folder of the gradient store")
    parser.add_argument("--output", required=True, type=Path, help="folder of the seed")
    arguments = parser.parse_args(argv)
    params = read_section(Train, arguments.params)
    use_deterministic_algorithms()
    output: Path = arguments.output
    with Outputs("train", arguments.manifest, params.model_dump(), [arguments.gradients]) as outputs:
        store = GradientStore.open(arguments.gradients)
        identity = _identity(params, arguments.seed, outputs)
        aside = Checkpoints(output / ".partial-resume-checkpoints", identity, limit=params.save_total_limit)
        checkpoints = outputs.hold(aside)
        events = _EVENTS / arguments.params / str(arguments.seed)
        trained = train(store, params, arguments.seed, checkpoints, logging_dir=events)
        trained.model.save(outputs.path(output / WEIGHTS_FILE), outputs.path(output / CONFIG_FILE))
        save_runners_up(outputs.path(output / RUNNERS_UP_FILE), trained.runners_up)
        write_table(outputs.path(output / HISTORY_FILE), trained.history, HISTORY)
        write_json(outputs.path(output / METRICS_FILE), _metrics(trained) | {"seed": arguments.seed})
        outputs.record(seed=arguments.seed)


def _metrics(trained: Trained) -> dict[str, Any]:
    """What is known of the kept step, leaving out what is undefined, and how training went."""
    best = trained.history.loc[trained.history["step"] == trained.best_step].iloc[0]
    of_training = {"step", "loss", "learning_rate"}
    metrics: dict[str, Any] = {
        name: float(best[name]) for name in HISTORY if name not in of_training and np.isfinite(best[name])
    }
    if trained.correlation_interval:
        metrics["correlation_low"], metrics["correlation_high"] = trained.correlation_interval
    if trained.tuned:
        metrics |= trained.tuned.to_json()
    if trained.stopped:
        metrics |= {"stopped": trained.stopped, "stopped_step": trained.stopped_step}
    return metrics | {"best_step": trained.best_step}


def _identity(params: Train, seed: int, outputs: Outputs) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "params": params.model_dump(),
        "seed": seed,
        "gradients": dict(outputs.inputs),
        "device": describe_device(pick_device()),
        "code": code_digest(),
    } | environment()
