"""Replaces `pipeline/__main__.py`: every stage sleeps for SLEEP seconds and writes its outputs, all of them small.

Imports as little as it can, so that a stage costs no more than the start of Python.
"""

import os
import sys
import time

MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES = {
    "check_params": [],
    "corpus_grammar": ["texts.parquet"],
    "base_model_trained": [*MODEL, "metrics.json"],
    "generate_data": ["training.parquet", "neutral.parquet"],
    "pre_prune": [""],
    "cache_gradients": ["shard-{shard}.safetensors", "shard-{shard}.parquet"],
    "train": ["model.safetensors", "config.json", "history.parquet", "runners_up.safetensors", "metrics.json"],
    "select_seed": [""],
    "post_prune": ["model.safetensors", "config.json", "metrics.json"],
    "evaluate_encoder": ["encodings.parquet", "metrics.json", "details.json"],
    "evaluate_decoder": ["grid.parquet", "metrics.json"],
    "rewrite_model": [f"{target}/{name}" for target in ("X", "Y") for name in ("README.md", *MODEL)],
    "plot": [
        "training.csv",
        *(f"{figure}.{kind}" for figure in ("training", "encoder", "decoder") for kind in ("png", "pdf")),
    ],
}


def main(stage, argv):
    time.sleep(float(os.environ.get("SLEEP", "0")))
    if stage == "check_params":
        return
    values = {argv[i].removeprefix("--"): argv[i + 1] for i in range(len(argv) - 1) if argv[i].startswith("--")}
    paths = [os.path.join(values["output"], name.format(**values)).rstrip("/") for name in FILES[stage]]
    for path in [*paths, values["manifest"]]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.aside", "w") as file:
            file.write(f"{stage} {argv} {path}\n")
        os.replace(f"{path}.aside", path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
