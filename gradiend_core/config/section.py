"""What all parameter sections share: frozen, strict, no unknown keys, and errors that a user can act on."""

import math
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from gradiend_core.errors import GradiendError

PARAMS_FILE = Path("params.yaml")

# Names become folders and parts of dotted keys, so they hold neither separators nor dots.
NAME_RULE = "letters, digits, _ and -, the first a letter or digit, at most 64"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# DVC puts paths into command lines as they are, so they hold nothing that a shell or DVC gives a meaning.
PATH_RULE = "letters, digits and . _ / - + @ % , =, the first a letter, a digit or one of . _ /"


def _plain_path(path: str) -> str:
    if re.fullmatch(r"[\w./][\w./+@%,=-]*", path) is None:
        raise ValueError(f"a path may hold {PATH_RULE}. Rename or move the file")
    return path


DataPath = Annotated[str, AfterValidator(_plain_path)]

MAX_YAML_SIZE: Final = 2**24
"""Characters of all values, those behind aliases counted each time: a few lines of YAML can stand for terabytes."""


class Section(BaseModel):
    """A section of params.yaml: immutable, no type coercion, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe: it makes plain data only. Refuses a key that is written twice, of which YAML would drop the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def load_yaml(path: Path) -> Any:
    """The plain data of a YAML file. Raises `OSError`, `UnicodeDecodeError` or `YAMLError`, also when it is too large.

    No tag makes anything but plain data, and nothing is built before its size is known.
    """
    if path.stat().st_size > MAX_YAML_SIZE:
        raise yaml.YAMLError(f"more than {MAX_YAML_SIZE} bytes")
    loader = _Loader(path.read_text("utf-8"))
    try:
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MAX_YAML_SIZE:
            raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_YAML_SIZE} characters")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Characters of all values in a node, those behind aliases counted each time; infinite if it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if node not in known:
        known[node] = math.inf
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[node] = 1 + sum(_size(part, known) for part in inner)
    return known[node]


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The params file as plain data. Raises `GradiendError` when it is missing or not a YAML mapping."""
    try:
        params = load_yaml(path)
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


def check_name(name: Any, where: str) -> None:
    """Raise `GradiendError` unless `name` may become a folder; for names that do not come from params.yaml."""
    if not isinstance(name, str) or len(name) > 64 or re.fullmatch(NAME_PATTERN, name) is None:
        raise GradiendError(f"{where}: {name!r} is not a name ({NAME_RULE})")


Explain = Callable[[Sequence[int | str]], str | None]


def validate(section: type[S], data: Any, where: str, explain: Explain = lambda _: None) -> S:
    """Build a section; every problem becomes one line of a `GradiendError`: place, what is wrong, what is allowed.

    `where` is the file, or `file: dotted.key` for a section inside it. `explain` may have something to say about an
    unknown key, of which it is given the place; else the nearest allowed one is named.
    """
    try:
        return section.model_validate(data)
    except ValidationError as error:
        lines = [_line(section, where, detail, explain) for detail in error.errors(include_url=False)]
        raise GradiendError("\n".join(dict.fromkeys(lines))) from None


def _line(section: type[Section], where: str, detail: ErrorDetails, explain: Explain) -> str:
    location, kind, value = detail["loc"] or ("",), detail["type"], detail["input"]
    if location[-1] == "[key]":  # a name that is a key; the part before it may be mangled
        quotes = "" if isinstance(value, str) else "; put quotes around it"
        return f"{_place(where, location[:-2])}: {value!r} is not a name ({NAME_RULE}){quotes}"
    place = _place(where, location)
    if kind == "extra_forbidden":
        words = explain(location)
        hint = f"; {words}" if words else near_miss(str(location[-1]), _keys_at(section, location[:-1]))
        return f"{place}: unknown key{hint}"
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


def _keys_at(section: Any, parents: Sequence[int | str]) -> list[str]:
    """The keys allowed where an unknown one was found: follow the location through sections, mappings and lists."""
    kind: Any = section
    for part in parents:
        fields = getattr(kind, "model_fields", None)
        kind = get_args(kind)[-1] if fields is None else fields[str(part)].annotation
    (section,) = (inner for inner in (kind, *get_args(kind)) if hasattr(inner, "model_fields"))
    return list(section.model_fields)


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
