"""One training on a store: whether it converges, and how much of the test rows it explains."""

import time
from typing import Any

from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.config.train import Train
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.training.convergence import failed_conditions
from gradiend_core.training.loop import r_squared, train

STEPS = {"max_steps": 300, "eval_steps": 25}  # as the demo


def run(store: GradientStore, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train with the defaults but for `settings`; judge as select_seed does with its defaults."""
    params = Train.model_validate(STEPS | settings)
    start = time.perf_counter()
    trained = train(store, params, seed)
    seconds = time.perf_counter() - start
    best = trained.history.loc[trained.history["step"] == trained.best_step].iloc[0].to_dict()
    reasons = failed_conditions(best | {"best_step": trained.best_step}, SelectSeed.model_validate({}))
    test = store.positions(split="test", kind=TRAINING)
    source, target = (store.rows(quantity, test) for quantity in (params.source, params.target))
    return {
        "seed": seed,
        "converged": not reasons,
        "reasons": reasons,
        "correlation": float(best["correlation"]),
        "smallest_mean": min(abs(float(best["mean_positive"])), abs(float(best["mean_negative"]))),
        "test_r2": r_squared(target, trained.model(source).detach()),
        "best_step": int(trained.best_step),
        "seconds": seconds,
    }
