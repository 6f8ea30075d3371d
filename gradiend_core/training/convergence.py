"""When a seed counts as converged, why it does not, and which seed is kept (semantics, section 6)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.errors import GradiendError
from gradiend_core.training.stability import exact_interval

# Encodings whose class means stay nearer to 0 than this have hardly moved: an encoder starts near 0.
_UNMOVED = 0.1

Metrics = Mapping[str, Any]


def failed_conditions(metrics: Metrics, params: SelectSeed) -> list[str]:
    """What keeps a seed from having converged, in words; empty when it has.

    All must hold at the best step: it is not step 0; the metric reaches its threshold (the correlation from below,
    the loss from above); and, for the correlation, the class means have opposite signs and the smaller |class mean|
    reaches its threshold. Seeds are oriented, so the signed correlation is its magnitude and there is no dead zone.
    A training that stopped because its numbers were no longer finite has not converged, whatever it had reached.
    """
    if stopped := metrics.get("stopped"):
        return [stopped.removeprefix(f"seed {metrics.get('seed')} ")]  # who it is about is said with every reason
    failed = []
    if metrics["best_step"] == 0:
        failed.append("no step improved on the initial weights")
    score, threshold = _score(metrics, params), params.score_threshold
    if score is None:
        failed.append(f"no {params.convergent_metric} was found")
    elif params.convergent_metric == "loss":
        return failed + ([f"loss {score:.4g} > {threshold:g}"] if score > threshold else [])
    elif score < threshold:
        failed.append(f"correlation {score:.3f} < {threshold:g}")
    if params.convergent_metric == "correlation":
        failed += _failed_means(metrics, params.convergent_mean_by_class_threshold)
    return failed


def _failed_means(metrics: Metrics, threshold: float) -> list[str]:
    positive, negative = metrics.get("mean_positive"), metrics.get("mean_negative")
    if positive is None or negative is None:
        return ["a target class has no encoding"]
    failed = []
    if positive * negative >= 0:
        failed.append(f"class means {positive:.3f} and {negative:.3f} lie on one side")
    if (smallest := min(abs(positive), abs(negative))) < threshold:
        failed.append(f"smallest |class mean| {smallest:.3f} < {threshold:g}")
    return failed


def diagnoses(metrics: Metrics, params: SelectSeed) -> dict[str, str]:
    """What went wrong with a seed, and for each what to try; empty when nothing did.

    A converged seed may have a decoder that explains nothing: convergence is about the encoder.
    """
    if metrics.get("stopped"):
        return {"diverged": _ADVICE["diverged"]}
    found = {}
    if failed_conditions(metrics, params):
        name = _cause(metrics, params)
        found[name] = _ADVICE[name]
    if (r2 := metrics.get("r2")) is not None and r2 <= 0:
        found["decoder explains nothing"] = _ADVICE["decoder explains nothing"]
    return found


_ADVICE = {
    "diverged": "lower train.learning_rate, set train.max_grad_norm, or warm up (train.lr_scheduler_type"
    " constant_with_warmup and train.warmup_steps)",
    "no movement": "raise train.learning_rate or train.max_steps; with train.scaling reference the rate that works"
    " depends on the number of entries, scale_free has one for all",
    "both classes on one side": "lower train.learning_rate and use train.scaling scale_free, for the biases may have"
    " run ahead of the weights; an encoder of relu or sigmoid has one side only, tanh has two",
    "turned around": "only encoders of tanh, smht and id can be turned so that the first class is positive; use one of"
    " them, or another seed",
    "classes overlap": "raise train.max_steps, keep other entries (pre_prune.topk, pre_prune.n_samples) or give more"
    " rows; the base model may not know the feature",
    "classes too near": "raise train.max_steps or train.learning_rate, or lower"
    " select_seed.convergent_mean_by_class_threshold",
    "a class is missing": "give the validation split rows of both target classes",
    "loss too large": "raise train.max_steps, or select_seed.convergent_score_threshold",
    "decoder explains nothing": "raise train.max_steps or train.train_batch_size; rewriting with this decoder will do"
    " little more than chance",
}


def _cause(metrics: Metrics, params: SelectSeed) -> str:
    """The one name of `_ADVICE` that explains best why the seed has not converged."""
    if metrics["best_step"] == 0:
        return "no movement"
    if params.convergent_metric == "loss":
        return "loss too large"
    positive, negative, correlation = (metrics.get(key) for key in ("mean_positive", "mean_negative", "correlation"))
    if positive is None or negative is None:
        return "a class is missing"
    if max(abs(positive), abs(negative)) < _UNMOVED:
        return "no movement"
    if positive * negative >= 0:
        return "both classes on one side"
    if positive < negative:
        return "turned around"
    return "classes overlap" if (correlation or 0) < params.score_threshold else "classes too near"


def seed_report(metrics: Mapping[int, Metrics], params: SelectSeed) -> dict[str, Any]:
    """Take the seeds in order until enough have converged; keep the best of those taken.

    Best is the highest selection score (the validation correlation, or minus the validation loss) among the converged
    seeds, else the highest of those that were trained to the end; ties keep the earlier seed. Every seed is evaluated
    on the same rows, so scores compare (WEAK-05). The result is what the sequential reference decides, although the
    seeds ran in parallel; the share of converged seeds and its interval are those of all of them.

    Args:
        metrics: per seed its metrics.json, in the order of selection; `max_seeds` of them count.

    Raises:
        GradiendError: every seed stopped: what is left of them are weights from before the end, which say nothing
            about the feature and are not worth evaluating.
    """
    considered = dict(list(metrics.items())[: params.max_seeds])
    everyone = [_run(seed, found, params) for seed, found in considered.items()]
    enough, runs = params.min_convergent_seeds, everyone
    if enough is not None:
        reached = [number for number, run in enumerate(everyone, start=1) if run["converged"]][enough - 1 : enough]
        runs = everyone[: reached[0]] if reached else everyone
    converged = [run for run in runs if run["converged"]]
    finished = [run for run in runs if "diverged" not in run["diagnoses"]]
    if not finished:
        raise GradiendError(f"every seed diverged, so that there is no model to go on with:\n{_explained(runs)}")
    best = max(converged or finished, key=_rank)
    fallback = "highest_correlation_fallback" if params.convergent_metric == "correlation" else "lowest_loss_fallback"
    successes = sum(run["converged"] for run in everyone)
    low, high = exact_interval(successes, len(everyone))
    stopped = enough is not None and len(converged) >= enough
    reason = f"min_convergent_seeds reached: {len(converged)} >= {enough} with metric={params.convergent_metric}"
    return {
        "convergence_metric": params.convergent_metric,
        "threshold": params.score_threshold,
        "convergent_mean_by_class_threshold": params.convergent_mean_by_class_threshold,
        "min_convergent_seeds": enough,
        "max_seeds": len(everyone),
        "seeds_tried": [run["seed"] for run in runs],
        "convergent_count": len(converged),
        "convergent_seeds": [run["seed"] for run in converged],
        "convergent_fraction": successes / len(everyone),
        "convergent_fraction_low": low,
        "convergent_fraction_high": high,
        "best_seed": best["seed"],
        "best_selection_score": best["selection_score"],
        "best_seed_selection_strategy": "best_convergent_selection_score" if converged else fallback,
        "early_stop_reason": f"{reason} threshold={params.score_threshold:g}" if stopped else None,
        "runs": runs,
    }


def non_convergence(report: Mapping[str, Any]) -> str | None:
    """Why each seed failed and what to try, when fewer seeds converged than are needed; else None."""
    needed = report["min_convergent_seeds"] or 1
    if report["convergent_count"] >= needed:
        return None
    found = f"{report['convergent_count']} of {len(report['runs'])} seeds converged, {needed} needed:"
    return f"{found}\n{_explained(report['runs'])}"


def _explained(runs: Sequence[Mapping[str, Any]]) -> str:
    """For each seed why it has not converged, and for each cause what to try."""
    lines = [f"  seed {run['seed']}: {'; '.join(run['reasons']) or 'converged'}" for run in runs]
    advice = {name: text for run in runs for name, text in run["diagnoses"].items()}
    lines += [f"  {name}: {text}" for name, text in advice.items()]
    return "\n".join([*lines, "  More seeds (`seeds`) are more chances. What was trained stays under seeds/."])


def _score(metrics: Metrics, params: SelectSeed) -> float | None:
    return metrics.get("eval_loss" if params.convergent_metric == "loss" else "correlation")


def _rank(run: Mapping[str, Any]) -> float:
    score = run["selection_score"]
    return -math.inf if score is None else float(score)


def _run(seed: int, metrics: Metrics, params: SelectSeed) -> dict[str, Any]:
    """A seed's part of the report."""
    failed, score = failed_conditions(metrics, params), _score(metrics, params)
    correlation, r2 = metrics.get("correlation"), metrics.get("r2")
    means = [metrics.get(name) for name in ("mean_positive", "mean_negative")]
    known = [abs(mean) for mean in means if mean is not None]
    selection = -score if score is not None and params.convergent_metric == "loss" else score
    return {
        "seed": seed,
        "converged": not failed,
        "reasons": failed,
        "diagnoses": diagnoses(metrics, params),
        "training_score": correlation,
        "eval_correlation": correlation,
        "eval_correlation_low": metrics.get("correlation_low"),
        "eval_correlation_high": metrics.get("correlation_high"),
        "selection_score": selection,
        "convergence_metric": params.convergent_metric,
        "convergence_metric_value": score,
        "threshold": params.score_threshold,
        "best_checkpoint_global_step": metrics["best_step"],
        "stopped_step": metrics.get("stopped_step"),
        "convergent_mean_by_class_threshold": params.convergent_mean_by_class_threshold,
        "convergent_min_target_class_abs_mean": min(known, default=None),
        "r2": r2,
    }
