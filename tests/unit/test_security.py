"""Files and names from strangers: nothing in them is executed, leaves its folder, or takes memory without bounds."""

import ast
import io
import json
import os
import pickle
import re
import shutil
import string
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from gradiend_core import files, tables
from gradiend_core.config.base_models import LocalBaseModel
from gradiend_core.config.corpora import GrammarCorpus, TextCorpus
from gradiend_core.config.params import validate_params
from gradiend_core.config.section import read_params, validate
from gradiend_core.corpus import user_text
from gradiend_core.corpus.grammar_files import read_grammar
from gradiend_core.errors import GradiendError
from gradiend_core.files import read_json, sha256_file
from gradiend_core.gradients.selection import Selection, backbone_parameters
from gradiend_core.gradients.store import GradientStore
from gradiend_core.lm.folder import load_masked_lm, save_masked_lm
from gradiend_core.model import gradiend
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.tables import read_table
from gradiend_core.tensors import load_tensors, read_metadata, save_tensors
from pipeline import rewrite_model
from pipeline.stage import Outputs
from project import BIN, ROOT, Project, create

TEXTS = {"text": pa.string()}
TEXT = validate(TextCorpus, {"path": "unused"}, "params.yaml")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The folder that is there once something has been executed."""
    return tmp_path / "executed"


@pytest.fixture
def model_folder(tmp_path: Path, reference_folder: Path) -> Path:
    """A copy of the tiny reference model, for strangers to change."""
    return Path(shutil.copytree(reference_folder, tmp_path / "model"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def pickles(trap: Path) -> list[bytes]:
    """As pickle and as torch write it."""
    saved = io.BytesIO()
    torch.save({"bert.embeddings.word_embeddings.weight": Trap(trap)}, saved)
    return [pickle.dumps(Trap(trap)), saved.getvalue()]


def test_the_trap_works(trap: Path) -> None:
    pickle.loads(pickles(trap)[0])
    trap.rmdir()
    torch.load(io.BytesIO(pickles(trap)[1]), weights_only=False)
    assert trap.is_dir()


@pytest.mark.parametrize(
    "read",
    [
        read_json,
        read_params,
        load_tensors,
        read_metadata,
        lambda path: read_table(path, TEXTS),
        *(
            lambda path, suffix=suffix: user_text.read_texts(path.rename(path.with_suffix(suffix)), TEXT)
            for suffix in (".parquet", ".csv", ".txt")
        ),
    ],
)
@pytest.mark.parametrize("kind", [0, 1])
def test_no_reader_loads_a_pickle(tmp_path: Path, trap: Path, read: Callable[[Path], Any], kind: int) -> None:
    (tmp_path / "file").write_bytes(pickles(trap)[kind])
    with pytest.raises(GradiendError):
        read(tmp_path / "file")
    assert not trap.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", [0, 1])
def test_no_base_model_loads_a_pickle(model_folder: Path, trap: Path, name: str, kind: int) -> None:
    if name == "pytorch_model.bin":
        (model_folder / "model.safetensors").unlink()
    (model_folder / name).write_bytes(pickles(trap)[kind])
    with pytest.raises(GradiendError, match=str(model_folder)):
        load_masked_lm(model_folder)
    assert not trap.exists()


def test_harmless_pickled_weights_are_refused_too(model_folder: Path) -> None:
    torch.save(load_file(model_folder / "model.safetensors"), model_folder / "pytorch_model.bin")
    load_masked_lm(model_folder)
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(GradiendError, match=r"model\.safetensors.*SECURITY\.md"):
        load_masked_lm(model_folder)


def test_the_code_has_no_word_for_loading_pickles_or_running_text() -> None:
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"eval", "exec", "__import__", "torch.load", "np.load", "pd.read_pickle", "yaml.load", "os.system"}
    options = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}
    for path in [*ROOT.glob("gradiend_core/**/*.py"), *ROOT.glob("pipeline/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not modules & {name.split(".")[0] for name in named}, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{path}:{node.lineno}"
                given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg in options}
                assert not given.items() & {name: str(value) for name, value in options.items()}.items(), path


def add_code(folder: Path, trap: Path, *, file: str, key: str, **values: Any) -> None:
    """Code that comes with a model, named by one of its files."""
    (folder / "own.py").write_text(
        "import os\nfrom transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast\n"
        f"os.mkdir({str(trap)!r})\nclass Config(BertConfig):\n    model_type = 'own'\n"
        "class Model(BertForMaskedLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    names = {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Model", "AutoTokenizer": [None, "own.Tokenizer"]}
    edit(folder / file, auto_map={key: names[key], "AutoModelForMaskedLM": "own.Model"}, **values)


def test_code_of_a_model_is_not_run_though_somebody_would_say_yes(
    model_folder: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    add_code(model_folder, trap, file="config.json", key="AutoConfig", model_type="own")
    with pytest.raises(GradiendError, match="contains custom code which must be executed"):
        load_masked_lm(model_folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("file", "key", "values"),
    [("config.json", "AutoConfig", {}), ("tokenizer_config.json", "AutoTokenizer", {"tokenizer_class": "Tokenizer"})],
)
def test_a_copy_of_a_model_does_not_name_its_code(
    model_folder: Path, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, key: str, values: Any
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    add_code(model_folder, trap, file=file, key=key, **values)
    copy = tmp_path / "copy"
    copy.mkdir()
    save_masked_lm(copy, *load_masked_lm(model_folder))
    assert not trap.exists()
    assert not list(copy.glob("*.py"))
    assert not [path for path in copy.glob("*.json") if "auto_map" in path.read_text()]


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "stranger/kernel"},
        {"_attn_implementation": {"": "stranger/kernel@main"}},
        {"text_config": {"experts_implementation": "stranger/kernel"}},
    ],
)
def test_kernels_of_the_hub_are_not_fetched(model_folder: Path, values: dict[str, Any]) -> None:
    edit(model_folder / "config.json", **values)
    with pytest.raises(GradiendError, match=r"config\.json: \w+ .*stranger/kernel.* is code of the hub"):
        load_masked_lm(model_folder)


def test_a_folder_never_leads_to_the_hub(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *place, **_: asked.append(place))
    with pytest.raises(GradiendError, match="stranger/model: no such folder"):
        load_masked_lm("stranger/model")
    edit(model_folder / "config.json", auto_map={"AutoConfig": "stranger/model--own.Config"}, model_type="own")
    with pytest.raises(GradiendError, match="stranger/model"):
        load_masked_lm(model_folder)
    (model_folder / "model.safetensors").unlink()
    edit(model_folder / "config.json", model_type="bert", _name_or_path="stranger/model")
    with pytest.raises(GradiendError, match=r"model\.safetensors"):
        load_masked_lm(model_folder)
    assert asked == []


# What may become a folder or part of a command line.

ODD = [
    ";touch x",
    "$(touch x)",
    "`touch x`",
    "|x",
    "&",
    ">x",
    "<x",
    "'",
    '"',
    "\\",
    "\n",
    "\t",
    " ",
    "*",
    "?",
    "${seeds}",
]
ODD += ["$HOME", "{run}", "!", "#", "~", ":", "(", "[", "^", "\0", "\u202e", "\u00a0"]
BAD_NAMES = ["", "..", ".", "../../x", "/etc/x", "a/b", "-rf", "_a", "x" * 65, "a.b", "é", *(f"a{odd}b" for odd in ODD)]
BAD_PATHS = ["", "-x", "~/x", "=x", "https://example.org/x", "s3://a/b", "remote://a/b", *(f"a{odd}b" for odd in ODD)]
GOOD_PATHS = ["x", "./x", "../x", "/data/x", "data/my_texts-2.csv", "a@b+c,d%=e", "日本語/テキスト.txt", "é"]


def rename(old: str, new: str) -> Callable[[Any], Any]:
    """A copy of parameters in which a name is replaced wherever it stands."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed(key): renamed(item) for key, item in value.items()}
        return [renamed(item) for item in value] if isinstance(value, list) else new if value == old else value

    return renamed


@pytest.mark.parametrize("old", ["english", "demo-bert", "pronoun_gender", "masculine"])
def test_names_that_could_leave_their_folder_or_command_are_refused(old: str) -> None:
    params = read_params(ROOT / "params.yaml")
    validate_params(rename(old, "a" * 64)(params), "params.yaml")
    for name in BAD_NAMES:
        with pytest.raises(GradiendError, match=r"is not a name|should match pattern|at most 64"):
            validate_params(rename(old, name)(params), "params.yaml")


@pytest.mark.parametrize(
    ("section", "more"), [(TextCorpus, {}), (GrammarCorpus, {"max_size": 1}), (LocalBaseModel, {})]
)
def test_paths_that_a_shell_or_dvc_would_read_otherwise_are_refused(section: Any, more: dict[str, Any]) -> None:
    for path in GOOD_PATHS:
        assert validate(section, {"path": path, **more}, "params.yaml").path == path
    for path in BAD_PATHS:
        with pytest.raises(GradiendError, match=r"^params\.yaml: path: .*a path may hold letters, digits and"):
            validate(section, {"path": path, **more}, "params.yaml")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_shell_takes_every_allowed_path_literally(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    allowed = [c for c in string.printable if not re.search(r"may hold", refusal(f"a{c}a"))]
    assert set(string.ascii_letters) < set(allowed)
    path = "a".join(["a", *allowed, "a"])
    done = subprocess.run([shell, "-c", f"printf %s {path}"], capture_output=True, text=True, check=True)
    assert done.stdout == path


def refusal(path: str) -> str:
    try:
        validate(TextCorpus, {"path": path}, "params.yaml")
    except GradiendError as error:
        return str(error)
    return ""


def test_command_lines_hold_names_numbers_and_paths_only() -> None:
    # What stands here is refused above, or is a number; texts and words are in no command line.
    names = {"key", "item.run", "item.corpus", "item.dataset", "item.base_model"}
    names |= {"item.target_classes[0]", "item.target_classes[1]"}
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    commands = [stage.get("do", stage)["cmd"] for stage in stages]
    used = {name for command in commands for name in re.findall(r"\$\{(.*?)\}", command)}
    assert used <= names | {"item.path", "item.seed", "item.shard"}
    shell = re.findall(r"^ +shell:\n((?: +\".*\n)+)", (ROOT / "Snakefile").read_text(), re.MULTILINE)
    assert len(shell) == len(commands) - 1  # check_params is no rule
    used = {name for command in shell for name in re.findall(r"\{(.*?)\}", command)}
    wildcards = {f"wildcards.{name}" for name in ("run", "seed", "shard", "corpus", "model", "dataset")}
    assert used <= wildcards | {"threads", "log", "resources.gpu", "params.address"}


@pytest.fixture(scope="module")
def checked_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The real stages with the demo's parameters, which DVC has checked."""
    project = create(tmp_path_factory.mktemp("checked") / "project")
    for name in ("pipeline", "gradiend_core"):
        shutil.copytree(ROOT / name, project.folder / name, dirs_exist_ok=True)
    shutil.copytree(ROOT / "data/english", project.folder / "data/english")
    shutil.copy(ROOT / "params.yaml", project.folder)
    project.repro("check_params")
    return project


@pytest.fixture
def project(checked_once: Project, tmp_path: Path) -> Project:
    return checked_once.copy(tmp_path / "project")


def refused(project: Project, params: Any, *target: str) -> str:
    """What `dvc repro` says of params that it refuses, having executed the check only, and removed nothing."""
    mine = [project.folder / "artifacts/corpora/english", project.folder.with_name("mine")]
    for folder in mine:
        folder.mkdir(parents=True)
        (folder / "texts.parquet").write_text("mine")
    (project.folder / "params.yaml").write_text(yaml.safe_dump(params))
    said = project.repro(*target, succeeds=False)
    assert re.findall(r"Running stage '(\w+)", said) == ["check_params"]
    assert not (project.folder / "executed").exists()
    assert [(folder / "texts.parquet").read_text() for folder in mine] == ["mine", "mine"]
    return said


NAMES = ["a;touch executed;b", "a$(touch executed)", "a\ntouch executed\n", "../../../mine"]


@pytest.mark.parametrize("name", NAMES)
def test_dvc_executes_and_removes_nothing_for_a_bad_name_also_with_a_target(project: Project, name: str) -> None:
    params = rename("english", name)(read_params(ROOT / "params.yaml"))
    assert f"{name!r} is not a name" in refused(project, params, f"corpus_grammar@{name}")


@pytest.mark.parametrize("target", [[], ["corpus_text@own"], ["plot@pronoun_number"]])
def test_dvc_executes_nothing_for_a_bad_path_also_with_a_target(project: Project, target: list[str]) -> None:
    params = read_params(ROOT / "params.yaml")
    params["corpora"]["text"]["own"] = {"path": "own.txt;touch executed;"}
    (project.folder / "own.txt;touch executed;").write_text("A text.\n")
    assert "corpora.text.own.path: a path may hold" in refused(project, params, *target)


def test_links_at_the_place_of_outputs_are_replaced_not_followed(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.json", f".partial-{os.getpid()}-a.json", ".partial-resume-b.json", "m.json"):
        (out / name).symlink_to(own)
    with Outputs("stage", out / "m.json", {}, []) as outputs:
        outputs.path(out / "a.json").write_text("result")
        outputs.resumable(out / "b.json").write_text("result")
    assert own.read_text() == "mine"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert [(out / name).read_text() for name in ("a.json", "b.json")] == ["result", "result"]


def test_a_model_whose_class_is_a_path_is_not_rewritten(
    tmp_path: Path, reference_folder: Path, reference_model: Any
) -> None:
    selection = Selection.everything(backbone_parameters(reference_model[0], ["*.LayerNorm.bias"]))
    name = str(tmp_path / "outside")
    GradiendModel(selection, target_classes=(name, "b")).save_pretrained(tmp_path / "gradiend")
    chosen = {"learning_rate": 0.1, "feature_factor": 1.0}
    (tmp_path / "metrics.json").write_text(json.dumps({"classes": {name: chosen, "b": chosen}}))
    arguments = {"manifest": tmp_path / "m.json", "model": tmp_path / "gradiend", "base-model": reference_folder}
    arguments |= {"decoder": tmp_path, "output": tmp_path / "rewritten"}
    with pytest.raises(GradiendError, match=r"gradiend/config\.json: target_classes: .*outside' is not a name"):
        rewrite_model.main([word for key, value in arguments.items() for word in (f"--{key}", str(value))])
    assert not (tmp_path / "outside").exists()


def test_a_cache_of_others_writes_nothing_but_the_outputs_of_the_stage(tmp_path: Path) -> None:
    project = create(tmp_path / "project")
    project.run("python", "-m", "pipeline", "check_params")
    stage = [str(BIN / "python"), "-m", "pipeline.cached", "corpus_grammar@english"]
    project.run(*stage)
    (entry,) = (project.folder / ".dvc/cache/runs").glob("*/*/*")
    entry.write_text(entry.read_text().replace("artifacts/corpora/english/texts.parquet", "Snakefile"))
    before = (project.folder / "Snakefile").read_bytes()
    assert "restored" not in project.run(*stage)
    assert (project.folder / "Snakefile").read_bytes() == before


# Bounds.

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(9 * [f'*{before}'])}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: !!python/object/apply:os.mkdir ['EXECUTED']", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system ''", "could not determine a constructor for the tag"),
        ("a: !!python/object/new:os.mkdir {args: ['EXECUTED']}", "could not determine a constructor for the tag"),
        (LAUGHS, "with its aliases written out it has more than 16777216 characters"),
        (MERGES, "with its aliases written out it has more than 16777216 characters"),
        ("a: &a [*a]", "with its aliases written out it has more than 16777216 characters"),
        ("a: " + 1000 * "[", "it is nested too deeply"),
    ],
)
def test_yaml_is_data_of_a_bounded_size(tmp_path: Path, trap: Path, content: str, says: str) -> None:
    for name in ("params.yaml", "words.yaml", "grammar.yaml", "scenes.yaml"):
        (tmp_path / name).write_text(content.replace("EXECUTED", str(trap)))
    with pytest.raises(GradiendError, match=rf"params\.yaml: not valid YAML.*{says}"):
        read_params(tmp_path / "params.yaml")
    with pytest.raises(GradiendError, match=rf"words\.yaml: not valid YAML.*{says}"):
        read_grammar(tmp_path)
    assert not trap.exists()


def huge(path: Path, size: int) -> Path:
    """A file that says it has so many bytes and takes none."""
    with path.open("wb") as stream:
        stream.truncate(size)
    return path


def test_text_files_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(GradiendError, match=r"a\.json: damaged: \d+ bytes of JSON, at most 67108864 are read"):
        read_json(huge(tmp_path / "a.json", files.MAX_JSON_BYTES + 1))
    (tmp_path / "b.json").write_text(100_000 * "[")
    with pytest.raises(GradiendError, match=r"b\.json: damaged: not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(GradiendError, match=r"params\.yaml: not valid YAML: more than 16777216 bytes"):
        read_params(huge(tmp_path / "params.yaml", 2**24 + 1))
    for suffix in (".txt", ".csv", ".parquet"):
        with pytest.raises(GradiendError, match=rf"own\{suffix}: \d+ bytes; at most 8589934592 are read"):
            user_text.read_texts(huge(tmp_path / f"own{suffix}", user_text.MAX_FILE_BYTES + 1), TEXT)
    (tmp_path / "wide.csv").write_text(",".join(map(str, range(user_text.MAX_COLUMNS))) + ",text\n")
    with pytest.raises(GradiendError, match=r"wide\.csv: 10001 columns; at most 10000 are read"):
        user_text.read_texts(tmp_path / "wide.csv", TEXT)


def test_what_never_ends_is_not_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(GradiendError, match=rf"^{path}: a device, pipe or socket"):
            sha256_file(path)


def read_own(path: Path) -> pd.DataFrame:
    return user_text.read_texts(path, TEXT)


@pytest.mark.parametrize("read", [lambda path: read_table(path, TEXTS), read_own])
def test_tables_are_bounded_by_what_they_say_of_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "own.parquet"
    table = pa.table({"text": [f"text {i}" for i in range(30)]})
    pq.write_table(table.replace_schema_metadata({"note": 2**24 * "x"}), path)
    with pytest.raises(
        GradiendError, match=r"own\.parquet: it says that it has a footer of \d+ bytes; at most 16777216"
    ):
        read(path)
    pq.write_table(table, path)
    read(path)
    groups = pq.read_metadata(path).row_group(0).total_byte_size
    for limit, value, says in (("MAX_ROWS", 29, "30 rows"), ("MAX_TABLE_BYTES", groups - 1, f"{groups} bytes of data")):
        with monkeypatch.context() as patch:
            patch.setattr(tables, limit, value)
            with pytest.raises(GradiendError, match=rf"own\.parquet: it says that it has {says}; at most {value}"):
                read(path)


def test_many_rows_in_few_bytes_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    pq.write_table(pa.table({"text": pa.nulls(tables.MAX_ROWS + 1)}), path)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(GradiendError, match=r"it says that it has 100000001 rows"):
        read_own(path)


def tensor_file(header: dict[str, Any], length: int | None = None) -> bytes:
    content = json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        tensor_file({}, 100 * 10**9),
        tensor_file({}, 2**64 - 1),
        tensor_file({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
        tensor_file({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        tensor_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
        tensor_file({"__metadata__": {"gradiend": 100_000 * "["}}),
    ],
)
def test_tensor_files_that_claim_more_than_they_hold_are_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shard-0.safetensors"
    path.write_bytes(content)
    with pytest.raises(GradiendError, match=r"shard-0\.safetensors: damaged: "):
        read_metadata(path)
    with pytest.raises(GradiendError, match=r"shard-0\.safetensors: damaged: "):
        GradientStore.open(tmp_path)


def test_a_model_takes_no_more_memory_than_its_weights_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GradiendModel(Selection(("a",), ((2, 3),), (None,)), target_classes=("a", "b")).save_pretrained(tmp_path)
    GradiendModel.from_pretrained(tmp_path)
    monkeypatch.setattr(gradiend, "_zero_linear", lambda *_, **__: pytest.fail("memory was taken"))
    edit(tmp_path / "config.json", mapping={"names": ["a"], "shapes": [[10**5, 10**5]]})
    with pytest.raises(GradiendError, match=r"config\.json: damaged: it does not fit model\.safetensors"):
        GradiendModel.from_pretrained(tmp_path)


def test_a_mask_that_is_no_tensor_file_is_refused(tmp_path: Path, trap: Path) -> None:
    save_tensors(tmp_path / "mask", {"mask": torch.ones(1, dtype=torch.bool)}, {})
    load_tensors(tmp_path / "mask")
    for content in pickles(trap):
        (tmp_path / "mask").write_bytes(content)
        with pytest.raises(GradiendError, match="mask: damaged: not readable as safetensors"):
            load_tensors(tmp_path / "mask")
    assert not trap.exists()
