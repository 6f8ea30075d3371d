"""The modules that a stage imports, directly or not: the code that its section in dvc.yaml must declare.

`python -m pipeline.imports` lists the differences, `--fix` rewrites the code in dvc.yaml's `deps`.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ruamel.yaml import YAML

PACKAGES = ("gradiend_core", "pipeline")
DVC_YAML = Path("dvc.yaml")
# Imported by name, as a guard that may refuse params.yaml but cannot change a result.
_DISPATCH = "pipeline/__main__.py"


def closure(stage: str, root: Path = Path()) -> list[str]:
    """The repository's files that `python -m pipeline STAGE` imports, sorted; empty packages add nothing.

    Every import statement counts, also those inside functions, but not those that only type checkers see.
    """
    found: set[Path] = set()
    waiting = [root / _DISPATCH, root / "pipeline" / f"{stage}.py"]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting.extend(_imported_files(file, root))
    return sorted(file.relative_to(root).as_posix() for file in found if file.stat().st_size)


def declared(text: str) -> dict[str, list[str]]:
    """For each stage of a dvc.yaml its declared code: files, and folders as the files below them, sorted."""
    stages = YAML(typ="safe").load(text)["stages"]
    return {name: sorted(filter(_is_code, stage.get("do", stage)["deps"])) for name, stage in stages.items()}


def fixed(text: str, root: Path = Path()) -> str:
    """The dvc.yaml with every stage's code replaced by its import closure; all other lines stay as they are."""
    lines: list[str] = []
    stage = indent = ""  # `indent` is that of the items while inside a stage's `deps`
    for line in text.splitlines(keepends=True):
        item = re.fullmatch(r" +- (.+)\n", line)
        if indent and item and _is_code(item[1]):
            continue
        if indent and not item:
            lines += [f"{indent}- {file}\n" for file in closure(stage, root)]
            indent = ""
        if name := re.fullmatch(r"  (\w+):\n", line):
            stage = name[1]
        if deps := re.fullmatch(r"( +)deps:\n", line):
            indent = f"{deps[1]}  "
        lines.append(line)
    return "".join(lines)


def main(argv: list[str]) -> int:
    """Compare dvc.yaml with the import closures; 1 when they differ and `--fix` was not given."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.imports", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="rewrite the code in dvc.yaml's deps")
    arguments = parser.parse_args(argv)
    text = DVC_YAML.read_text("utf-8")
    if arguments.fix:
        DVC_YAML.write_text(fixed(text), "utf-8")
        return 0
    differences = list(compare(text))
    print("\n".join(differences) or "dvc.yaml declares exactly the code that the stages import")
    return 1 if differences else 0


def compare(text: str, root: Path = Path()) -> Iterator[str]:
    """One line for each file that a stage imports and does not declare, or declares and does not import."""
    for stage, files in declared(text).items():
        imported = closure(stage, root)
        yield from (f"{stage}: imports {file} but does not declare it" for file in imported if file not in files)
        yield from (f"{stage}: declares {file} but does not import it" for file in files if file not in imported)


def _is_code(path: str) -> bool:
    return path.split("/")[0] in PACKAGES


def _imported_files(file: Path, root: Path) -> Iterator[Path]:
    for name in _imported_names(file, root):
        parts = name.split(".")
        if parts[0] in PACKAGES:
            for length in range(1, len(parts) + 1):
                path = root.joinpath(*parts[:length])
                yield from (found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file())


def _imported_names(file: Path, root: Path) -> Iterator[str]:
    """Dotted names of imported modules, and of names imported from them (which may be modules too)."""
    package = file.relative_to(root).parent.parts
    for node in _executed(ast.parse(file.read_text("utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, without the bodies of `if TYPE_CHECKING:`."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        children = node.orelse
    for child in children:
        yield from _executed(child)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
