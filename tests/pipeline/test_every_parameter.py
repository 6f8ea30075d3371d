"""Every key of params.yaml: what a change of it makes due with both engines, and that changing it back restores.

The leaves are found in the model of the params, so that a new one is covered by being there.
"""

import ast
import copy
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ruamel.yaml
import yaml
from leaves import Data, Place, changed, declarations, declaring, leaves, sections_in, sections_of, transferred
from transformers import BertConfig, TrainingArguments

from gradiend_core.config.params import Params, Run, validate_params
from pipeline.dag import Hashes, Stage, prepare, private_repo, read_stages
from pipeline.imports import closure, declared
from project import ROOT, Project, create

DVC_YAML = (ROOT / "dvc.yaml").read_text("utf-8")
PARAMS = validate_params(yaml.safe_load(Path(__file__).with_name("every_section.yaml").read_text("utf-8")), "params")
ALL_LEAVES = dict(leaves(PARAMS))
LEAVES = {place: field for place, field in ALL_LEAVES.items() if place[0] != "runs" or place[1] == "a"}

# Made here, by their stages: all of run a, the beginning of run b, and what no run uses.
MADE = {
    "plot@a": "artifacts/runs/a/plots/training.png",
    "rewrite_model@a": "artifacts/runs/a/rewritten/X/model.safetensors",
    "pre_prune@b": "artifacts/runs/b/selection.safetensors",
    "base_model_hub@theirs": "artifacts/base_models/theirs/model.safetensors",
    "generate_data@own_words": "artifacts/datasets/own_words/training.parquet",
}

# The tests of a key name it, or else what it is called where it is an argument of ours.
UNDER_ANOTHER_NAME = {"runs.a.evaluate_decoder.lms_ratio": "select_candidates"}
NOT_ABOUT_EFFECTS = [ROOT / "tests/unit/test_config.py", Path(__file__)]

# Changes that the reference package does not notice, so that it goes on with results of the earlier value.
UNNOTICED_BY_THE_REFERENCE = {
    "learning rate": ("runs.a.train.learning_rate", {"train@a-0"}),
    "steps": ("runs.a.train.max_steps", {"train@a-0"}),
    "data": ("datasets.written_words.max_size_per_class", {"generate_data@written_words"}),
    "data set": ("runs.a.dataset", {"pre_prune@a", "evaluate_decoder@a"}),
    "params": ("runs.a.pre_prune.params", {"pre_prune@a"}),
    "seed": ("seeds", {"train@a-1", "select_seed@a"}),
    "pruning before": ("runs.a.pre_prune.topk", {"pre_prune@a"}),
    "pruning after": ("runs.a.post_prune.topk", {"post_prune@a"}),
    "model": ("runs.a.base_model", {"pre_prune@a", "evaluate_decoder@a", "rewrite_model@a"}),
    "classes": ("runs.a.target_classes", {"pre_prune@a", "plot@a"}),
    "alternative token": ("datasets.written_words.classes", {"generate_data@written_words"}),
}


def key_of(place: Place) -> str:
    return ".".join(map(str, place))


def write(project: Project, params: Data) -> None:
    (project.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that both engines know to be up to date."""
    project = create(tmp_path_factory.mktemp("parameters") / "project")
    write(project, PARAMS.model_dump())
    (project.folder / "folder").mkdir()
    (project.folder / "folder/model.safetensors").write_text("weights")
    (project.folder / "own.txt").write_text("One row.\nTwo row.\n")
    project.snakemake(*MADE.values())
    assert len(project.executed()) == 18
    project.repro(*MADE)
    assert project.executed() == []
    return project


@pytest.fixture(scope="module")
def one_run(made_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, Data]]:
    """A copy, the working directory, whose params have run a only; and these."""
    project = made_once.copy(tmp_path_factory.mktemp("one_run") / "project")
    params = PARAMS.model_dump()
    params["runs"] = {"a": params["runs"]["a"]}
    write(project, params)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(project.folder)
        monkeypatch.setattr(ruamel.yaml.YAML, "load", remembering(ruamel.yaml.YAML.load))
        yield project, params


def remembering(load: Any) -> Any:
    """YAML that was parsed before is not parsed again: DVC reads a few large files many times over."""
    known: dict[str, Any] = {}

    def remembered(parser: ruamel.yaml.YAML, text: Any) -> Any:
        if not isinstance(text, str) or parser.typ != ["safe"]:
            return load(parser, text)
        if text not in known:
            known[text] = load(parser, text)
        return copy.deepcopy(known[text])

    return remembered


def due() -> tuple[set[str], set[str]]:
    """The stages that have to run as things are, before others have: as Snakemake finds, and as DVC finds."""
    before = {path: path.read_bytes() for path in Path(".stages").glob("*.spec.json")}
    with private_repo() as repo:
        by_dvc = set(repo.status())
        with patch("pipeline.dag.private_repo", lambda: nullcontext(repo)):  # else dvc.yaml is resolved twice
            prepare()
    renewed = [path for path in Path(".stages").glob("*.spec.json") if path.read_bytes() != before.get(path)]
    return {path.name.removesuffix(".spec.json") for path in renewed}, by_dvc - {"check_params"}


Found = tuple[dict[Place, set[str]], dict[Place, set[str]], dict[Place, set[str]]]


@pytest.fixture(scope="module")
def found(one_run: tuple[Project, Data]) -> Found:
    """The stages that a change of each leaf makes due directly: as declared, for Snakemake and for DVC.

    Leaves that different stages declare are changed together, to save time.
    """
    project, params = one_run
    assert due() == (set(), set())
    declared_before = declarations(DVC_YAML, params)
    rounds: list[tuple[Data, dict[Place, set[str]]]] = []
    for place, field in LEAVES.items():
        after = changed(params, place, field)
        assert after is not None, f"{key_of(place)}: no other valid value found; widen every_section.yaml or leaves.py"
        stages = declaring(place, declared_before, declarations(DVC_YAML, after))
        for number, (together, places) in enumerate(rounds):
            if stages.isdisjoint(chain(*places.values())):
                rounds[number] = (transferred(together, place, after), {**places, place: stages})
                break
        else:
            rounds.append((after, {place: stages}))
    by_snakemake, by_dvc = {}, {}
    for together, places in rounds:
        write(project, together)
        due_for_snakemake, due_for_dvc = due()
        for place in places:
            others = set(chain(*(other for at, other in places.items() if at != place)))
            by_snakemake[place], by_dvc[place] = due_for_snakemake - others, due_for_dvc - others
    write(project, params)
    assert due() == (set(), set())
    return {place: stages for _, places in rounds for place, stages in places.items()}, by_snakemake, by_dvc


def test_there_is_one_of_each_section() -> None:
    assert sections_of(Params) == sections_in(PARAMS)


def test_a_change_of_any_leaf_makes_exactly_the_stages_due_that_declare_it(found: Found) -> None:
    by_declaration, by_snakemake, by_dvc = found
    assert by_declaration.keys() == LEAVES.keys()
    assert [key_of(place) for place, stages in by_declaration.items() if not stages] == []
    assert by_snakemake == by_declaration
    assert by_dvc == by_declaration


@pytest.mark.parametrize("what", UNNOTICED_BY_THE_REFERENCE)
def test_what_the_reference_does_not_notice_is_noticed(what: str, found: Found) -> None:
    key, stages = UNNOTICED_BY_THE_REFERENCE[what]
    by_key = [{key_of(place): due for place, due in way.items()} for way in found]
    assert stages <= by_key[0][key]
    assert by_key[0][key] == by_key[1][key] == by_key[2][key]


def test_order_of_keys_and_comments_in_the_params_make_nothing_due(one_run: tuple[Project, Data]) -> None:
    project, params = one_run
    text = yaml.safe_dump(reversed_keys(params), sort_keys=False, default_flow_style=False)
    (project.folder / "params.yaml").write_text(f"# A remark.\n\n{text}", "utf-8")
    assert due() == (set(), set())
    write(project, params)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return list(map(reversed_keys, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("module", ["gradiend_core/statistics.py", "gradiend_core/corpus/user_text.py"])
def test_whitespace_in_a_module_makes_exactly_the_stages_due_that_import_it(
    one_run: tuple[Project, Data], module: str
) -> None:
    project, params = one_run
    before = (project.folder / module).read_text()
    (project.folder / module).write_text(f"{before}\n")
    stages = {stage for stage in declared(DVC_YAML) if module in closure(stage, ROOT)}
    importing = {address for address in declarations(DVC_YAML, params) if address.split("@")[0] in stages}
    assert importing
    assert due() == (importing, importing)
    (project.folder / module).write_text(before)
    assert due() == (set(), set())


# Changes of params and of files whose stages differ, none of which is made from another's output.
CHANGED_KEYS = ["runs.a.evaluate_encoder.seed", "datasets.other_words.classes"]
CHANGED_FILES = {"folder/model.safetensors": "WEIGHTS", "own.txt": "Two row.\nOne row.\n"}
CHANGED_STAGES = {"evaluate_encoder@a", "generate_data@other_words", "base_model_local@mine", "corpus_text@own"}


@pytest.mark.parametrize("engine", ["snakemake", "repro"])
def test_changes_execute_what_depends_on_them_and_changing_them_back_restores(
    made_once: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    project = made_once.copy(tmp_path / "project")
    before, params = project.artifacts(), PARAMS.model_dump()
    originals = {name: (project.folder / name).read_text() for name in ["params.yaml", *CHANGED_FILES]}
    targets = MADE.values() if engine == "snakemake" else MADE.keys()
    declared_before = declarations(DVC_YAML, params)
    directly = {"base_model_local@mine", "corpus_text@own"}
    for key in CHANGED_KEYS:
        place = tuple(key.split("."))
        after = changed(params, place, ALL_LEAVES[place])
        assert after is not None
        directly |= declaring(place, declared_before, declarations(DVC_YAML, after))
        params = after
    assert directly == CHANGED_STAGES
    write(project, params)
    for name, text in CHANGED_FILES.items():
        (project.folder / name).write_text(text)
    monkeypatch.chdir(project.folder)
    with private_repo() as repo:
        stages = {stage.address: stage for stage in read_stages(repo, Hashes(repo))}
    affected = with_descendants(directly, stages) & with_ancestors(set(MADE), stages)
    getattr(project, engine)(*targets)
    assert project.executed() == sorted(manifest(stages[address]) for address in affected)
    written = {path for address in affected for path in stages[address].outputs}
    assert {path for path, content in project.artifacts().items() if content != before[path]} == written
    for name, text in originals.items():
        (project.folder / name).write_text(text)
    getattr(project, engine)(*targets)
    assert project.executed() == []
    assert project.artifacts() == before


def with_descendants(addresses: set[str], stages: dict[str, Stage]) -> set[str]:
    outputs = sorted(path for address in addresses for path in stages[address].outputs)
    reached = addresses | {address for address, stage in stages.items() if stage.inputs(outputs)}
    return reached if reached == addresses else with_descendants(reached, stages)


def with_ancestors(addresses: set[str], stages: dict[str, Stage]) -> set[str]:
    read = {path for address in addresses for path in stages[address].artifacts}
    reached = addresses | {address for address, stage in stages.items() if not read.isdisjoint(enclosing(stage))}
    return reached if reached == addresses else with_ancestors(reached, stages)


def enclosing(stage: Stage) -> set[str]:
    """The stage's outputs and the folders they are in."""
    return {str(folder) for path in stage.outputs for folder in (Path(path), *Path(path).parents)}


def manifest(stage: Stage) -> str:
    """The name under which `Project.executed` knows the stage."""
    (path,) = (path for path in stage.outputs if path.startswith("artifacts/manifests/"))
    return path.removeprefix("artifacts/manifests/").removesuffix(".json")


def test_every_key_of_a_section_is_read_by_the_stages_that_declare_it() -> None:
    reading = {stage: words_in(closure(stage, ROOT)) for stage in declared(DVC_YAML)}
    by_key = declarations(DVC_YAML, PARAMS.model_dump())
    # Handed over under their own names.
    elsewhere = {
        "model": BertConfig().to_dict().keys(),
        "training": {field.name for field in fields(TrainingArguments)},
    }
    # What is not in a stage's section is in its command.
    in_sections = [place for place in LEAVES if len(place) > 1 and place[-1] not in Run.model_fields]
    assert {
        (key_of(place), stage)
        for place in in_sections
        for stage in declaring(place, by_key, by_key)
        if place[-1] not in {*reading[stage.split("@")[0]], *elsewhere.get(str(place[-2]), ())}
    } == set()


def words_in(files: list[str]) -> set[str]:
    """Attributes and texts in the code."""
    nodes = list(chain(*(ast.walk(ast.parse((ROOT / file).read_text("utf-8"))) for file in files)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_leaf_is_named_in_a_test_of_what_it_does() -> None:
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file not in NOT_ABOUT_EFFECTS]
    words = set(re.findall(r"\w+", " ".join(file.read_text("utf-8") for file in files)))
    assert {key_of(place) for place in LEAVES if UNDER_ANOTHER_NAME.get(key_of(place), place[-1]) not in words} == set()
