"""What all parameter sections share: frozen, strict, no unknown keys, and errors that a user can act on."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from gradiend_core.errors import GradiendError

PARAMS_FILE = Path("params.yaml")

# Names become folders and parts of dotted keys, so they hold neither separators nor dots.
NAME_RULE = "letters, digits, _ and -, the first a letter or digit, at most 64"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A section of params.yaml: immutable, no type coercion, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently drop the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The params file as plain data. Raises `GradiendError` when it is missing or not a YAML mapping."""
    try:
        params = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise GradiendError(f"{path}: cannot be read ({error.strerror}). Run from the folder that holds it.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GradiendError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(params, dict):
        raise GradiendError(f"{path}: must be a mapping with the keys of docs/params.md, not {type(params).__name__}")
    return params


def read_value(key: str, path: Path = PARAMS_FILE) -> Any:
    """The value at a dotted key such as `runs.number.train`."""
    value: Any = read_params(path)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            allowed = [str(name) for name in value] if isinstance(value, dict) else []
            raise GradiendError(f"{path}: {key}: no key {part!r}{near_miss(part, allowed)}")
        value = value[part]
    return value


def read_section(section: type[S], key: str, path: Path = PARAMS_FILE) -> S:
    """The section at a dotted key, validated."""
    return validate(section, read_value(key, path), where=f"{path}: {key}")


def validate(section: type[S], data: Any, where: str) -> S:
    """Build a section; every problem becomes one line of a `GradiendError`: place, what is wrong, what is allowed.

    `where` is the file, or `file: dotted.key` for a section inside it.
    """
    try:
        return section.model_validate(data)
    except ValidationError as error:
        lines = [_line(section, where, detail) for detail in error.errors(include_url=False)]
        raise GradiendError("\n".join(dict.fromkeys(lines))) from None


def _line(section: type[Section], where: str, detail: ErrorDetails) -> str:
    location, kind, value = detail["loc"] or ("",), detail["type"], detail["input"]
    if location[-1] == "[key]":  # a name that is a key; the part before it may be mangled
        quotes = "" if isinstance(value, str) else "; put quotes around it"
        return f"{_place(where, location[:-2])}: {value!r} is not a name ({NAME_RULE}){quotes}"
    place = _place(where, location)
    if kind == "extra_forbidden":
        return f"{place}: unknown key{near_miss(str(location[-1]), _keys_at(section, location[:-1]))}"
    if kind in {"model_type", "dict_type"}:
        return f"{place}: must be a mapping, not {value!r}"
    message = str(detail["ctx"]["error"]) if kind == "value_error" else detail["msg"]
    if kind in {"int_type", "float_type", "value_error"} and _is_number(value):
        return f"{place}: {message}. {value!r} was read as text: write it as a number with a dot, e.g. 1.0e-5"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f"{place}: {message}, not {value!r}; put quotes around it"
    says_all = kind == "missing" or isinstance(value, dict | list)
    return f"{place}: {message}" + ("" if says_all else f", not {value!r}")


def _place(where: str, location: Sequence[int | str]) -> str:
    inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    if not inside:
        return where
    return where + inside if ": " in where else f"{where}: {inside.lstrip('.')}"


def _keys_at(section: type[Section], parents: Sequence[int | str]) -> list[str]:
    """The keys allowed where an unknown one was found: follow the location through sections, mappings and lists."""
    kind: Any = section
    for part in parents:
        fields = getattr(kind, "model_fields", None)
        kind = get_args(kind)[-1] if fields is None else fields[str(part)].annotation
    return list(kind.model_fields)


def near_miss(word: str, allowed: Sequence[str]) -> str:
    """A hint that ends an error message: the nearest allowed word, else all of them."""
    near = get_close_matches(word, allowed, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; allowed: {', '.join(allowed)}" if allowed else ""


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)
