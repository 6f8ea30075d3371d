"""A params.yaml of any number of features, and how many stages it makes."""

import json
import math

SEEDS, SHARDS = 5, 2
# Stages of one run: its dataset, its shards and seeds, and the seven that a run has one of.
STAGES_PER_RUN = 1 + SHARDS + SEEDS + 7
STAGES_ONCE = 3  # check_params, the corpus and the base model
_SHARED = {
    "pre_prune": {"topk": 0.01, "n_samples": 64},
    "cache_gradients": {},
    "train": {"max_steps": 300, "eval_steps": 25},
    "select_seed": {"min_convergent_seeds": None},
    "post_prune": {},
    "evaluate_encoder": {},
    "evaluate_decoder": {"lrs": [0.5, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01]},
    "plot": {},
}


def runs_for(stages: int) -> int:
    """The least number of runs that make at least so many stages."""
    return math.ceil((stages - STAGES_ONCE) / STAGES_PER_RUN)


def stages_of(runs: int) -> int:
    """How many stages so many runs make."""
    return STAGES_ONCE + runs * STAGES_PER_RUN


def params(runs: int) -> str:
    """A valid params.yaml of so many features, each with a dataset of its own; sections are shared as in the demo's."""
    lines = [f"seeds: {list(range(SEEDS))}", f"gradient_shards: {list(range(SHARDS))}", "corpora:"]
    lines += ["  grammar:", "    english: {path: words, max_size: 30000, seed: 0}", "  text: {}"]
    lines += [
        "base_models:",
        "  trained:",
        "    tiny: {corpus: english, vocab_size: 3000, model: {hidden_size: 64}, training: {max_steps: 9}}",
    ]
    lines += ["  local: {}", "  hub: {}", "datasets:"]
    for run in range(runs):
        lines += [f"  feature_{run}:", "    corpus: english", "    classes: {X: [he, she, it], Y: [they]}"]
        lines += ["    max_size_per_class: 450", "    neutral_max_size: 600"]
    lines.append("runs:")
    for run in range(runs):
        lines += [f"  feature_{run}:", "    base_model: tiny", f"    dataset: feature_{run}"]
        lines.append("    target_classes: [X, Y]")
        for stage, section in _SHARED.items():
            lines.append(f"    {stage}: " + (f"*{stage}" if run else f"&{stage} {json.dumps(section)}"))
    return "\n".join(lines) + "\n"
