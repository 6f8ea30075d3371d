"""Train one seed of a run on its gradient store; no language model is loaded."""

from pathlib import Path

import numpy as np

from gradiend_core.config.section import read_section
from gradiend_core.config.train import Train
from gradiend_core.devices import use_deterministic_algorithms
from gradiend_core.files import write_json
from gradiend_core.gradients.store import GradientStore
from gradiend_core.model.gradiend import CONFIG_FILE, WEIGHTS_FILE
from gradiend_core.tables import write_table
from gradiend_core.training.loop import train
from gradiend_core.training.tables import HISTORY, HISTORY_FILE, METRICS_FILE
from pipeline.stage import Outputs, stage_parser


def main(argv: list[str]) -> None:
    """Write model.safetensors, config.json, history.parquet and metrics.json."""
    parser = stage_parser("train", __doc__)
    parser.add_argument("--seed", required=True, type=int, help="seed of initial weights and row order")
    parser.add_argument("--gradients", required=True, type=Path, help="folder of the gradient store")
    parser.add_argument("--output", required=True, type=Path, help="folder of the seed")
    arguments = parser.parse_args(argv)
    params = read_section(Train, arguments.params)
    use_deterministic_algorithms()
    output: Path = arguments.output
    with Outputs("train", arguments.manifest, params.model_dump(), [arguments.gradients]) as outputs:
        trained = train(GradientStore.open(arguments.gradients), params, arguments.seed)
        trained.model.save(outputs.path(output / WEIGHTS_FILE), outputs.path(output / CONFIG_FILE))
        write_table(outputs.path(output / HISTORY_FILE), trained.history, HISTORY)
        best = trained.history.loc[trained.history["step"] == trained.best_step].iloc[0]
        metrics = {
            name: float(best[name]) for name in HISTORY if name not in {"step", "loss"} and np.isfinite(best[name])
        }
        write_json(
            outputs.path(output / METRICS_FILE), metrics | {"seed": arguments.seed, "best_step": trained.best_step}
        )
        outputs.record(seed=arguments.seed)
