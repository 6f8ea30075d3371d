"""Outputs appear whole or not at all, the manifest says what made them, and errors are one message."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gradiend_core.errors import GradiendError
from gradiend_core.files import sha256_file
from pipeline import stage
from pipeline.__main__ import STAGES, main
from pipeline.stage import Outputs, stage_parser

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("in")
    return tmp_path


def outputs(params: dict[str, Any] | None = None, inputs: tuple[str, ...] = ("in.txt",)) -> Outputs:
    return Outputs("demo", Path("manifests/demo.json"), params or {"k": 1}, [Path(name) for name in inputs])


def tree() -> dict[str, bytes]:
    """Every file below the current folder, without locks."""
    files = (path for path in sorted(Path().rglob("*")) if path.is_file() and path.parts[0] != ".stages")
    return {path.as_posix(): path.read_bytes() for path in files}


def write(content: str = "new") -> None:
    """A stage with two outputs in different folders and one inside a folder of its own."""
    with outputs() as out:
        out.path(Path("out/a.txt")).write_text(content)
        out.path(Path("other/b.txt")).write_text(content)
        aside = out.folder(Path("model"), ["config.json"])
        (aside / "config.json").write_text(content)
        (aside / "optimizer.bin").write_text("not wanted")


def fail(error: BaseException) -> None:
    """A stage that raises with one output written in part, one not begun and a folder half full."""
    with outputs({"k": 2}) as out:
        out.path(Path("out/a.txt")).write_text("half")
        out.path(Path("never written"))
        (out.folder(Path("model"), ["config.json"]) / "config.json").write_text("half")
        raise error


def forget() -> None:
    """A stage that does not write one of its outputs."""
    with outputs() as out:
        out.path(Path("out/a.txt")).write_text("new")
        out.path(Path("other/b.txt"))


def test_all_outputs_and_the_manifest_appear() -> None:
    write()
    assert set(tree()) == {"in.txt", "out/a.txt", "other/b.txt", "model/config.json", "manifests/demo.json"}
    assert tree()["model/config.json"] == b"new"


def test_outputs_have_the_usual_permissions() -> None:
    mask = os.umask(0o027)
    try:
        with outputs() as out:
            aside = out.path(Path("a.txt"))
            aside.write_text("")
            aside.chmod(0o600)
    finally:
        os.umask(mask)
    assert Path("a.txt").stat().st_mode & 0o777 == 0o640


def test_aside_is_next_to_the_output_with_its_suffix() -> None:
    with outputs() as out:
        aside = out.path(Path("out/a.parquet"))
        assert (aside.parent, aside.suffix) == (Path("out"), ".parquet")
        assert aside.name.startswith(".partial-")
        aside.write_text("")


@pytest.mark.parametrize("error", [RuntimeError("bug"), GradiendError("user"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("made_before", [False, True])
def test_nothing_changes_when_the_block_raises(error: BaseException, made_before: bool) -> None:
    if made_before:
        write("old")
    before = tree()
    with pytest.raises(type(error)):
        fail(error)
    assert tree() == before
    assert not list(Path().rglob(".partial-*"))


def test_output_that_was_not_written_leaves_everything_as_it_was() -> None:
    write("old")
    before = tree()
    with pytest.raises(GradiendError, match=r"b\.txt"):
        forget()
    assert tree() == before


def test_manifest_says_what_made_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    Path("folder/deep").mkdir(parents=True)
    Path("folder/deep/x").write_text("x")
    Path("folder/.partial-1-x").write_text("of another job")
    with outputs({"k": None, "l": [1]}, ("in.txt", "folder")) as out:
        out.path(Path("out/a.txt")).write_text("a")
        out.record(seed=3)
    manifest = json.loads(Path("manifests/demo.json").read_text())
    versions = manifest.pop("versions")
    assert manifest == {
        "stage": "demo",
        "params": {"k": None, "l": [1]},
        "threads": "3",
        "inputs": {
            "folder/deep/x": hashlib.sha256(b"x").hexdigest(),
            "in.txt": hashlib.sha256(b"in").hexdigest(),
        },
        "outputs": {"out/a.txt": hashlib.sha256(b"a").hexdigest()},
        "seed": 3,
    }
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_same_inputs_give_the_same_manifest() -> None:
    write()
    first = tree()
    write()
    assert tree() == first


def test_missing_input_is_named_before_anything_is_written() -> None:
    with pytest.raises(GradiendError, match=r"^no/such\.txt: cannot be read \(No such file or directory\)\. Make it"):
        outputs(inputs=("no/such.txt",))
    assert set(tree()) == {"in.txt"}


def test_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(GradiendError, match=r"^in\.txt/deep: cannot be written \(Not a directory\)"), outputs() as out:
        out.path(Path("in.txt/deep/a.txt"))
    assert set(tree()) == {"in.txt"}


def test_folder_without_write_permission_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked instead of made: the superuser, as whom containers run tests, may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path("locked"))
    with pytest.raises(GradiendError, match=r"^locked: folder is not writable\."), outputs() as out:
        out.path(Path("locked/a.txt"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_is_one_message_that_names_the_output(code: int) -> None:
    write("old")
    before = tree()
    says = rf"^out/a\.txt: cannot be written \({os.strerror(code)}\)\. Check free space and permissions there"
    with pytest.raises(GradiendError, match=says):
        fail(OSError(code, os.strerror(code)))  # as write() raises it: without a file name
    assert tree() == before


def test_disk_that_fills_up_while_outputs_are_put_in_place_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write("old")
    before = tree()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GradiendError, match=r"^out/a\.txt: cannot be written \(No space left on device\)"):
        write()
    assert tree() == before


def test_output_whose_place_is_taken_by_a_folder_is_named() -> None:
    Path("out/a.txt").mkdir(parents=True)
    with pytest.raises(GradiendError, match=r"^out/a\.txt: cannot be written \(Is a directory\)"), outputs() as out:
        out.path(Path("out/a.txt")).write_text("a")
    assert set(tree()) == {"in.txt"}


def test_other_system_errors_are_not_called_unwritable_outputs() -> None:
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "vocab.txt"), OSError("no connection")):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert caught.value is error
    assert set(tree()) == {"in.txt"}


@contextmanager
def writing(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that has said that it is writing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield process


def test_terminated_stage_leaves_nothing_behind(folder: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import pipeline.__main__ as cli
from pipeline.stage import Outputs

def stage(argv):
    with Outputs("demo", Path("manifest.json"), {}, []) as out:
        out.path(Path("a.txt")).write_text("half")
        (out.folder(Path("model"), ["config.json"]) / "config.json").write_text("half")
        print("writing", flush=True)
        time.sleep(60)

cli.importlib = SimpleNamespace(import_module=lambda name: SimpleNamespace(main=stage, check=lambda: None))
sys.exit(cli.main(["train"]))
"""
    with writing(program, folder) as process:
        assert len(list(folder.rglob(".partial-*"))) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert set(tree()) == {"in.txt"}
    assert not list(folder.rglob(".partial-*"))


def test_unknown_stage_is_told_the_nearest_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate_dat"]) == 1
    assert capsys.readouterr().err == "error: generate_dat: no such stage; did you mean generate_data?\n"
    assert main(["zzz"]) == 1
    assert capsys.readouterr().err == f"error: zzz: no such stage; stages: {', '.join(STAGES)}\n"


def test_usage_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(stage in usage for stage in STAGES)


def test_every_stage_has_a_program() -> None:
    missing = [stage for stage in STAGES if not (ROOT / "pipeline" / f"{stage}.py").is_file()]
    assert missing == []


def test_parser_of_a_stage_without_parameters() -> None:
    assert stage_parser("demo", None, params=False).parse_args(["--manifest", "m"]).manifest == Path("m")
    with pytest.raises(SystemExit):
        stage_parser("demo", None).parse_args(["--manifest", "m"])


def continued(seen: list[str]) -> Path:
    """A stage that continues what an interrupted one has left, under a lock of its own."""
    with outputs() as out:
        aside = out.resumable(Path("out/rows.txt"))
        seen.append(aside.read_text() if aside.exists() else "")
        lock = out.hold(Path("lock").open("w"))  # noqa: SIM115 - left by the outputs
        with aside.open("a") as stream:
            stream.write("row ")
        if len(aside.read_text()) < 8:
            raise KeyboardInterrupt
        out.path(Path("out/index.txt")).write_text("index")
    assert lock.closed
    return aside


def test_interrupted_output_is_continued() -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        continued(seen)
    assert not Path("out/rows.txt").exists()
    aside = continued(seen)
    assert seen == ["", "row "]
    assert Path("out/rows.txt").read_text() == "row row "
    assert not aside.exists()


def test_what_is_held_is_left_after_the_outputs_are_in_place() -> None:
    order = []

    class Lock:
        def __enter__(self) -> None:
            order.append(Path("out/a.txt").exists())

        def __exit__(self, *_: object) -> None:
            order.append(Path("out/a.txt").exists())

    with outputs() as out:
        out.path(Path("out/a.txt")).write_text("a")
        out.hold(Lock())
    assert order == [False, True]


def test_code_digest_changes_with_any_source_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage.code_digest()
    assert before == stage.code_digest()
    changed = "gradiend_core/gradients/rules.py"
    monkeypatch.setattr(
        stage, "sha256_file", lambda path: "x" if path.as_posix().endswith(changed) else sha256_file(path)
    )
    assert stage.code_digest() != before


def test_what_is_held_learns_that_the_outputs_could_not_be_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Lock:
        def __enter__(self) -> None: ...

        def __exit__(self, kind: Any, *_: object) -> None:
            seen.append(kind)

    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def write_to_a_full_disk() -> None:
        with outputs() as out:
            out.path(Path("out/a.txt")).write_text("a")
            out.hold(Lock())
            monkeypatch.setattr(stage, "sha256_file", full)

    with pytest.raises(GradiendError, match="cannot be written"):
        write_to_a_full_disk()
    assert seen == [GradiendError]


def leave(name: str) -> Path:
    """What a killed process has left aside."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("half")
    return path


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_killed_process_left_aside_goes_with_the_next_run(fails: bool) -> None:
    left = [leave(f"{place}") for place in ("out/.partial-1-a.txt", "out/.partial-22-a.txt", ".partial-3-model/x")]
    others = [leave(f"out/{name}") for name in (".partial-resume-a.txt", ".partial-4-b-a.txt", ".partial-5-other.txt")]
    if fails:
        with pytest.raises(KeyboardInterrupt):
            fail(KeyboardInterrupt())
    else:
        write()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_folder_left_aside_by_a_process_of_the_same_number_is_emptied() -> None:
    leave(f".partial-{os.getpid()}-model/config.json")
    with outputs() as out:
        assert list(out.folder(Path("model"), []).iterdir()) == []


@pytest.mark.parametrize("renames", [1, 2])
def test_interrupted_renames_leave_what_is_resumed_until_all_else_is_in_place(
    monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    done: list[Path] = []

    def replace(aside: Path, final: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(final)
        os.replace(aside, final)

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        continued(seen)
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        continued(seen)
    assert Path("out/.partial-resume-rows.txt").read_text() == "row row "


def test_nothing_left_aside_is_removed_where_there_are_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = leave("out/.partial-1-a.txt")
    monkeypatch.setattr("fcntl.flock", no_locks)
    write()
    assert left.exists()
    assert Path("out/a.txt").exists()


def test_the_same_outputs_are_made_by_one_process_at_a_time(folder: Path) -> None:
    program = """
import time
from pathlib import Path
from pipeline.stage import Outputs

with Outputs("demo", Path("manifests/demo.json"), {}, []) as out:
    out.path(Path("out/a.txt")).write_text("first")
    print("writing", flush=True)
    time.sleep(0.5)
"""
    with writing(program, folder), outputs():
        assert Path("out/a.txt").read_text() == "first"
