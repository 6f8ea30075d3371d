"""Both engines declare the same graph, and every stage declares exactly the code that it imports."""

import os
import re
import shutil
from pathlib import Path

import pytest
import ruamel.yaml

from gradiend_core.errors import GradiendError
from pipeline.check_params import CHECKED
from pipeline.dag import Hashes, Stage, prepare, private_repo, read_stages
from pipeline.imports import closure, compare, fixed
from project import ROOT, Project, create


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The pipeline with stub stages, two seeds and shards, a model from a folder and one from the hub."""
    made = create(tmp_path_factory.mktemp("dag") / "project")
    made.replace("params.yaml", "local: {}", "local: {mine: {path: folder}}")
    made.replace("params.yaml", "hub: {}", "hub: {theirs: {id: some/model}}")
    made.replace("params.yaml", "seeds: [0]", "seeds: [0, 1]")
    made.replace("params.yaml", "gradient_shards: [0]", "gradient_shards: [0, 1]")
    (made.folder / "folder").mkdir()
    # A dry run shows a job's files only when it has no message to show.
    snakefile = made.folder / "Snakefile"
    snakefile.write_text(re.sub(r" +message:\n.*\n", "", snakefile.read_text()))
    return made


@pytest.fixture
def stages(project: Project, monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    """What DVC knows, but for the check of the parameters, which Snakemake makes when it reads the Snakefile."""
    monkeypatch.chdir(project.folder)
    with private_repo() as repo:
        return {stage.address: stage for stage in read_stages(repo, Hashes(repo))}


def jobs(dry_run: str) -> list[str]:
    """The description of each job of a dry run, the command last."""
    return re.findall(r"^rule .*?pipeline\.cached .*?$", dry_run, re.MULTILINE | re.DOTALL)


def declaration(job: str) -> tuple[str, tuple[set[str], set[str]]]:
    """A job's stage, inputs and outputs."""
    stage = re.search(r"pipeline\.cached --threads \d+(?: --gpus \d+)? (\S+) > logs/", job)
    inputs, outputs = (re.search(rf"^    {name}: (.*)$", job, re.MULTILINE) for name in ("input", "output"))
    if stage is None or inputs is None or outputs is None:
        pytest.fail(f"not the job of a stage:\n{job}")
    return stage[1], (set(inputs[1].split(", ")), set(outputs[1].replace(" (update)", "").split(", ")))


def test_snakemake_and_dvc_declare_the_same_graph(project: Project, stages: dict[str, Stage]) -> None:
    outputs = sorted(path for stage in stages.values() for path in stage.outputs)
    by_snakemake = dict(map(declaration, jobs(project.snakemake("--forceall", "--dry-run", "-p", *outputs))))
    own = {"corpus_text@own": {"own.txt"}, "base_model_local@mine": {"folder"}}
    by_dvc = {
        address: (
            {*stage.inputs(outputs), f".stages/{address}.spec.json"} | own.get(address, set()),
            set(stage.outputs),
        )
        for address, stage in stages.items()
    }
    assert by_snakemake.keys() == by_dvc.keys()
    for address, (inputs, written) in by_dvc.items():
        assert by_snakemake[address][0] == inputs, f"{address}: inputs differ (Snakemake left, DVC right)"
        assert by_snakemake[address][1] == written, f"{address}: outputs differ (Snakemake left, DVC right)"


def test_dvc_checks_the_params_before_every_other_stage() -> None:
    # Not only before those that follow by themselves: with a target DVC makes what it depends on and nothing else.
    stages = ruamel.yaml.YAML(typ="safe").load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    check = stages.pop("check_params")
    assert check["outs"] == [str(CHECKED)]
    assert check["cmd"].endswith(f" --output {CHECKED}")
    assert [name for name, stage in stages.items() if str(CHECKED) not in stage.get("do", stage)["deps"]] == []


def test_the_memory_of_train_follows_its_files_and_grows_with_each_attempt(project: Project) -> None:
    folder = project.folder / "artifacts/runs/a/gradients"
    folder.mkdir(parents=True)
    for name in ("shard-0.parquet", "shard-1.parquet", "shard-1.safetensors"):
        (folder / name).touch()

    def asked(mebibytes: int, attempt: int) -> int:
        with (folder / "shard-0.safetensors").open("wb") as stream:
            stream.truncate(mebibytes * 2**20)
        job = project.snakemake("--dry-run", "--attempt", str(attempt), "artifacts/runs/a/seeds/0/model.safetensors")
        found = re.search(r"^rule train:.*?, mem_mb=(\d+),", job, re.MULTILINE | re.DOTALL)
        assert found is not None
        return int(found[1])

    assert [asked(0, 1), asked(3000, 1), asked(3000, 3)] == [8000, 10_000, 30_000]


def test_records_that_cannot_be_written_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(create(tmp_path).folder)
    Path(f".stages/.partial-{os.getpid()}-corpus_text@own.spec.json").mkdir(parents=True)  # in the way
    with pytest.raises(GradiendError, match=r"^\.stages/corpus_text@own\.spec\.json: cannot be written \(.*\)\. Check"):
        list(prepare())


def test_inputs_are_the_outputs_at_and_below_what_a_stage_reads() -> None:
    stage = Stage("plot@a", "", {}, {}, artifacts=("a/b", "a/f.json"), outputs=())
    outputs = ["a/b-c/x", "a/b.json", "a/b/x", "a/b/y/z", "a/b0", "a/f.json", "a/f.json2", "b/b/x"]
    assert stage.inputs(outputs) == ["a/b/x", "a/b/y/z", "a/f.json"]


def test_reading_all_stages_parses_each_file_once_and_never_dvc_lock(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    (project.folder / "dvc.lock").write_text("not: [yaml")
    parsed: list[str] = []
    load = ruamel.yaml.YAML.load

    def counted(yaml: ruamel.yaml.YAML, text: str) -> object:
        parsed.append(text)
        return load(yaml, text)

    monkeypatch.setattr(ruamel.yaml.YAML, "load", counted)
    prepare()
    (project.folder / "dvc.lock").unlink()
    assert len(parsed) == len(set(parsed)) <= 3


def test_every_stage_declares_the_code_that_it_imports() -> None:
    differences = list(compare((ROOT / "dvc.yaml").read_text("utf-8"), ROOT))
    assert not differences, "\n".join([*differences, "Run `python -m pipeline.imports --fix`."])


def test_the_closure_follows_every_kind_of_import(tmp_path: Path) -> None:
    files = {
        "pipeline/__main__.py": "import os",
        "pipeline/stage.py": "def f():\n    from gradiend_core import late",
        "pipeline/train.py": "import gradiend_core.sub.plain\nfrom gradiend_core.sub import module, CONSTANT\n"
        "from pipeline.stage import f",
        "gradiend_core/__init__.py": "",
        "gradiend_core/typing_only.py": "x = 1",
        "gradiend_core/late.py": "from .relative import x\nif TYPE_CHECKING:\n    import gradiend_core.typing_only",
        "gradiend_core/relative.py": "x = 1",
        "gradiend_core/unused.py": "x = 1",
        "gradiend_core/sub/__init__.py": "CONSTANT = 1",
        "gradiend_core/sub/plain.py": "import json",
        "gradiend_core/sub/module.py": "import json",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    unused = {"gradiend_core/__init__.py", "gradiend_core/typing_only.py", "gradiend_core/unused.py"}
    assert closure("train", tmp_path) == sorted(files.keys() - unused)


def test_fix_makes_the_declarations_exact_and_changes_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline")
    shutil.copytree(ROOT / "gradiend_core", tmp_path / "gradiend_core")
    text = (ROOT / "dvc.yaml").read_text("utf-8")
    broken = re.sub(r"        - pipeline/stage\.py\n", "", text).replace(
        "        - pipeline/plot.py\n", "        - pipeline/plot.py\n        - pipeline/train.py\n"
    )
    assert list(compare(broken, tmp_path))
    repaired = fixed(broken, tmp_path)
    assert list(compare(repaired, tmp_path)) == []
    code = re.compile(r" +- (gradiend_core|pipeline)/.*\n")
    assert code.sub("", repaired) == code.sub("", text)
