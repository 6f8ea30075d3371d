"""The reference page of params.yaml, written from its sections: `python -m gradiend_core.config.reference`."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import PlainValidator
from pydantic.fields import FieldInfo

from gradiend_core.config.arguments import ARGUMENTS, Argument
from gradiend_core.config.params import Params
from gradiend_core.config.section import NAME_PATTERN, NAME_RULE, PATH_RULE, Section

_INTRO = f"""# Parameters

This page is made from the code: `python -m gradiend_core.config.reference > docs/params.md`.

`params.yaml` says what to study; how many cores, how much memory and which GPUs belong to the
[profiles](engines.md). `python -m pipeline check_params` checks the whole file and lists every problem.

```yaml
seeds: [0, 1, 2]           # one training per run and seed
gradient_shards: [0]       # the gradients of a run in one job; [0, 1, 2, 3] in four
corpora:
  grammar: {{<name>: …}}     # texts written from a grammar
  text: {{<name>: …}}        # your own texts
base_models:
  trained: {{<name>: …}}     # a small model trained here
  local: {{<name>: …}}       # a folder on this machine
  hub: {{<name>: …}}         # a model of the Hugging Face hub
datasets: {{<name>: …}}      # classes of words to look for in a corpus
runs:
  <name>:                  # one feature in one base model, with a section for each stage
    base_model: …
    dataset: …
    target_classes: […]
    train: {{…}}             # pre_prune, cache_gradients, select_seed, … likewise
```

- Every key that is shown below can be left out when it has a default; an unknown key is an error. A group without
  entries is written `{{}}`.
- `<name>` is yours: {NAME_RULE}. Names of corpora are unique over
  `grammar` and `text`, those of base models over `trained`, `local` and `hub`.
- A `path` of a corpus or a base model becomes part of command lines. It holds {PATH_RULE}.
- Runs share settings with YAML anchors: `train: &train {{max_steps: 800}}` in one, `train: *train` in another.
- A stage depends on its own section only: changing `runs.<name>.plot` never trains again.
- Write `1.0e-5`, not `1e-5`, which YAML 1.1 reads as text. Quote names and words that YAML would read otherwise:
  `"1"`, `"no"`, `"on"`.
"""


_PAGE = """## {key}

{about}

| key | type | default | meaning |
|---|---|---|---|
{rows}
"""

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text"}


_ARGUMENTS = """## Arguments of the reference package

Where every argument of `gradiend` 0.2.3 went, and those of other training loops that `train` does not have under the
same name. None is accepted and ignored: in params.yaml, what is no key is an error that says the same as its row.
Keys are those of a run, below `runs.<name>`; `seeds` is at the top.
"""

_GROUP = """### `{name}`

| argument | key | |
|---|---|---|
{rows}
"""


def parameter_reference() -> str:
    """The page as Markdown: a heading for each section, in the file's order, then the reference's arguments."""
    sections = [_page(key, section) for key, section in _sections("", Params)]
    return "\n".join([_INTRO, *sections, _ARGUMENTS, *(_group(name, group) for name, group in ARGUMENTS.items())])


def _group(name: str, group: Mapping[str, Argument]) -> str:
    rows = [
        f"| `{argument}` | {', '.join(f'`{key}`' for key in keys) or 'none'} | {words} |"
        for argument, (keys, words) in group.items()
    ]
    return _GROUP.format(name=name, rows="\n".join(rows))


def _sections(key: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield key, section
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            named = ".<name>" if get_origin(field.annotation) is dict else ""
            yield from _sections(f"{key}.{name}{named}".lstrip("."), inner)


def _page(key: str, section: type[Section]) -> str:
    rows = [_row(name, field) for name, field in section.model_fields.items()]
    return _PAGE.format(key=f"`{key}`" if key else "Top level", about=section.__doc__, rows="\n".join(rows))


def _row(name: str, field: FieldInfo) -> str:
    inner = _section_in(field.annotation)
    meaning = field.description or (inner.__doc__ if inner else None) or ""
    default = "required" if field.is_required() else f"`{_literal(field.default)}`"
    cells = (f"`{name}`", _type_words(field.annotation, field.metadata), default, meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, itself or under a name."""
    kind = get_args(annotation)[-1] if get_origin(annotation) is dict else annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _literal(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, float) and 0 < abs(value) < 1.0e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _type_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type and its limits in plain words, e.g. `integer >= 1 or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_words(arguments[0], [*_flat(arguments[1:]), *metadata])
    for entry in metadata:
        if isinstance(entry, PlainValidator):
            return entry.func.__doc__ or ""
    if origin in {Union, UnionType}:
        return " or ".join("null" if kind is NoneType else _type_words(kind, metadata) for kind in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(f"`{_literal(value)}`" for value in arguments)
    if origin is list:
        return f"list of {_size(metadata)}{_type_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_size(metadata)}name to {_type_words(arguments[1])}"
    if _section_in(annotation) is not None:
        return "section"
    return _scalar_words(annotation, metadata)


def _scalar_words(kind: type, metadata: Sequence[Any]) -> str:
    patterns = _found(metadata, "pattern")
    if NAME_PATTERN in patterns:
        return "name"
    limits = [f"{sign} {limit}" for word, sign in _LIMITS.items() for limit in _found(metadata, word)]
    limits += [f"at least {limit} characters" for limit in _found(metadata, "min_length")]
    limits += [f"matching `{pattern}`" for pattern in patterns]
    return f"{_WORDS[kind]} {' and '.join(limits)}".rstrip()


def _size(metadata: Sequence[Any]) -> str:
    least, most = ([*_found(metadata, word), None][0] for word in ("min_length", "max_length"))
    if least == most:
        return "" if least is None else f"exactly {least}: "
    return f"at least {least}: "


def _found(metadata: Sequence[Any], word: str) -> list[Any]:
    return [getattr(entry, word) for entry in metadata if getattr(entry, word, None) is not None]


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    """Limits inside a nested `Field(...)` are kept in its own metadata."""
    for entry in metadata:
        yield from entry.metadata if isinstance(entry, FieldInfo) else [entry]


if __name__ == "__main__":
    sys.stdout.write(parameter_reference())
