"""Draw the training, encoder and decoder figures of a run, and write its training curves for `dvc plots`."""

from pathlib import Path

from gradiend_core.config.plot import Plot
from gradiend_core.config.section import read_section
from gradiend_core.evaluation.tables import ENCODINGS, ENCODINGS_FILE, GRID, GRID_FILE, METRICS_FILE
from gradiend_core.files import read_json
from gradiend_core.plotting.decoder import plot_decoder
from gradiend_core.plotting.encoder import plot_encodings
from gradiend_core.plotting.style import save_figure
from gradiend_core.plotting.training import plot_training, training_curves
from gradiend_core.tables import read_table
from gradiend_core.training.tables import HISTORY, HISTORY_FILE
from pipeline.stage import Outputs, stage_parser


def main(argv: list[str]) -> None:
    """Write training, encoder and decoder as PNG and PDF, and training.csv."""
    parser = stage_parser("plot", __doc__)
    parser.add_argument("--name", required=True, help="the run's name, for titles")
    parser.add_argument("--target-classes", required=True, nargs=2, help="the two classes, +1 first")
    parser.add_argument("--seed-report", required=True, type=Path, help="the report on the seeds")
    parser.add_argument("--seed-runs", required=True, type=Path, help="folder with one folder per seed")
    parser.add_argument("--encoder", required=True, type=Path, help="folder of the encoder evaluation")
    parser.add_argument("--decoder", required=True, type=Path, help="folder of the decoder evaluation")
    parser.add_argument("--output", required=True, type=Path, help="folder of the figures")
    arguments = parser.parse_args(argv)
    params = read_section(Plot, arguments.params)
    report = read_json(arguments.seed_report)
    runs = {run["seed"]: run for run in report["runs"]}
    histories = {seed: arguments.seed_runs / str(seed) / HISTORY_FILE for seed in runs}
    encodings, grid = arguments.encoder / ENCODINGS_FILE, arguments.decoder / GRID_FILE
    selections = arguments.decoder / METRICS_FILE
    inputs = [arguments.seed_report, *histories.values(), encodings, grid, selections]
    with Outputs("plot", arguments.manifest, params.model_dump(), inputs) as outputs:
        decoder = read_json(selections)
        first, second = arguments.target_classes
        curves = {seed: read_table(file, HISTORY) for seed, file in histories.items()}
        figures = {
            "training": plot_training(
                curves,
                {seed: run["best_checkpoint_global_step"] for seed, run in runs.items()},
                selected_seed=report["best_seed"],
                converged={seed: run["converged"] for seed, run in runs.items()},
                stopped_steps={seed: step for seed, run in runs.items() if (step := run["stopped_step"]) is not None},
                target_classes=(first, second),
                title=arguments.name,
                class_mean_threshold=report["convergent_mean_by_class_threshold"],
            ),
            "encoder": plot_encodings(
                read_table(encodings, ENCODINGS), target_classes=(first, second), title=arguments.name
            ),
            "decoder": plot_decoder(
                read_table(grid, GRID),
                decoder["classes"],
                target_classes=(first, second),
                title=arguments.name,
                lms_threshold=decoder["lms_ratio"],
            ),
        }
        training_curves(curves).to_csv(outputs.path(arguments.output / "training.csv"), index=False)
        for name, figure in figures.items():
            save_figure(figure, outputs.path(arguments.output / f"{name}.png"), dpi=params.dpi)
            save_figure(figure, outputs.path(arguments.output / f"{name}.pdf"), dpi=params.dpi)
