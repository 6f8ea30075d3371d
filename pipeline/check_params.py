"""Check the whole params file before the first job starts."""

import argparse
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gradiend_core.config.params import Params, validate_params
from gradiend_core.config.section import PARAMS_FILE, read_params
from gradiend_core.errors import GradiendError
from gradiend_core.files import write_whole

CHECKED: Final = Path("artifacts/params_checked.txt")
"""What every other stage of dvc.yaml depends on, so that DVC checks before it touches their outputs."""

# Always the same, so that nothing but the check is due when params.yaml has changed.
_TEXT: Final = "params.yaml was checked as a whole before anything else was done.\n"


def check(path: Path = PARAMS_FILE) -> Params:
    """The validated file; raises `GradiendError` listing every problem."""
    return validate_params(read_params(path), where=str(path))


def check_for_engines(path: Path = PARAMS_FILE) -> Params:
    """Like `check`; also raises `GradiendError` where DVC, which makes command lines of it, reads another value."""
    read = read_params(path)
    params = validate_params(read, where=str(path))
    try:
        difference = _difference(read, YAML(typ="safe").load(path.read_text("utf-8")))
    except YAMLError as error:
        raise GradiendError(f"{path}: not valid YAML for DVC: {' '.join(str(error).split())}") from None
    if difference:
        raise GradiendError(
            f"{path}: {difference} for DVC. Write numbers without leading zeros, true or false for yes, no, on and off,"
            " and put quotes around what is text."
        )
    return params


def _difference(ours: Any, theirs: Any, place: str = "") -> str | None:
    """Where two readings of a file differ first, and in what."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        inside = [(f"{place}.{key}", value, theirs[key]) for key, value in ours.items()]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        inside = [(f"{place}[{i}]", value, theirs[i]) for i, value in enumerate(ours)]
    else:
        same = type(ours) is type(theirs) and ours == theirs
        return None if same else f"{place.lstrip('.')}: {ours!r} for the stages, but {theirs!r}"
    differences = (_difference(one, other, where) for where, one, other in inside)
    return next(filter(None, differences), None)


def write_checked(path: Path = CHECKED) -> None:
    """Write the file that says that all was checked."""
    write_whole(path, _TEXT)


def main(argv: list[str]) -> None:
    """Check a params file and say so."""
    parser = argparse.ArgumentParser(prog="python -m pipeline check_params", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=PARAMS_FILE)
    parser.add_argument("--output", type=Path, help="a file that is written when all is valid, always the same")
    arguments = parser.parse_args(argv)
    params = check_for_engines(arguments.path)
    if arguments.output is not None:
        write_checked(arguments.output)
    print(f"{arguments.path}: {len(params.runs)} runs x {len(params.seeds)} seeds, all parameters are valid")
