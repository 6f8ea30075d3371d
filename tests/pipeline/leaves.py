"""The leaves of the params model: their places, another valid value for each, and the stages that declare them."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from gradiend_core.config.params import validate_params
from gradiend_core.config.section import Section
from gradiend_core.errors import GradiendError

Place = tuple[str | int, ...]
Data = dict[str, Any]


def sections_of(kind: Any) -> set[type[Section]]:
    """The sections that a type may hold, at any depth."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return {kind}.union(*(sections_of(field.annotation) for field in kind.model_fields.values()))
    return set().union(*map(sections_of, get_args(kind)))


def sections_in(value: Any) -> set[type[Section]]:
    """The sections that a value does hold."""
    found = {type(value)} if isinstance(value, Section) else set()
    return found.union(*(sections_in(inner) for _, inner in _children(value)))


def leaves(value: Any, place: Place = (), field: FieldInfo | None = None) -> Iterator[tuple[Place, FieldInfo]]:
    """Place and field of every value that is no section and holds none."""
    children = list(_children(value))
    if isinstance(value, Section):
        for name, inner in children:
            yield from leaves(inner, (*place, name), type(value).model_fields[str(name)])
    elif any(isinstance(inner, Section) for _, inner in children):
        for name, inner in children:
            yield from leaves(inner, (*place, name), field)
    elif field is not None:
        yield place, field


def _children(value: Any) -> Iterable[tuple[str | int, Any]]:
    if isinstance(value, Section):
        return [(name, getattr(value, name)) for name in type(value).model_fields]
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def changed(data: Data, place: Place, field: FieldInfo) -> Data | None:
    """The params with another value at one place, still valid; None when no change can be thought of."""
    before = validate_params(data, "params")
    for candidate in _candidates(_at(data, place), list(_literals(field.annotation)), _names(data)):
        try:
            after = validate_params(replaced(data, place, candidate), "params")
        except GradiendError:
            continue
        if after != before:
            return after.model_dump()
    return None


def replaced(data: Data, place: Place, value: Any) -> Data:
    """A copy of the params with this value at the place."""
    copied = copy.deepcopy(data)
    _at(copied, place[:-1])[place[-1]] = value
    return copied


def transferred(data: Data, place: Place, other: Data) -> Data:
    """A copy of the params with the value that other ones have at the place."""
    return replaced(data, place, _at(other, place))


def _at(data: Any, place: Place) -> Any:
    for part in place:
        data = data[part]
    return data


def _candidates(value: Any, literals: list[Any], names: list[str]) -> Iterator[Any]:
    """Values of every kind, likelier ones first: what is allowed is for the model to say."""
    if isinstance(value, dict):
        yield from ({**value, key: new} for key in value for new in _candidates(value[key], literals, names))
    elif isinstance(value, list):
        yield value[::-1]
        yield from ([*value, new] for new in _candidates(value[-1] if value else None, literals, names))
    elif isinstance(value, str):
        yield from (value[::-1], value[:-1])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (value + 1, value * 2, value / 2)
    yield from (*literals, True, False, 1, 0.5, *names)


def _literals(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    else:
        for inner in get_args(kind):
            yield from _literals(inner)


def _names(data: Data) -> list[str]:
    groups = [*data["corpora"].values(), *data["base_models"].values(), data["datasets"]]
    return [name for group in groups for name in group]


def declarations(dvc_yaml: str, params: Data) -> dict[str, set[str]]:
    """For each stage, by address, the keys that its command, `deps` and `params` name; without `check_params`."""
    found = {}
    for name, stage in YAML(typ="safe").load(dvc_yaml)["stages"].items():
        template = stage.get("do", stage)
        for address, words in _instances(name, stage, params):
            keys = {_filled(key, words) for key in template.get("params", []) if isinstance(key, str)}
            inputs = " ".join([template["cmd"], *template["deps"]])
            found[address] = keys | {_filled(word, words) for word in re.findall(r"\$\{item\.\w+", inputs)}
    return found


def _instances(name: str, stage: Data, params: Data) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Address of each of a stage's instances, and what stands for its loop variables in the keys it names."""
    if "foreach" in stage:
        over = stage["foreach"].strip("${}")
        for key in _at(params, tuple(over.split("."))):
            yield f"{name}@{key}", {"${key}": key, "${item": f"{over}.{key}"}
    elif "matrix" in stage:
        loops = {variable: _at(params, (over.strip("${}"),)) for variable, over in stage["matrix"].items()}
        for values in product(*loops.values()):
            words = {f"${{item.{variable}}}": str(value) for variable, value in zip(loops, values, strict=True)}
            yield f"{name}@{'-'.join(words.values())}", words


def _filled(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def declaring(place: Place, before: Mapping[str, set[str]], after: Mapping[str, set[str]]) -> set[str]:
    """The stages that a change at the place reaches directly: those that name its key, and those that are new."""
    key = ".".join(map(str, place))
    named = {stage for stage, keys in after.items() if any(f"{key}.".startswith(f"{known}.") for known in keys)}
    return named | (after.keys() - before.keys())
