"""What a user is told about a broken params.yaml, and that the page about it is current."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gradiend_core.config.corpora import TextCorpus
from gradiend_core.config.params import Params, validate_params
from gradiend_core.config.pre_prune import PrePrune
from gradiend_core.config.reference import parameter_reference
from gradiend_core.config.section import read_params, read_section, read_value
from gradiend_core.config.train import Train
from gradiend_core.errors import GradiendError
from pipeline.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def params() -> dict[str, Any]:
    """The project's own params.yaml, free to be broken."""
    data: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    data["runs"] = {name: dict(run) for name, run in data["runs"].items()}
    return data


def problems(params: dict[str, Any]) -> list[str]:
    """The lines of the error about these parameters."""
    with pytest.raises(GradiendError) as caught:
        validate_params(params, "params.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("file", ["params.yaml", "configs/bring_your_own.yaml"])
def test_files_of_the_project_are_valid(file: str) -> None:
    assert isinstance(validate_params(read_params(ROOT / file), file), Params)


def test_parameter_page_is_current() -> None:
    current = (ROOT / "docs/params.md").read_text("utf-8")
    assert current == parameter_reference(), "run: python -m gradiend_core.config.reference > docs/params.md"


def test_parameter_page_names_every_key_with_type_default_and_meaning() -> None:
    page = parameter_reference()
    assert "| `eval_steps` | integer >= 1 | `50` |" in page
    assert "| `optim` | one of `adamw`, `adam` | `adamw` |" in page
    assert "| `max_size` | integer >= 1 or null | `null` |" in page
    assert "| `adam_epsilon` | number > 0 | `1.0e-8` |" in page
    assert "| `corpus` | name | required |" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.count("|") != 5] == []
    assert [row for row in rows if row.rstrip("| ").endswith("required")] == [], "a key without a meaning"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("", "params.yaml: run: unknown key; did you mean 'runs'?"),
        ("runs.pronoun_number", "params.yaml: runs.pronoun_number.run: unknown key; allowed: base_model, dataset"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_or_all_allowed(
    params: dict[str, Any], place: str, expected: str
) -> None:
    section = params["runs"]["pronoun_number"] if place else params
    section["run"] = {}
    [line] = problems(params)
    assert line.startswith(expected)


def test_misspelt_keys_of_nested_sections(params: dict[str, Any]) -> None:
    params["runs"]["pronoun_number"]["train"] = {"learnin_rate": 0.1}
    params["base_models"]["trained"]["demo-bert"]["model"]["hiden_size"] = 64
    assert set(problems(params)) == {
        "params.yaml: runs.pronoun_number.train.learnin_rate: unknown key; did you mean 'learning_rate'?",
        "params.yaml: base_models.trained.demo-bert.model.hiden_size: unknown key; did you mean 'hidden_size'?",
    }


def test_run_named_like_a_section_does_not_confuse_the_hint(params: dict[str, Any]) -> None:
    params["runs"]["train"] = params["runs"].pop("pronoun_gender") | {"datset": "x"}
    assert problems(params) == ["params.yaml: runs.train.datset: unknown key; did you mean 'dataset'?"]


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("train", "max_steps", "many", "valid integer, not 'many'"),
        ("train", "max_steps", 0, "greater than or equal to 1, not 0"),
        ("train", "max_steps", True, "valid integer, not True"),
        ("train", "max_steps", 2.0, "valid integer, not 2.0"),
        ("train", "learning_rate", "1e-5", "'1e-5' was read as text: write it as a number with a dot, e.g. 1.0e-5"),
        ("train", "learning_rate", float("nan"), "finite number, not nan"),
        ("evaluate_encoder", "confidence", 1.0, "less than 1, not 1.0"),
        ("evaluate_decoder", "feature_factors", [float("inf")], "finite number, not inf"),
        ("evaluate_decoder", "lrs", [], "at least 1 item"),
        ("cache_gradients", "dtype", "float16", "'float32' or 'bfloat16', not 'float16'"),
        ("pre_prune", "params", [], "at least 1 item"),
        ("pre_prune", "threshold", -0.1, "greater than or equal to 0, not -0.1"),
        ("pre_prune", "threshold", float("inf"), "finite number, not inf"),
        ("pre_prune", "statistic", "aligned", "'aligned_mean', 'rms' or 'mean', not 'aligned'"),
        ("post_prune", "topk", 1.5, "integer >= 1 (a count) or number > 0 and <= 1 (a fraction), not 1.5"),
        ("post_prune", "topk", 0, "(a fraction), not 0"),
        ("post_prune", "topk", "1e-2", "'1e-2' was read as text"),
    ],
)
def test_bad_value_is_named_with_what_is_allowed(
    params: dict[str, Any], section: str, key: str, value: Any, says: str
) -> None:
    params["runs"]["pronoun_number"][section] = {key: value}
    [line] = problems(params)
    assert line.startswith(f"params.yaml: runs.pronoun_number.{section}.{key}")
    assert says in line


@pytest.mark.parametrize("topk", [1, 10_000, 0.01, 1.0, None])
def test_count_fraction_and_null_are_kept_apart(params: dict[str, Any], topk: float | None) -> None:
    params["runs"]["pronoun_number"]["post_prune"] = {"topk": topk}
    kept = validate_params(params, "params.yaml").runs["pronoun_number"].post_prune.topk
    assert (kept, type(kept)) == (topk, type(topk))


def test_aligned_mean_needs_two_rows(params: dict[str, Any]) -> None:
    params["runs"]["pronoun_number"]["pre_prune"] = {"n_samples": 1}
    place = "params.yaml: runs.pronoun_number.pre_prune"
    says = "statistic aligned_mean compares two classes: n_samples must be at least 2, or use rms"
    assert problems(params) == [f"{place}: {says}"]
    for statistic in ("rms", "mean"):
        params["runs"]["pronoun_number"]["pre_prune"]["statistic"] = statistic
        validate_params(params, "params.yaml")


@pytest.mark.parametrize(
    ("section", "everything"),
    [
        ({"topk": None}, True),
        ({"topk": 1.0}, True),
        ({"topk": 1}, False),  # one entry
        ({"topk": None, "threshold": 0.1}, False),
        ({"topk": 1.0, "threshold": 0.1}, False),
        ({}, False),
    ],
)
def test_whether_pre_pruning_can_leave_anything_out(section: dict[str, Any], everything: bool) -> None:
    assert PrePrune.model_validate(section).keeps_everything is everything


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"base_model": "demo-brt"},
            "runs.pronoun_number.base_model: no such name 'demo-brt'; did you mean 'demo-bert'?",
        ),
        (
            {"dataset": "zzz"},
            "runs.pronoun_number.dataset: no such name 'zzz'; allowed: pronoun_number, pronoun_gender",
        ),
        (
            {"target_classes": ["3SG", "3PLU"]},
            "runs.pronoun_number.target_classes: no such name '3PLU'; did you mean '3PL'?",
        ),
        ({"target_classes": ["3SG", "3SG"]}, "runs.pronoun_number.target_classes: '3SG' twice"),
    ],
)
def test_broken_reference_of_a_run(params: dict[str, Any], change: dict[str, Any], expected: str) -> None:
    params["runs"]["pronoun_number"] |= change
    assert problems(params) == [f"params.yaml: {expected}"]


def test_unknown_corpus(params: dict[str, Any]) -> None:
    params["datasets"]["pronoun_gender"]["corpus"] = "englsh"
    params["base_models"]["trained"]["demo-bert"]["corpus"] = "zzz"
    assert problems(params) == [
        "params.yaml: base_models.trained.demo-bert.corpus: no such name 'zzz'; allowed: english",
        "params.yaml: datasets.pronoun_gender.corpus: no such name 'englsh'; did you mean 'english'?",
    ]


def test_all_problems_of_the_classes_of_a_dataset(params: dict[str, Any]) -> None:
    params["datasets"]["pronoun_gender"]["classes"] = {"a": ["he", "him"], "b": ["she", "He"], "c": [], "d": [" x"]}
    [line] = problems(params)
    assert line.startswith("params.yaml: datasets.pronoun_gender: the word 'He' is in two classes, 'a' and 'b'; ")
    assert "class 'c' has no words" in line
    assert "class 'd': ' x' is not a word" in line


def test_word_that_yaml_reads_as_a_truth_value_must_be_quoted(params: dict[str, Any]) -> None:
    params["datasets"]["pronoun_gender"]["classes"] = yaml.safe_load("{a: [no], b: [perhaps]}")
    [line] = problems(params)
    assert line.startswith("params.yaml: datasets.pronoun_gender.classes.a[0]: ")
    assert line.endswith("not False; put quotes around it")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".a", "-a", "a.b", "a b", "a\n", "x" * 65, 1, None])
@pytest.mark.parametrize("group", ["runs", "datasets", "trained", "grammar", "classes"])
def test_names_cannot_leave_the_artifacts_folder(params: dict[str, Any], group: str, name: Any) -> None:
    groups = {
        "runs": params["runs"],
        "datasets": params["datasets"],
        "trained": params["base_models"]["trained"],
        "grammar": params["corpora"]["grammar"],
        "classes": params["datasets"]["pronoun_number"]["classes"],
    }
    groups[group][name] = next(iter(groups[group].values()))
    lines = [line for line in problems(params) if "is not a name" in line]
    assert len(lines) == 1
    assert f"{group}" in lines[0]
    assert f"{name!r} is not a name (letters, digits, _ and -" in lines[0]


def test_names_are_unique_over_groups_that_share_a_folder(params: dict[str, Any]) -> None:
    params["corpora"]["text"]["english"] = {"path": "own.txt"}
    params["base_models"]["local"]["demo-bert"] = {"path": "folder"}
    assert problems(params) == [
        "params.yaml: corpora: 'english' appears twice",
        "params.yaml: base_models: 'demo-bert' appears twice",
    ]


@pytest.mark.parametrize("shards", [[1], [0, 2], [1, 0], [0, 0]])
def test_shards_are_counted_from_zero(params: dict[str, Any], shards: list[int]) -> None:
    params["gradient_shards"] = shards
    assert problems(params) == [f"params.yaml: gradient_shards: must be [0, 1, …, n-1], not {shards}"]


def test_seeds_are_distinct_and_not_negative(params: dict[str, Any]) -> None:
    params["seeds"] = [3, 0, 3]
    assert problems(params) == ["params.yaml: seeds: 3 appears twice"]
    params["seeds"] = [-1]
    assert problems(params)[0].startswith("params.yaml: seeds[0]: ")


def test_split_ratios_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match=r"they sum to 0\.9"):
        TextCorpus.model_validate({"path": "own.txt", "split_ratios": [0.8, 0.1, 0.0]})


def test_attention_heads_must_divide_the_width(params: dict[str, Any]) -> None:
    params["base_models"]["trained"]["demo-bert"]["model"]["num_attention_heads"] = 3
    assert problems(params) == [
        "params.yaml: base_models.trained.demo-bert.model: num_attention_heads must divide hidden_size"
    ]


def test_all_problems_are_listed_at_once(params: dict[str, Any]) -> None:
    del params["seeds"]
    params["runs"]["pronoun_number"] |= {"train": {"max_steps": 0, "x": 1}, "plot": None}
    params["runs"]["pronoun_gender"]["train"] = {"learning_rate": 0}
    assert {line.split(": ")[1] for line in problems(params)} == {
        "seeds",
        "runs.pronoun_number.train.max_steps",
        "runs.pronoun_number.train.x",
        "runs.pronoun_number.plot",
        "runs.pronoun_gender.train.learning_rate",
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "params.yaml: cannot be read (No such file or directory). Run from the folder that holds it."),
        (b"runs: [", "params.yaml: not valid YAML: "),
        (b"\xff\xfe\xfa", "params.yaml: not valid YAML: "),
        (b"- a\n- b\n", "params.yaml: must be a mapping with the keys of docs/params.md, not list"),
        (b"", "params.yaml: must be a mapping with the keys of docs/params.md, not NoneType"),
        (b"runs: {a: {plot: {}}, b: {}, a: {}}", "key 'a' appears twice"),
        (b"run: {}", "params.yaml: run: unknown key; did you mean 'runs'?"),
    ],
)
def test_unreadable_file_ends_with_one_message_and_status_1(
    content: bytes | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("params.yaml").write_bytes(content)
    assert main(["check_params"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: params.yaml: ")
    assert says in error
    assert "Traceback" not in error


def test_other_stages_check_the_whole_file_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("runs: {}\n")
    assert main(["generate_data"]) == 1
    assert "params.yaml: seeds: Field required" in capsys.readouterr().err


def test_valid_file_is_confirmed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check_params", str(ROOT / "params.yaml")]) == 0
    assert "2 runs x 3 seeds, all parameters are valid" in capsys.readouterr().out


def test_anchors_and_merge_keys_may_override(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert read_params(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


def test_section_by_key(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("runs: {one: {train: {max_steps: 7}, plot: 3}}\n")
    assert read_section(Train, "runs.one.train", path) == Train.model_validate({"max_steps": 7})
    with pytest.raises(GradiendError, match=r"runs\.ome\.train: no key 'ome'; did you mean 'one'\?"):
        read_value("runs.ome.train", path)
    with pytest.raises(GradiendError, match=r"runs\.one\.plot\.dpi: no key 'dpi'"):
        read_value("runs.one.plot.dpi", path)
    path.write_text("runs: {one: {train: {max_step: 7}}}\n")
    with pytest.raises(GradiendError, match=r"params.yaml: runs\.one\.train\.max_step: unknown key; did you mean"):
        read_section(Train, "runs.one.train", path)


def test_sections_are_frozen() -> None:
    train = Train.model_validate({})
    with pytest.raises(ValueError, match="frozen"):
        train.__setattr__("max_steps", 3)
