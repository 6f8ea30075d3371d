"""When a seed counts as converged, and which seed is kept (semantics, section 6)."""

from collections.abc import Mapping
from typing import Any

from gradiend_core.config.select_seed import SelectSeed


def failed_conditions(metrics: Mapping[str, Any], params: SelectSeed) -> list[str]:
    """What keeps a seed from having converged, in words; empty when it has.

    All must hold at the best step: it is not step 0; the validation correlation reaches its threshold; the class
    means have opposite signs; the smaller |class mean| reaches its threshold. Seeds are oriented, so the signed
    correlation is its magnitude and there is no dead zone.
    """
    positive, negative = metrics["mean_positive"], metrics["mean_negative"]
    failed = []
    if metrics["best_step"] == 0:
        failed.append("no step improved on the initial weights")
    if metrics["correlation"] < params.convergent_score_threshold:
        failed.append(f"correlation {metrics['correlation']:.3f} < {params.convergent_score_threshold:g}")
    if positive * negative >= 0:
        failed.append(f"class means {positive:.3f} and {negative:.3f} lie on one side")
    if min(abs(positive), abs(negative)) < params.convergent_mean_by_class_threshold:
        smallest = min(abs(positive), abs(negative))
        failed.append(f"smallest |class mean| {smallest:.3f} < {params.convergent_mean_by_class_threshold:g}")
    return failed


def seed_report(metrics: Mapping[int, Mapping[str, Any]], params: SelectSeed) -> dict[str, Any]:
    """Take the seeds in order until enough have converged; keep the best of those taken.

    Best is the highest validation correlation among the converged seeds, else the highest of all; ties keep the
    earlier seed. Every seed is evaluated on the same rows, so scores compare (WEAK-05). The result is what the
    sequential reference decides, although the seeds ran in parallel.

    Args:
        metrics: per seed its metrics.json, in the order of selection.
    """
    runs: list[dict[str, Any]] = []
    enough = params.min_convergent_seeds
    for seed, found in metrics.items():
        if enough is not None and sum(run["converged"] for run in runs) >= enough:
            break
        failed = failed_conditions(found, params)
        runs.append(
            {
                "seed": seed,
                "converged": not failed,
                "reasons": failed,
                "eval_correlation": found["correlation"],
                "best_checkpoint_global_step": found["best_step"],
                "convergent_min_target_class_abs_mean": min(abs(found["mean_positive"]), abs(found["mean_negative"])),
                "r2": found["r2"],
            }
        )
    converged = [run for run in runs if run["converged"]]
    best = max(converged or runs, key=lambda run: float(run["eval_correlation"]))
    return {
        "convergence_metric": "correlation",
        "threshold": params.convergent_score_threshold,
        "convergent_mean_by_class_threshold": params.convergent_mean_by_class_threshold,
        "min_convergent_seeds": enough,
        "max_seeds": len(metrics),
        "seeds_tried": len(runs),
        "convergent_count": len(converged),
        "convergent_seeds": [run["seed"] for run in converged],
        "best_seed": best["seed"],
        "best_selection_score": best["eval_correlation"],
        "runs": runs,
    }
