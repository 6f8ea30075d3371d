"""Damaged and missing files: nothing damaged is used, messages name it, and the same command restores it.

With GRADIEND_TEST_FAULTS=all every artifact and object of the cache is damaged in every way, for both engines.
"""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import pytest
from by_hand import Done, Hands
from damage import DAMAGES, DRAW, EVERYTHING, MISSING, Stage, Trial, differences, objects, refusal, spoil, stages

from project import Project

# What no run needs, and Snakemake makes when it is asked for.
BESIDE = [f"artifacts/base_models/{name}/config.json" for name in ("copied", "pair")]
BESIDE += ["artifacts/corpora/notes/texts.parquet"]
DATASET = "artifacts/datasets/gender/training.parquet"
ENGINES: dict[str, tuple[str, ...]] = {"snakemake": ("all", *BESIDE), "repro": ()}
VERIFY = ("python", "-m", "pipeline.verify")
KINDS = (*DAMAGES, MISSING)
ROUNDS = range(len(KINDS)) if EVERYTHING else [DRAW.randrange(len(KINDS))]


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project."""
    return finished.copy(tmp_path / "project")


def dealt(paths: Iterable[str], turn: int, kinds: tuple[str, ...] = KINDS) -> dict[str, str]:
    """A kind of damage for each file, all kinds in turn; another one in each of as many turns."""
    turning = cycle(kinds[turn:] + kinds[:turn])
    return {path: next(turning) for path in sorted(paths)}


def executed(project: Project, engine: str, output: str) -> bool:
    """Whether the engine has run a stage that it should have restored."""
    if engine == "repro":
        return "Running stage" in output.replace("Running stage 'check_params'", "")
    logs = [path.read_text() for path in (project.folder / "logs").rglob("*.log")]
    return not logs or not all("restored from the cache" in log for log in logs)


def forget_logs(project: Project) -> None:
    for path in (project.folder / "logs").rglob("*.log"):
        path.unlink()


@pytest.mark.parametrize("turn", ROUNDS)
def test_a_stage_by_hand_refuses_every_damaged_or_missing_input(
    project: Project, trials: list[Trial], turn: int
) -> None:
    before, problems = project.artifacts(), []
    every = stages(project)
    with Hands(project.folder, *{stage.name for stage in every.values()}) as hands:
        for stage in every.values():
            for path, damage in dealt((path for path in stage.inputs if path.startswith("artifacts/")), turn).items():
                done = refused(hands, stage, project.folder / path, damage)
                trials.append(Trial(f"input {damage}", path, "stage by hand", refusal(*done, named=path)))
                problems += [f"{stage.address}, {path} {damage}: {why}" for why in trials[-1].problems]
    assert project.artifacts() == before
    assert problems == []


def refused(hands: Hands, stage: Stage, path: Path, damage: str) -> Done:
    """How the stage ended with one of its inputs damaged, which is put right again."""
    content = path.read_bytes()
    spoil(path, damage)
    done = hands.stage(stage.arguments)
    path.write_bytes(content)
    return done


@pytest.mark.parametrize("turn", ROUNDS)
@pytest.mark.parametrize("engine", [*ENGINES])
def test_engines_restore_damaged_and_missing_artifacts(
    project: Project, trials: list[Trial], engine: str, turn: int
) -> None:
    before = project.artifacts()
    damaged = dealt(before, turn)
    for path, damage in damaged.items():
        spoil(project.folder / path, damage)
    forget_logs(project)
    output = getattr(project, engine)(*ENGINES[engine])
    problems = ["a stage was executed"] if executed(project, engine, output) else []
    after = project.artifacts()
    trials.extend(
        Trial(f"artifact {damage}", path, engine, problems + ([] if after.get(path) == before[path] else ["differs"]))
        for path, damage in damaged.items()
    )
    assert problems == []
    assert differences(after, before) == []


SOME_OBJECTS = ("generate_data@gender", "select_seed@gender")


def test_snakemake_does_not_restore_from_damaged_objects(project: Project, trials: list[Trial]) -> None:
    before = project.artifacts()
    known = stages(project)
    chosen = [stage for stage in known.values() if EVERYTHING or stage.address in SOME_OBJECTS]
    outputs = [path for stage in chosen for path in stage.outputs]
    places = dict(zip(outputs, objects(project, outputs), strict=True))
    damaged = dealt(outputs, DRAW.randrange(len(DAMAGES)), (*DAMAGES,))
    for path in outputs:
        (project.folder / path).unlink()
    for place, path in {place: path for path, place in places.items()}.items():  # outputs with one content share it
        spoil(place, damaged[path])
    for stage in chosen:
        output = project.run("python", "-m", "pipeline.cached", stage.address)
        named = "damaged: its content is not what its name says. Removed" in output
        problems = [] if named and "restored from the cache" not in output else [output]
        after = project.artifacts()
        problems += [f"{path} differs" for path in stage.outputs if after.get(path) != before[path]]
        trials.extend(Trial(f"object {damaged[path]}", path, "snakemake", problems) for path in stage.outputs)
        assert problems == []
    assert differences(project.artifacts(), before) == []
    assert "Nothing is damaged." in project.run(*VERIFY)  # what was computed again is in the cache, whole


ENTRIES: list[bytes | str] = [b"", b"outs: [", b"\xff\xfe\x00", b"- a list\n", "flipped", "cut"]


@pytest.mark.parametrize("content", ENTRIES if EVERYTHING else DRAW.sample(ENTRIES, 2))
def test_a_damaged_entry_of_the_run_cache_is_named_and_written_again(
    project: Project, trials: list[Trial], content: bytes | str
) -> None:
    before, report = project.artifacts(), "artifacts/runs/gender/seed_report.json"
    entry = run_cache_entry(project, report)
    spoil(objects(project, [report])[0], "flipped")  # the stage writes the same bytes again, which DVC would not store
    (project.folder / report).unlink()
    original = entry.read_bytes()
    entry.write_bytes(content if isinstance(content, bytes) else DAMAGES[content](original))
    output = project.run("python", "-m", "pipeline.cached", "select_seed@gender")
    problems = [] if f"{entry.name}: damaged: " in output else [output]
    problems += [] if entry.read_bytes() == original else ["it was not written again"]
    trials.append(Trial("run-cache entry damaged", "select_seed@gender", "snakemake", problems))
    assert problems == []
    assert project.artifacts() == before
    (project.folder / report).unlink()
    assert "restored from the cache" in project.run("python", "-m", "pipeline.cached", "select_seed@gender")
    assert project.artifacts() == before


def run_cache_entry(project: Project, output: str) -> Path:
    """The entry that names an output as its own."""
    entries = (project.folder / ".dvc/cache/runs").glob("*/*/*")
    found = [path for path in entries if f"- path: {output}" in path.read_text().partition("\nouts:\n")[2]]
    assert len(found) == 1
    return found[0]


def test_verify_finds_what_a_disk_has_spoilt_unseen_and_the_engine_restores_it(
    project: Project, trials: list[Trial]
) -> None:
    before = project.artifacts()
    targets = ENGINES["snakemake"] if EVERYTHING else (DATASET,)
    project.snakemake(*targets)  # DVC's table of known hashes now has the files of this copy
    paths = [path for path in before if (EVERYTHING and path not in BESIDE) or path.startswith("artifacts/datasets/")]
    for path in paths:
        spoil(project.folder / path, "flipped", quietly=True)
    forget_logs(project)
    output = project.run(*VERIFY, succeeds=False)
    trials.extend(
        Trial("artifact flipped unseen", path, "pipeline.verify", [] if f"{path}: damaged" in output else [output])
        for path in paths
    )
    output = project.snakemake(*targets)
    assert not executed(project, "snakemake", output)
    assert differences(project.artifacts(), before) == []
    assert [trial for trial in trials if trial.problems] == []
    assert "Nothing is damaged." in project.run(*VERIFY)


def test_verify_removes_damaged_objects_and_puts_back_those_whose_artifacts_are_whole(
    project: Project, trials: list[Trial]
) -> None:
    before = project.artifacts()
    paths = [path for path in before if EVERYTHING or "/seeds/0/" in path]
    places = dict(zip(paths, objects(project, paths), strict=True))
    for path, damage in dealt(places, 0, (*DAMAGES,)).items():
        if places[path] not in [places[other] for other in paths[: paths.index(path)]]:
            spoil(places[path], damage)
    lost = paths[0]
    spoil(project.folder / lost, "cut")
    output = project.run(*VERIFY, succeeds=False)
    for path, place in places.items():
        problems = [] if f"{place.name}: damaged" in output else [output]
        back = places[lost] != place
        problems += [] if place.exists() == back and (f"{place}: put back from" in output) == back else ["not put back"]
        trials.append(Trial("object damaged", path, "pipeline.verify", problems))
        assert problems == []
    assert project.artifacts().items() >= {path: before[path] for path in paths[1:]}.items()


@pytest.mark.skipif(not EVERYTHING, reason="of the long campaign: GRADIEND_TEST_FAULTS=all")
def test_what_dvc_has_restored_damaged_is_refused_by_the_next_stage_and_mended(
    project: Project, trials: list[Trial]
) -> None:
    before = project.artifacts()
    for stage in stages(project).values():
        report = next((path for path in stage.inputs if path.startswith("artifacts/")), None)
        if report is None:
            continue
        place = objects(project, [report])[0]
        spoil(place, "flipped")
        (project.folder / report).unlink()
        project.repro()
        assert project.artifacts()[report] != before[report]  # DVC trusts an object that is read-only
        problems = refusal(1, project.run("python", "-m", "pipeline", *stage.arguments, succeeds=False), named=report)
        problems += [] if report in project.run(*VERIFY, succeeds=False) else ["verify does not name it"]
        project.repro()
        problems += differences(project.artifacts(), before)
        trials.append(Trial("object flipped", report, "repro", problems))
        assert problems == []
