"""Kill a stage, its engine or a child with SIGKILL at a random moment, give the same command again, and look closely.

One trial: in a copy of a finished project a changed value makes one stage due (or, with `+` in the case's name, also
all that follow it). The engine is started and killed, or what it has started, several times in a row; then the same
command has to bring the result of a run that nobody disturbed, byte for byte, and compute nothing that was finished.
"""

import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from voluptuous import Invalid

from cases import CASES, Case, victims
from project import Project
from sessions import Session, await_condition

# How long a small training, putting outputs in place and recording the result may take, in seconds.
_TRAINING, _RENAMING, _RECORDING = 0.5, 0.03, 1.0
_LONGEST_ORPHAN = 120.0


class Trial(NamedTuple):
    """What is drawn before a trial; its name repeats it."""

    case: str
    engine: str
    kills: int
    seed: int

    @property
    def name(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, name: str) -> "Trial":
        case, engine, kills, seed = name.split(":")
        return cls(case, engine, int(kills), int(seed))


@dataclass(frozen=True)
class Undisturbed:
    """A run without a kill: its artifacts, and how many seconds the stage program, its children and all of it took."""

    artifacts: Mapping[str, bytes]
    seconds: Mapping[str, float]


@dataclass
class Kill:
    """Whom, and when; which stages were finished then, and how many artifacts were found earlier, new or missing."""

    victim: str
    moment: str
    finished: list[str]
    orphans: int = 0
    files: dict[str, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """What one trial has shown; without problems, all is as promised."""

    trial: str
    kills: list[Kill] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    resumed: bool | None = None
    verified: int = 0
    problems: list[str] = field(default_factory=list)


class Laboratory:
    """Runs trials on copies of one finished project."""

    def __init__(self, finished: Project, folder: Path) -> None:
        self._finished, self._folder = finished, folder
        self._before = finished.artifacts()
        self._entries = _entries(finished)
        stages = yaml.safe_load((finished.folder / "dvc.lock").read_text())["stages"]
        self._addresses = {stage["cmd"]: address for address, stage in stages.items()}

    def undisturbed(self, case: Case) -> Undisturbed:
        """What the case gives when nothing is killed."""
        project = self._prepared(case, f"undisturbed-{case.name}")
        seen: dict[str, list[float]] = {}
        session = Session(project, self._command(case, "snakemake" if case.followers else "cached"))
        try:
            while session.running():
                for role in ("stage", "child", "engine"):
                    if session.find(role) is not None:
                        seen.setdefault(role, []).append(time.monotonic())
                time.sleep(0.1)
            status = session.wait()
        finally:
            session.end()
        assert status == 0, session.output()
        seconds = {role: times[-1] - times[0] for role, times in seen.items()}
        found = Undisturbed(project.artifacts(), seconds)
        assert found.artifacts != self._before
        shutil.rmtree(project.folder)
        return found

    def run(self, trial: Trial, expected: Undisturbed) -> Outcome:
        """Kill, kill again, recover; what is found at each step is in the outcome."""
        case = CASES[trial.case]
        project = self._prepared(case, trial.name)
        run = _Run(project, case, trial, self._command(case, trial.engine), self._before, expected)
        try:
            run.kill_and_recover(lambda: self._finished_since(project))
        except Exception as error:
            run.outcome.problems.append(f"{type(error).__name__}: {error}")
        finally:
            run.end()
        if not run.outcome.problems:
            shutil.rmtree(project.folder)
        return run.outcome

    def _prepared(self, case: Case, name: str) -> Project:
        project = self._finished.copy(self._folder / name)
        case.apply(project)
        return project

    def _command(self, case: Case, engine: str) -> list[str]:
        if engine == "cached":
            return ["python", "-m", "pipeline.cached", "--threads", "1", case.stage]
        if engine == "snakemake":
            everything = ["snakemake", "--cores", "2", "--nocolor"]
            return everything if case.followers else [*everything, _manifest(self._finished, case.stage)]
        return ["dvc", "repro"] if case.followers else ["dvc", "repro", "--single-item", case.stage]

    def _finished_since(self, project: Project) -> list[str]:
        """The stages whose results have been added to the cache: their records and all that these name."""
        new = [path for name, path in _entries(project).items() if name not in self._entries]
        records = [yaml.safe_load(path.read_text()) for path in new]
        return sorted({self._addresses[record["cmd"]] for record in records if all(_objects(project, record))})


class _Run:
    """The steps of one trial, and what they show."""

    def __init__(
        self,
        project: Project,
        case: Case,
        trial: Trial,
        command: list[str],
        before: Mapping[str, bytes],
        expected: Undisturbed,
    ) -> None:
        self._project, self._case, self._trial, self._command = project, case, trial, command
        self._before, self._expected = before, expected
        self._draw = random.Random(trial.name)
        self._sessions: list[Session] = []
        self.outcome = Outcome(trial.name)

    def kill_and_recover(self, finished: Callable[[], list[str]]) -> None:
        """`finished` tells which stages are."""
        for _ in range(self._trial.kills):
            if not self._killed(finished):
                return
        self._recover(finished())

    def end(self) -> None:
        """Leave no process behind."""
        for session in self._sessions:
            session.end()

    def _runs(self) -> Path:
        return self._project.folder / ".dvc/cache/runs"

    def _start(self) -> Session:
        # What DVC itself cannot get past: it makes a folder for a record, then the record, and fails on an empty one;
        # and it writes dvc.lock and its file of locks in place.
        empty = not all(any(folder.iterdir()) for folder in self._runs().glob("??/*"))
        locks = self._project.folder / ".dvc/tmp/rwlock"
        cut_off = not _readable(self._project.folder / "dvc.lock") or (locks.exists() and not _is_json(locks))
        if self._trial.engine == "dvc" and (empty or cut_off):
            # It also names what the killed one had put in place but not recorded, which the next one does.
            assert self._session(["python", "-m", "pipeline.verify"]).wait() in (0, 1)
            self.outcome.verified += 1
        return self._session(self._command)

    def _session(self, command: list[str]) -> Session:
        self._sessions.append(Session(self._project, command))
        return self._sessions[-1]

    def _killed(self, finished: Callable[[], list[str]]) -> bool:
        """Whether the run was; if it came to its end before, that has to be the right one."""
        victim = self._draw.choice(victims(self._case, self._trial.engine))
        session = self._start()
        moment = self._await_moment(session, victim)
        killed = session.kill(victim)
        status = session.wait()
        if not killed or status == 0:
            self._check_end(status, session)
            return False
        self.outcome.kills.append(Kill(victim, moment, finished(), session.orphans(), self._look()))
        if victim not in {"engine", "all"}:
            self._check_message(victim, session.output())
        return True

    def _await_moment(self, session: Session, victim: str) -> str:
        """Wait for a random moment of the victim's life; in words."""
        share = self._draw.random()
        if self._case.followers:
            _sleep(share * self._expected.seconds["engine"], session)
            return f"running {share:.2f}"
        first = "child" if victim == "child" else "stage"
        moments = ["running", "running", "renaming"] + ["recording"] * (victim not in {"stage", "child"})
        moment = self._draw.choice([*moments, *["continuable"] * 2 * bool(self._case.saved)])
        before = self._signatures()
        await_condition(lambda: session.find(first) is not None, session, 0.05)
        if moment == "running":
            _sleep(share * self._expected.seconds[first], session)
        elif moment == "continuable":
            await_condition(self._saved, session, 0.01)
            _sleep(share * _TRAINING, session)
        elif moment == "renaming":
            await_condition(lambda: self._renamed(before), session, 0.002)
            _sleep(share * _RENAMING, session)
        else:
            await_condition(lambda: session.find("stage") is None, session, 0.02)
            _sleep(share * _RECORDING, session)
        return f"{moment} {share:.2f}"

    def _signatures(self) -> dict[Path, tuple[int, int] | None]:
        """Inode and time of the artifacts that the run changes."""
        new = self._expected.artifacts
        return {
            self._project.folder / path: _signature(self._project.folder / path)
            for path in new
            if new[path] != self._before.get(path)
        }

    def _renamed(self, before: Mapping[Path, tuple[int, int] | None]) -> bool:
        return any(_signature(path) not in {None, earlier} for path, earlier in before.items())

    def _look(self) -> dict[str, int]:
        """How many of the artifacts that change are earlier, new or missing; nothing else may be found."""
        counts = {"earlier": 0, "new": 0, "missing": 0}
        for path, new in self._expected.artifacts.items():
            earlier, data = self._before.get(path), _content(self._project.folder / path)
            if data is None and (self._trial.engine == "dvc" or earlier is None):  # DVC removes outputs before it runs
                counts["missing"] += 1
            elif data not in (earlier, new):
                self._problem(f"{path}: {'missing' if data is None else 'damaged'} after a kill")
            elif earlier != new:
                counts["new" if data == new else "earlier"] += 1
        for file in (self._project.folder / ".dvc/cache/files/md5").glob("??/*"):
            digest = hashlib.md5(file.read_bytes()).hexdigest()
            if re.fullmatch("[0-9a-f]{30}", file.name) and digest != file.parent.name + file.name:
                self._problem(f"object {file.name} of the cache: damaged after a kill")
        return counts

    def _check_message(self, victim: str, output: str) -> None:
        stage = self._case.stage.partition("@")[0]
        # Of a child the stage itself tells, and pipeline.cached was asked for no other stage.
        named = stage in output or (victim, self._trial.engine) == ("child", "cached")
        if not named or not re.search(r"SIGKILL|\bKilled\b|exited with -9", output):
            self._problem(f"the engine does not say that {stage} was killed:\n{output}")
        if "Traceback" in output:
            self._problem(f"a traceback:\n{output}")

    def _recover(self, finished: list[str]) -> None:
        """The same command again, while orphans may live on."""
        undisturbed = not any(session.orphans() for session in self._sessions)
        saved = undisturbed and self._saved()
        started = time.time()
        session = self._start()
        self._check_end(session.wait(), session)
        logs = [path.read_text(errors="replace") for path in self._logs(started)]
        self.outcome.executed = self._executed(session.output(), started)
        again = sorted({*self.outcome.executed} & {*finished})
        if again:
            self._problem(f"finished, but executed again: {', '.join(again)}")
        if saved and self._case.stage in self.outcome.executed:
            self.outcome.resumed = any(self._case.says in said for said in (session.output(), *logs))
            if not self.outcome.resumed:
                self._problem("begun afresh, although there was something to continue from")

    def _saved(self) -> bool:
        """Whether there is something that an interrupted stage has to continue from."""
        files = (self._project.folder / "artifacts").glob(self._case.saved) if self._case.saved else []
        return any(_continuable(path) for path in files)

    def _logs(self, since: float) -> list[Path]:
        paths = (self._project.folder / "logs").glob("*/*.log")
        return [path for path in paths if path.stat().st_mtime >= since]

    def _executed(self, output: str, since: float) -> list[str]:
        """The stages that the engine has executed, not restored."""
        if self._trial.engine == "dvc":
            return sorted(set(re.findall("Running stage '(.+)'", output)) - {"check_params"})
        if self._trial.engine == "cached":
            return [] if "restored from the cache" in output else [self._case.stage]
        logs = [path for path in self._logs(since) if "restored from the cache" not in path.read_text(errors="replace")]
        return sorted(f"{path.parent.name}@{path.stem}" for path in logs)

    def _check_end(self, status: int, session: Session) -> None:
        """The engine has succeeded, and when the last orphan has ended all is as without a kill."""
        if status != 0:
            self._problem(f"the same command again ends with {status}:\n{session.output()}")
            return
        deadline = time.monotonic() + _LONGEST_ORPHAN
        while any(other.orphans() for other in self._sessions):
            if time.monotonic() > deadline:
                raise TimeoutError("a process lives on without its engine")
            time.sleep(0.1)
        found, expected = self._project.artifacts(), self._expected.artifacts
        for path in sorted({*found, *expected}):
            if path not in expected:
                self._problem(f"{path}: left over")
            elif found.get(path) != expected[path]:
                self._problem(f"{path}: {'not as' if path in found else 'missing, not'} without a kill")

    def _problem(self, text: str) -> None:
        self.outcome.problems.append(text)


def _sleep(seconds: float, session: Session) -> None:
    deadline = time.monotonic() + seconds
    await_condition(lambda: time.monotonic() >= deadline, session, min(seconds, 0.01))


def _continuable(path: Path) -> bool:
    try:
        return path.suffix != ".json" or json.loads(path.read_bytes()).get("done") != 0
    except FileNotFoundError:
        return False


def _readable(lock: Path) -> bool:
    """Whether DVC can read a dvc.lock."""
    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(lock.read_text()))
    except (yaml.YAMLError, Invalid):
        return False
    return True


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _entries(project: Project) -> dict[str, Path]:
    """The records of finished stages in DVC's cache."""
    return {path.name: path for path in (project.folder / ".dvc/cache/runs").glob("??/*/*") if len(path.name) == 64}


def _objects(project: Project, record: Mapping[str, Any]) -> Iterator[bool]:
    """Whether each output of a record is in the cache."""
    files = project.folder / ".dvc/cache/files/md5"
    return ((files / output["md5"][:2] / output["md5"][2:]).exists() for output in record["outs"])


def _manifest(project: Project, address: str) -> str:
    outputs = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"][address]["outs"]
    return next(str(output["path"]) for output in outputs if "/manifests/" in output["path"])
