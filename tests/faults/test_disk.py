"""Disks that are full or read-only, and memory that runs out: one line says so, and the same command goes on later.

Stages run by hand in a mount namespace, where `artifacts` lies on a small disk. With GRADIEND_TEST_FAULTS=all every
stage meets a disk that is full after each of several numbers of pages.
"""

import math
import os
import subprocess
import tempfile

import pytest
from by_hand import NAMESPACE, Hands
from damage import DRAW, EVERYTHING, Stage, Trial, differences, refusal, stages

from project import Project

PAGE = 4096
ROOMY = 2**28
RESUMABLE = ".partial-resume-"


def _mounts() -> bool:
    """Whether disks can be mounted here."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", folder]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False


pytestmark = pytest.mark.skipif(not _mounts(), reason="no mount namespace: neither the superuser nor `unshare --user`")


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the finished project; what the tests do lies on disks that are gone afterwards."""
    return finished.copy(tmp_path_factory.mktemp("disk") / "project")


@pytest.fixture(scope="module")
def every(project: Project) -> dict[str, Stage]:
    return stages(project)


class Disk:
    """A folder of the project on a disk of its own, with all that was in it."""

    def __init__(self, hands: Hands, folder: str) -> None:
        self._hands, self._folder = hands, folder
        self._shell(f"cp -a {folder} .kept && mount -t tmpfs -o size={ROOMY} none {folder}")
        self._shell(f"cp -a .kept/. {folder} && rm -r .kept")

    def leave(self, pages: int) -> None:
        """Leave so many pages free."""
        disk = os.statvfs(self._hands.folder / self._folder)
        self.resize(max(1, disk.f_blocks - disk.f_bfree + pages) * PAGE)  # none at all would be without a limit

    def resize(self, size: int) -> None:
        self._shell(f"mount -o remount,size={size} {self._folder}")

    def read_only(self, yes: bool) -> None:
        self._shell(f"mount -o remount,{'ro' if yes else 'rw'} {self._folder}")

    def _shell(self, command: str) -> None:
        done = self._hands.shell(command)
        assert done.status == 0, done.output


def contents(hands: Hands) -> dict[str, bytes]:
    """The artifacts as the process sees them, with what stands aside; not what is resumed."""
    files = [path for path in (hands.folder / "artifacts").rglob("*") if path.is_file()]
    found = {path.relative_to(hands.folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in found.items() if RESUMABLE not in name}


def due(hands: Hands, stage: Stage) -> dict[str, bytes]:
    """Remove the stage's outputs, and those of the stages behind are left: what is there then."""
    for path in stage.outputs:
        (hands.folder / path).unlink(missing_ok=True)
    return contents(hands)


def pages(project: Project, stage: Stage) -> int:
    """How many pages the outputs take: with one less the disk is full."""
    return sum(math.ceil((project.folder / path).stat().st_size / PAGE) for path in stage.outputs)


ADDRESSES = [
    "corpus_grammar@english",
    "corpus_text@notes",
    "base_model_trained@tiny",
    "base_model_trained@pair",
    "base_model_local@copied",
    "generate_data@gender",
    "pre_prune@gender",
    "cache_gradients@gender-1",
    "train@gender-0",
    "select_seed@gender",
    "post_prune@gender",
    "evaluate_encoder@gender",
    "evaluate_decoder@gender",
    "rewrite_model@gender",
    "plot@gender",
]


def test_every_stage_is_tried(every: dict[str, Stage]) -> None:
    assert {address.partition("@")[0] for address in ADDRESSES} == {stage.name for stage in every.values()}


@pytest.mark.parametrize("address", ADDRESSES if EVERYTHING else ["rewrite_model@gender", "train@gender-0"])
def test_a_stage_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    project: Project, every: dict[str, Stage], trials: list[Trial], address: str
) -> None:
    stage, expected = every[address], project.artifacts()
    need = pages(project, stage)
    some = {0, 1, need // 3, need // 2, 2 * need // 3, need - 1} if EVERYTHING else {DRAW.randrange(need)}
    with Hands(project.folder, stage.name, mounts=True) as hands:
        disk = Disk(hands, "artifacts")
        for left in sorted(some):
            before = due(hands, stage)
            disk.leave(left)
            done = hands.stage(stage.arguments)
            problems = refusal(*done, named="artifacts/") + differences(contents(hands), before)
            disk.resize(ROOMY)
            done = hands.stage(stage.arguments)
            problems += [] if done.status == 0 else [done.output]
            problems += differences(contents(hands), expected)
            trials.append(Trial(f"disk full, {left} of {need} pages left", address, "stage by hand", problems))
            assert problems == []


@pytest.mark.parametrize("address", ADDRESSES if EVERYTHING else [DRAW.choice(["plot@gender", "generate_data@gender"])])
def test_a_stage_in_a_read_only_folder_says_so(
    project: Project, every: dict[str, Stage], trials: list[Trial], address: str
) -> None:
    stage, expected = every[address], project.artifacts()
    with Hands(project.folder, stage.name, mounts=True) as hands:
        disk = Disk(hands, "artifacts")
        for made_before in (True, False):
            before = contents(hands) if made_before else due(hands, stage)
            disk.read_only(True)
            problems = refusal(*hands.stage(stage.arguments), named="artifacts/") + differences(contents(hands), before)
            disk.read_only(False)
            done = hands.stage(stage.arguments)
            problems += [] if done.status == 0 else [done.output]
            problems += differences(contents(hands), expected)
            trials.append(Trial("read-only folder", address, "stage by hand", problems))
            assert problems == []


CACHED = "python -m pipeline.cached"


@pytest.mark.parametrize("fault", ["full", "read-only"] if EVERYTHING else [DRAW.choice(["full", "read-only"])])
@pytest.mark.parametrize("engine", [CACHED, "dvc repro --single-item"] if EVERYTHING else [CACHED])
def test_a_cache_that_takes_nothing_is_named_and_nothing_is_lost(
    project: Project, every: dict[str, Stage], trials: list[Trial], engine: str, fault: str
) -> None:
    stage, expected = every["generate_data@gender"], project.artifacts()
    command = f"{engine} {stage.address}"
    with Hands(project.folder, "check_params", mounts=True) as hands:
        whole = Disk(hands, "artifacts")
        whole.resize(ROOMY)
        disk = Disk(hands, ".dvc/cache")
        for left in (0, 1, 2, 3) if EVERYTHING and fault == "full" else (0,):
            due(hands, stage)
            hands.shell("rm -r .dvc/cache/*")
            disk.leave(left) if fault == "full" else disk.read_only(True)
            done = hands.shell(command)
            says = "No space left on device" if fault == "full" else "Read-only file system"
            problems = [] if says in done.output else [done.output]
            problems += [] if done.status or engine != CACHED else ["success"]  # which DVC says all the same
            problems += ["a traceback"] if "Traceback" in done.output else []
            disk.resize(ROOMY) if fault == "full" else disk.read_only(False)
            done = hands.shell(command)
            problems += [] if done.status == 0 else [done.output]
            problems += differences(contents(hands), expected)
            done = hands.shell("python -m pipeline.verify")
            problems += [] if "Nothing is damaged" in done.output else [done.output]
            who = "snakemake" if engine == CACHED else "repro"
            trials.append(Trial(f"cache {fault}", stage.address, who, problems))
            assert problems == []


@pytest.mark.parametrize("address", ADDRESSES if EVERYTHING else [])
def test_a_stage_without_memory_leaves_everything_as_it_was(
    project: Project, every: dict[str, Stage], trials: list[Trial], address: str
) -> None:
    stage, expected = every[address], project.artifacts()
    with Hands(project.folder, stage.name, mounts=True) as hands:
        Disk(hands, "artifacts")
        for megabytes in (0, 1, 2, 4, 8, 16, 32):
            before = due(hands, stage)
            done = hands.stage(stage.arguments, memory=megabytes * 2**20)
            if done.status == 0:
                break  # it was enough
            # An allocation that fails outside Python ends the process, as the system's SIGKILL would (glibc exits).
            died = done.status < 0 or "cannot allocate memory for thread-local data: ABORT" in done.output
            problems = [] if died else refusal(*done, named="memory") + differences(contents(hands), before)
            done = hands.stage(stage.arguments)
            problems += [] if done.status == 0 else [done.output]
            problems += differences(contents(hands), expected)
            trials.append(Trial("out of memory", f"{address}, {megabytes} MiB", "stage by hand", problems))
            assert problems == []
