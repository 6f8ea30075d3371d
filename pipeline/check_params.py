"""Check the whole params file before the first job starts."""

import argparse
from pathlib import Path

from gradiend_core.config.params import Params, validate_params
from gradiend_core.config.section import PARAMS_FILE, read_params


def check(path: Path = PARAMS_FILE) -> Params:
    """The validated file; raises `GradiendError` listing every problem."""
    return validate_params(read_params(path), where=str(path))


def main(argv: list[str]) -> None:
    """Check a params file and say so."""
    parser = argparse.ArgumentParser(prog="python -m pipeline check_params", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=PARAMS_FILE)
    arguments = parser.parse_args(argv)
    params = check(arguments.path)
    print(f"{arguments.path}: {len(params.runs)} runs x {len(params.seeds)} seeds, all parameters are valid")
