"""Replaces `pipeline/__main__.py` in the tests of the engines: every stage, quick, deterministic and logged.

Outputs depend on the stage's name, `SALT` of its program, its parameters and the bytes of the files it is given. Each
execution appends its manifest's path to `executed.log`. A file `break-STAGE` makes a stage spoil an output and fail.
"""

import hashlib
import importlib
import json
import sys
from pathlib import Path

import yaml

from gradiend_core.errors import GradiendError

MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES = {
    "corpus_grammar": ["texts.parquet"],
    "corpus_text": ["texts.parquet"],
    "base_model_trained": [*MODEL, "metrics.json"],
    "base_model_local": MODEL,
    "base_model_hub": MODEL,
    "generate_data": ["training.parquet", "neutral.parquet"],
    "pre_prune": [""],
    "cache_gradients": ["shard-{shard}.safetensors", "shard-{shard}.parquet"],
    "train": ["model.safetensors", "config.json", "history.parquet", "runners_up.safetensors", "metrics.json"],
    "select_seed": [""],
    "post_prune": ["model.safetensors", "config.json", "metrics.json"],
    "evaluate_encoder": ["encodings.parquet", "metrics.json", "details.json"],
    "evaluate_decoder": ["grid.parquet", "metrics.json"],
    "rewrite_model": [f"{{target}}/{name}" for name in ["README.md", *MODEL]],
    "plot": [
        "training.csv",
        *(f"{figure}.{kind}" for figure in ("training", "encoder", "decoder") for kind in ("png", "pdf")),
    ],
}


def lookup(params: object, key: str) -> object:
    for part in key.split("."):
        params = params[part]  # type: ignore[index]
    return params


def main(stage: str, argv: list[str]) -> int:
    check_params = importlib.import_module("pipeline.check_params")
    try:
        check_params.check()
    except GradiendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if stage == "check_params":
        check_params.write_checked()
        return 0
    arguments: dict[str, list[str]] = {}
    for argument in argv:
        if argument.startswith("--"):
            values = arguments.setdefault(argument[2:], [])
        else:
            values.append(argument)
    params = yaml.safe_load(Path("params.yaml").read_text())
    (output,), (manifest,) = arguments.pop("output"), arguments.pop("manifest")
    with Path("executed.log").open("a") as log:
        log.write(f"{manifest}\n")
    digest = hashlib.sha256(importlib.import_module(f"pipeline.{stage}").SALT.encode())
    section = [lookup(params, key) for key in arguments.get("params", [])]
    digest.update(json.dumps([stage, section, arguments], sort_keys=True).encode())
    for path in (Path(value) for values in arguments.values() for value in values):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not any(part.startswith(".") for part in file.parts):
                digest.update(file.read_bytes())
    targets = params["runs"][output.split("/")[2]]["target_classes"] if stage == "rewrite_model" else [""]
    shard = arguments.get("shard", [""])[0]
    names = dict.fromkeys(name.format(shard=shard, target=target) for name in FILES[stage] for target in targets)
    paths = [Path(output, name) if name else Path(output) for name in names] + [Path(manifest)]
    if Path(f"break-{stage}").exists():
        paths[0].write_text("spoilt")
        print("error: broken on purpose", file=sys.stderr)
        return 1
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".partial-{path.name}")
        aside.write_text(json.dumps({"value": int(digest.hexdigest()[:8], 16), "file": path.name}))
        aside.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
