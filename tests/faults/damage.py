"""Damaged files, the stages of a project by what they read and write, and the campaign's records and table."""

import json
import os
import random
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import yaml

from project import Project

EVERYTHING: Final = os.environ.get("GRADIEND_TEST_FAULTS") == "all"
"""Whether every stage and artifact is tried (`make test-faults`), or a few of them."""

DRAW: Final = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
"""Draws which few; the same ones in all processes of one test run."""

_RESULTS = Path(__file__).parents[2] / "bench/results"


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


DAMAGES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": _flipped,
    "emptied": lambda data: b"",
}


MISSING: Final = "missing"


def spoil(path: Path, damage: str, *, quietly: bool = False) -> None:
    """Damage a file in place; `quietly` as a disk does it, with the modification time as it was."""
    if damage == MISSING:
        path.unlink()
        return
    before = path.stat()
    path.chmod(before.st_mode | stat.S_IWUSR)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    path.chmod(before.st_mode)
    if quietly:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class Stage(NamedTuple):
    """A finished stage: what follows `python -m pipeline` in its command, and the files it read and wrote."""

    address: str
    arguments: list[str]
    inputs: list[str]
    outputs: list[str]

    @property
    def name(self) -> str:
        return self.address.partition("@")[0]


_LIST = """
import json
from pipeline.dag import Hashes, private_repo, read_stages
with private_repo() as repo:
    print(json.dumps([(stage.address, stage.command, stage.outputs) for stage in read_stages(repo, Hashes(repo))]))
"""


def stages(project: Project) -> dict[str, Stage]:
    """The stages that write artifacts, by their addresses."""
    found = {}
    for address, command, outputs in json.loads(project.run("python", "-c", _LIST).splitlines()[-1]):
        manifests = [path for path in outputs if path.startswith("artifacts/manifests/")]
        for manifest in manifests:
            inputs = json.loads((project.folder / manifest).read_bytes())["inputs"]
            found[address] = Stage(address, shlex.split(command)[3:], sorted(inputs), outputs)
    return found


def objects(project: Project, paths: Iterable[str]) -> list[Path]:
    """The objects of DVC's cache that hold these outputs."""
    locked = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"].values()
    md5s = {output["path"]: output["md5"] for stage in locked for output in stage.get("outs", [])}
    return [project.folder / ".dvc/cache/files/md5" / md5s[path][:2] / md5s[path][2:] for path in paths]


@dataclass(frozen=True)
class Trial:
    """One fault: what was wrong with what, who met it, and in what it was not as promised."""

    fault: str
    what: str
    who: str
    problems: list[str] = field(default_factory=list)


def refusal(status: int, output: str, named: str = "") -> list[str]:
    """What is wrong with the way a program refused: it should fail with one line, without a traceback."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    problems = [f"exit status {status}"] if status != 1 else []
    problems += [f"{len(lines)} lines of errors: {output[-1000:]}"] if len(lines) != 1 else []
    problems += ["a traceback"] if "Traceback" in output else []
    return problems + ([f"{named} is not named: {output[-1000:]}"] if named not in output else [])


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """The artifacts that are not as expected."""
    return [f"{path} differs" for path in sorted(found.keys() | expected) if found.get(path) != expected.get(path)]


def write_results(trials: Sequence[Trial]) -> None:
    """bench/results/faults-damage.json and .md."""
    _RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(trial)) for trial in trials)
    (_RESULTS / "faults-damage.json").write_text(f"[\n{lines}\n]\n")
    counts = Counter(map(_kind, trials))
    bad = Counter(_kind(trial) for trial in trials if trial.problems)
    rows = [f"| {fault} | {who} | {count} | {bad[fault, who]} |" for (fault, who), count in sorted(counts.items())]
    total = f"| all | | {len(trials)} | {bad.total()} |"
    table = ["| Fault | Who met it | Trials | Not as promised |", "|---|---|---|---|", *rows, total]
    (_RESULTS / "faults-damage.md").write_text("\n".join(table) + "\n")


def _kind(trial: Trial) -> tuple[str, str]:
    """What was done, without how much of it, and who met it."""
    return trial.fault.partition(",")[0], trial.who
