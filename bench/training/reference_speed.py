"""The train stage of a run, all seeds, beside the reference package's training on the same rows.

    python -m bench.training.reference_speed --run pronoun_number --python bench/.venv-reference/bin/python

The package computes gradients inside its loop: imports, loading, one evaluation of the validation rows and `--steps`
steps are measured and scaled to the run's steps, evaluations and seeds. It pads to 256 tokens, or to the positions of
the model where it has fewer. Two ratios: of whole processes, imports included, as the pipeline starts them (one per
seed); and of what comes after the imports. All times are processor seconds of one thread, so that other work on the
machine does not count. Writes bench/results/training_speed.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import yaml
from safetensors.torch import load_file, save_file

from gradiend_core.config.train import Train
from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.statistics import pearson
from gradiend_core.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "training_speed.json"
LIMIT = 50.0
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
}


def main() -> None:
    """Measure both, print and write the ratio and the test correlations."""
    parser = argparse.ArgumentParser(prog="python -m bench.training.reference_speed", description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts", help="artifacts of a finished run")
    parser.add_argument("--run", default="pronoun_number", help="its key in params.yaml")
    parser.add_argument("--python", type=Path, default=ROOT / "bench/.venv-reference/bin/python")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="steps of the package that are measured")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="the package's (default: its own default)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    project = arguments.artifacts.resolve().parent
    settings = yaml.safe_load((project / "params.yaml").read_text("utf-8"))["runs"][arguments.run]
    params = Train.model_validate(settings["train"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ours = [_stage(project, arguments.run, seed, folder) for seed in range(arguments.seeds)]
        alone = [_alone(project, arguments.run, params, seed) for seed in range(arguments.seeds)]
        cache = _cache(project, arguments.run, folder)
        theirs = _reference(project, settings, params, folder, arguments)
        store = GradientStore.open(project / "artifacts/runs" / arguments.run / "gradients")
        test = store.positions(split="test", kind=TRAINING)
        labels = store.index["label"].to_numpy()[test.numpy()]
        source = store.rows("alternative", test)
        ours_models = [GradiendModel.from_pretrained(folder / str(seed)) for seed in range(arguments.seeds)]
        encoder = load_file(folder / "encoder.safetensors")
        theirs_encoded = torch.tanh(source @ encoder["weight"].T + encoder["bias"])[:, 0]
    evaluations = params.max_steps // params.eval_steps + 1
    loop = theirs["load"] + evaluations * theirs["evaluation"] + params.max_steps * median(theirs["steps"])
    whole = arguments.seeds * (theirs["imports"] + loop)
    found = {
        "run": arguments.run,
        "n": store.n,
        "seeds": arguments.seeds,
        "steps": params.max_steps,
        "evaluations": evaluations,
        "ours_seconds": sum(ours),
        "ours_after_imports_seconds": sum(alone),
        "cache_gradients_seconds": cache,
        "reference_seconds": whole,
        "reference_measured": theirs | {"steps": len(theirs["steps"]), "step": median(theirs["steps"])},
        "reference_learning_rate": arguments.learning_rate,
        "ratio": whole / sum(ours),
        "ratio_after_imports": arguments.seeds * loop / sum(alone),
        "ratio_with_cache_gradients": whole / (sum(ours) + cache),
        "limit": LIMIT,
        # The alternative gradient of a row points to the class that is not its own.
        "test_correlation_ours": [
            pearson(model.encode(source).detach()[:, 0].double().numpy(), -labels) for model in ours_models
        ],
        "test_correlation_reference": abs(pearson(theirs_encoded.double().numpy(), -labels)),
        "reference_correlation_after_steps": len(theirs["steps"]),
    }
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results[arguments.run] = found
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    for name in ("ratio", "ratio_after_imports"):
        print(f"{name} {found[name]:.0f}x, limit {LIMIT:g}x: {'pass' if found[name] >= LIMIT else 'MISS'}")


def _stage(project: Path, run: str, seed: int, folder: Path) -> float:
    """Seconds of `python -m pipeline train` for one seed, from the start of the process to its end."""
    gradients = project / "artifacts/runs" / run / "gradients"
    return _run(
        project,
        *("train", "--params", f"runs.{run}.train", "--seed", str(seed), "--gradients", str(gradients)),
        *("--output", str(folder / str(seed)), "--manifest", str(folder / f"{seed}.json")),
    )


def _alone(project: Path, run: str, params: Train, seed: int) -> float:
    """Seconds of opening the store and training."""
    start = time.process_time()
    train(GradientStore.open(project / "artifacts/runs" / run / "gradients"), params, seed)
    return time.process_time() - start


def _cache(project: Path, run: str, folder: Path) -> float:
    """Seconds of the stage before it, which the package has no counterpart of: all gradients, once for all seeds."""
    return _run(
        project,
        *("cache_gradients", "--params", f"runs.{run}.cache_gradients", "--shards", "gradient_shards", "--shard", "0"),
        *("--selection", str(project / "artifacts/runs" / run / "selection.safetensors")),
        *("--output", str(folder / "gradients"), "--manifest", str(folder / "gradients.json")),
    )


def _run(project: Path, *stage: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # -P: this code, not that of the project whose artifacts are read
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-P", "-m", "pipeline", *stage], cwd=project, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _reference(
    project: Path, settings: dict[str, Any], params: Train, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What the worker measured, with the entries of the run's selection."""
    store = GradientStore.open(project / "artifacts/runs" / arguments.run / "gradients")
    kept = {name: k for name, k in zip(store.selection.names, store.selection.kept, strict=True) if k is not None}
    save_file(kept, folder / "kept.safetensors")
    # The package's environment has no Parquet.
    rows = pd.read_parquet(project / "artifacts/datasets" / settings["dataset"] / "training.parquet")
    rows.to_json(folder / "rows.json", orient="records")
    command = [
        *(arguments.python.absolute(), ROOT / "bench/training/reference_worker.py"),
        *("--base-model", project / "artifacts/base_models" / settings["base_model"]),
        *("--rows", folder / "rows.json"),
        *("--classes", *settings["target_classes"], "--kept", folder / "kept.safetensors"),
        *("--steps", arguments.steps, "--batch-size", params.train_batch_size),
        *("--learning-rate", arguments.learning_rate, "--encoder", folder / "encoder.safetensors"),
    ]
    # The package writes files beside itself.
    answer = subprocess.run(
        list(map(str, command)), cwd=folder, env=os.environ | QUIET, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
