"""Compute the reference values under tests/reference/ with the reference package (see README.md)."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import arguments
import decisions
import gradients
import tiny_model
import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

OUTPUT = Path(__file__).resolve().parents[2] / "tests" / "reference"


def main() -> None:
    """Write the tiny model, the rows and the values."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    shutil.rmtree(OUTPUT / "model", ignore_errors=True)
    (OUTPUT / "model").mkdir(parents=True)
    tiny_model.write_model(OUTPUT / "model")
    rows = tiny_model.write_rows(OUTPUT / "rows.json")

    reference = gradients.Reference(OUTPUT / "model", rows)
    tensors: gradients.Tensors = {}
    values: gradients.Values = {}

    def add(name: str, part: tuple[gradients.Tensors, gradients.Values]) -> None:
        tensors.update(part[0])
        values[name] = part[1]

    add("gradients", reference.gradients())
    add("pre_prune", reference.pre_prune())
    add("init", gradients.initialisation())
    trained_tensors, trained_values, trained = reference.training()
    add("training", (trained_tensors, trained_values))
    add("importance", gradients.importance(trained))
    add("rewrite", reference.rewriting(trained))
    values["scoring"] = reference.scoring(trained)
    values["encoder_metrics"] = decisions.encoder_metrics()
    values["convergence"] = decisions.convergence(OUTPUT / "model", rows)
    values["selection"] = decisions.selection()
    values["feature_factors"] = decisions.feature_factors()

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUTPUT / "values.safetensors")
    for name, found in (("values", values), ("arguments", arguments.arguments())):
        text = json.dumps(found, indent=1, sort_keys=True)
        (OUTPUT / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for path in OUTPUT.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them readable by the owner only


if __name__ == "__main__":
    main()
