"""The project itself in a folder of its own, and parameters so small that all of its stages run in a minute."""

import shutil
from pathlib import Path
from typing import Any

from project import ROOT, Project

_REAL = ["Snakefile", "dvc.yaml", ".dvc/config", ".dvc/plots", ".dvcignore", ".gitignore", "profiles", "workflow"]
_REAL += ["pipeline", "gradiend_core", "data", "versions.yaml"]

TINY: dict[str, Any] = {
    "seeds": [0, 1],
    "gradient_shards": [0, 1],
    "corpora": {"grammar": {"english": {"path": "data/english", "max_size": 2000}}, "text": {}},
    "base_models": {
        "trained": {
            "tiny": {
                "corpus": "english",
                "vocab_size": 600,
                "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
                "training": {"max_steps": 20, "learning_rate": 5.0e-3, "per_device_train_batch_size": 32},
                "probe_words": ["he", "she", "they"],
            }
        },
        "local": {},
        "hub": {},
    },
    "datasets": {
        "gender": {
            "corpus": "english",
            "classes": {"masculine": ["he"], "feminine": ["she"]},
            "min_left_context_words": 2,
            "max_size_per_class": 60,
            "neutral_max_size": 30,
        }
    },
    "runs": {
        "gender": {
            "base_model": "tiny",
            "dataset": "gender",
            "target_classes": ["masculine", "feminine"],
            "pre_prune": {"topk": 0.1},
            "cache_gradients": {},
            "train": {"max_steps": 20, "eval_steps": 5, "train_batch_size": 8},
            "select_seed": {"min_convergent_seeds": None},
            "post_prune": {"topk": 0.5},
            "evaluate_encoder": {"bootstrap_samples": 50},
            "evaluate_decoder": {"lrs": [1.0, 0.1], "bootstrap_samples": 50},
            "plot": {"dpi": 72},
        }
    },
}


def real_project(folder: Path) -> Project:
    """The project itself, without parameters."""
    for name in _REAL:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    project = Project(folder, folder.with_name(f"{folder.name}-site"))
    project.run("git", "init", "--quiet")
    return project
