"""Reference values that need no language model: encoder metrics, convergence, candidate selection."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import tiny_model
import torch
from gradiend.evaluator.decoder import LMSThresholdPolicy, compute_metric_summaries
from gradiend.evaluator.encoder_metrics import get_encoder_metrics_from_dataframe
from gradiend.model._source_target import feature_factor_from_encoding_direction
from gradiend.trainer.core.arguments import TrainingArguments
from gradiend.trainer.core.training import train as core_train
from gradiend.trainer.text.prediction.model_with_gradiend import TextPredictionModelWithGradiend
from gradiend.trainer.text.prediction.trainer import TextPredictionTrainer

import cases

Values = dict[str, Any]
SMALL_PARAMETER = "bert.embeddings.LayerNorm.bias"


class CannedTrainer(TextPredictionTrainer):
    """The reference trainer, with one canned run for each seed; all decisions stay the package's own."""

    def _train(self, output_dir: str, args: Any, **kwargs: Any) -> str:
        """Run the reference's core loop for two steps, with evaluations read from the case of this seed."""
        evaluations = list(cases.CONVERGENCE.values())[int(output_dir.rsplit("_", 1)[1])]

        def evaluate(config: dict[str, Any], training_stats: dict[str, Any]) -> dict[str, Any]:
            evaluation = evaluations[training_stats["global_step"]]
            return {"correlation": evaluation["correlation"], "mean_by_class": dict(evaluation["mean_by_class"])}

        model = TextPredictionModelWithGradiend.from_pretrained(
            self.model_path, source="alternative", target="diff", params=[SMALL_PARAMETER]
        )
        vector = torch.linspace(-1.0, 1.0, model.gradiend.input_dim).unsqueeze(0)
        batch = {"source": vector, "target": vector, "label": [1]}
        arguments = dataclasses.replace(
            args, output_dir=output_dir, max_steps=2, num_train_epochs=1, eval_steps=1, evaluate_fn=evaluate
        )
        return str(core_train(model, [batch, batch], training_args=arguments))

    def evaluate_encoder(self, *args: Any, **kwargs: Any) -> None:
        """Skip the extra evaluation for seed selection: it does not enter the convergence decision."""


def convergence(folder: Path, rows: list[dict[str, Any]]) -> Values:
    """Single-run and multi-seed convergence decisions on the hand-made runs."""
    count = len(cases.CONVERGENCE)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            experiment_dir=directory, max_seeds=count, min_convergent_seeds=count, seed=0, saved_seed_runs="all_tried"
        )
        trainer = CannedTrainer(
            model=str(folder),
            data=tiny_model.reference_frame(rows),
            target_classes=list(tiny_model.CLASSES),
            alternative_col="alternative",
            alternative_class_col="alternative_class",
            args=arguments,
        )
        trainer.train()
        report_path = Path(str(trainer.get_seed_report_path()))
        report = json.loads(report_path.read_text(encoding="utf-8"))
        stored = [json.loads((Path(run["output_dir"]) / "training.json").read_text()) for run in report["runs"]]
    decided = zip(cases.CONVERGENCE.items(), report["runs"], stored, strict=True)
    return {
        "convergent_score_threshold": report["threshold"],
        "convergent_mean_by_class_threshold": report["convergent_mean_by_class_threshold"],
        "cases": {
            name: {
                "evaluations": string_keys(evaluations),
                "best_step": run["best_checkpoint_global_step"],
                "best_correlation": run["convergence_metric_value"],
                "min_abs_mean": run["convergent_min_target_class_abs_mean"],
                "converged_multi_seed": run["converged"],
                "converged_single_run": training["convergence_info"]["converged"],
            }
            for (name, evaluations), run, training in decided
        },
    }


def encoder_metrics() -> Values:
    """Encoder metrics of the hand-made table, with and without the rows of the third class and the neutral rows."""
    columns = ["type", "source_id", "target_id", "label", "encoded"]
    frame = pd.DataFrame(cases.ENCODINGS, columns=columns)
    pair_only = frame[frame["label"] != 0].reset_index(drop=True)
    return {
        "columns": columns,
        "table": [list(row) for row in cases.ENCODINGS],
        "metrics": string_keys(get_encoder_metrics_from_dataframe(frame)),
        "metrics_of_labelled_rows": string_keys(get_encoder_metrics_from_dataframe(pair_only)),
    }


def selection() -> Values:
    """Candidates that the reference selects for each class under its language-model-score policy."""
    values: Values = {}
    first, second = tiny_model.CLASSES
    for name, case in cases.SELECTION.items():
        results: dict[Any, Any] = {"base": {"id": "base", "lms": {"lms": case["base_lms"]}}}
        for factor, rate, lms, p_first, p_second in case["grid"]:
            identity = {"feature_factor": factor, "learning_rate": rate}
            results[factor, rate] = {"id": identity, "lms": {"lms": lms}, "probs": {first: p_first, second: p_second}}
        summary = compute_metric_summaries(
            results,
            [first, second],
            selector=LMSThresholdPolicy(ratio=case["ratio"]),
            class_to_ff={first: 1.0, second: -1.0},
        )
        values[name] = {**case, "selected": summary}
    return values


def feature_factors() -> Values:
    """The factor that strengthens each class, by source."""
    directions = dict(zip(tiny_model.CLASSES, (1, -1), strict=True))
    return {
        source: {name: feature_factor_from_encoding_direction(d, source) for name, d in directions.items()}
        for source in ("factual", "alternative", "diff")
    }


def string_keys(value: Any) -> Any:
    """Return `value` with every dictionary key turned into text (float labels become "1.0")."""
    if isinstance(value, dict):
        return {str(key): string_keys(item) for key, item in value.items()}
    if isinstance(value, list):
        return [string_keys(item) for item in value]
    return value
