"""What manifests say of artifacts, and refusing inputs that are something else."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gradiend_core.errors import GradiendError

FOLDER: Final = Path("artifacts/manifests")
_STAGE_OUTPUT: Final = re.compile("artifacts/[^/]+/[^/]+")


def outputs(manifest: Path) -> dict[str, str]:
    """SHA-256 of the files that a manifest names as its stage's outputs, by their paths.

    Raises `ValueError` when it is not a manifest, `OSError` when it cannot be read.
    """
    content = json.loads(manifest.read_bytes())
    listed = content.get("outputs") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        raise ValueError("it has no outputs")
    return listed


def refuse_damaged(inputs: Mapping[str, str]) -> None:
    """Raise `GradiendError` for an input (path to SHA-256) that is not as the stage that made it has written it.

    A guard, not an input: it can refuse but never changes a result. An input that no manifest names is not looked at,
    nor is a damaged manifest: the engine restores it in its turn.
    """
    # artifacts/KIND/NAME or artifacts/KIND/NAME/…
    pending = {path: digest for path, digest in inputs.items() if _STAGE_OUTPUT.match(path)}
    wrong: dict[str, Path] = {}
    for manifest in _candidates({Path(path).parts[2] for path in pending}):
        if not pending:
            return
        try:
            listed = outputs(manifest)
        except (ValueError, OSError, RecursionError):
            continue
        for path in pending.keys() & listed.keys():
            if listed[path] == pending[path]:
                del pending[path]
            else:
                wrong[path] = manifest
    for path in sorted(wrong.keys() & pending.keys()):
        raise GradiendError(
            f"{path}: damaged or replaced: it is not the file of which {wrong[path]} tells."
            " Run `python -m pipeline.verify`, then `snakemake` or `dvc repro`, which puts the right one in place."
        )


def _candidates(names: set[str]) -> Iterator[Path]:
    """The manifests of these runs, models, datasets and corpora: `<name>.json` and `<name>-<seed or shard>.json`."""
    for folder in sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".json" and any(path.stem == name or path.stem.startswith(f"{name}-") for name in names):
                yield path
