"""What a user is told about a broken params.yaml, and that the page about it is current."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradiend_core.config.arguments import ARGUMENTS
from gradiend_core.config.corpora import TextCorpus
from gradiend_core.config.params import Params, Run, validate_params
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
    keys = page[: page.index("## Arguments of the reference package")]
    rows = [line for line in keys.splitlines() if line.startswith("| `")]
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


def keys() -> set[str]:
    """Every key of a run below `runs.<name>`, and of the file."""
    inside = {
        f"{name}.{key}"
        for name, field in Run.model_fields.items()
        for key in getattr(field.annotation, "model_fields", ())
    }
    return inside | set(Run.model_fields) | set(Params.model_fields)


def test_every_argument_of_the_reference_is_accounted_for() -> None:
    names = json.loads((ROOT / "tests/reference/arguments.json").read_text())
    assert [(group, name) for group, found in names.items() for name in found if name not in ARGUMENTS[group]] == []
    assert set(ARGUMENTS) == {*names, "Other training loops"}


def test_arguments_are_keys_that_exist_or_say_what_replaces_them() -> None:
    stages = {"PrePruneConfig": "pre_prune", "PostPruneConfig": "post_prune"}
    for group, arguments in ARGUMENTS.items():
        for name, (honouring, words) in arguments.items():
            assert set(honouring) <= keys(), name
            assert honouring or words, name
            here = f"{stages.get(group, 'train')}.{name}"
            assert here not in keys() or here in honouring, f"{name} is a key, but said to be none"


def test_honoured_arguments_are_tested_somewhere() -> None:
    others = (file for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__))
    tests = "".join(file.read_text("utf-8") for file in others)
    honouring = {key for arguments in ARGUMENTS.values() for argument in arguments.values() for key in argument.keys}
    assert {key for key in honouring if not re.search(rf"\b{key.split('.')[-1]}\b", tests)} == set()


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ("train", "use_cache", "results are keyed by the content of all they depend on, and restored when they exist"),
        ("train", "decoder_eval_lrs", "here it is evaluate_decoder.lrs"),
        ("train", "do_eval", "here it is train.eval_strategy; `no`: the last step alone is evaluated"),
        ("train", "fp16", "stored gradients are float32 or bfloat16, sums and weights float32"),
        ("train", "min_ratio", "the search has two settings, `train.learning_rate_probe_steps` and "),
        ("pre_prune", "dataset", "here it is dataset; its training rows"),
        ("pre_prune", "use_cached_gradients", "the sample comes before the store, which holds the kept entries only"),
        ("post_prune", "inplace", "pruning gives a new model; that of the seed stays"),
        ("post_prune", "params", "here it is pre_prune.params"),
    ],
)
def test_argument_of_the_reference_is_answered_with_what_replaces_it(
    params: dict[str, Any], section: str, key: str, says: str
) -> None:
    params["runs"]["pronoun_number"][section] = {key: 1}
    [line] = problems(params)
    assert line.startswith(f"params.yaml: runs.pronoun_number.{section}.{key}: unknown key; {says}")
    assert line.endswith("(docs/params.md)")


def test_arguments_are_answered_in_runs_only(params: dict[str, Any]) -> None:
    params["base_models"]["trained"]["demo-bert"]["training"]["use_cache"] = True
    params["seed"] = 3
    found = problems(params)
    assert len(found) == 2
    assert not any("docs/params.md" in line for line in found)


def test_parameter_page_has_a_row_for_every_argument() -> None:
    page = parameter_reference()
    assert "| `train_batch_size` | `train.train_batch_size` |  |" in page
    assert "| `seed_runs_dir` | none | `artifacts/runs/<name>/seeds/` |" in page
    assert page.count(" | none | ") == sum(not one.keys for group in ARGUMENTS.values() for one in group.values())


def test_unknown_key_of_an_optional_section(params: dict[str, Any]) -> None:
    params["runs"]["pronoun_number"]["post_prune"] = {"mask": {"path": "a", "sha256": "0" * 64, "pth": 1}}
    place = "params.yaml: runs.pronoun_number.post_prune.mask.pth"
    assert problems(params) == [f"{place}: unknown key; did you mean 'path'?"]


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("train", "max_steps", "many", "valid integer, not 'many'"),
        ("train", "max_steps", 0, "greater than or equal to 1, not 0"),
        ("train", "max_steps", True, "valid integer, not True"),
        ("train", "max_steps", 2.0, "valid integer, not 2.0"),
        ("train", "learning_rate", "1e-5", "'1e-5' was read as text: write it as a number with a dot, e.g. 1.0e-5"),
        ("train", "learning_rate", float("nan"), "number > 0 or `tune`, not nan"),
        ("train", "learning_rate", float("inf"), "number > 0 or `tune`, not inf"),
        ("train", "learning_rate", -1, "number > 0 or `tune`, not -1"),
        ("train", "learning_rate", True, "number > 0 or `tune`, not True"),
        ("train", "learning_rate", "tuned", "number > 0 or `tune`, not 'tuned'"),
        ("train", "learning_rate_max_probes", 0, "greater than or equal to 1, not 0"),
        ("train", "weight_decay", float("nan"), "finite number, not nan"),
        ("train", "report_to", ["wandb"], "'tensorboard', not 'wandb'"),
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


@pytest.mark.parametrize(("given", "kept"), [(1, 1.0), (1.0e-12, 1.0e-12), ("tune", "tune")])
def test_learning_rate_is_a_number_or_tune(given: Any, kept: Any) -> None:
    rate = Train.model_validate({"learning_rate": given}).learning_rate
    assert (rate, type(rate)) == (kept, type(kept))
    assert (
        Train.model_validate({"learning_rate": "tune", "lr_scheduler_type": "polynomial"}).lowest_learning_rate == 1e-7
    )


def test_runners_up_need_a_ranking(params: dict[str, Any]) -> None:
    params["runs"]["pronoun_number"]["train"] = {"preserve_n_best": 2, "load_best_model_at_end": False}
    says = "preserve_n_best 2 ranks evaluations: set load_best_model_at_end"
    assert problems(params) == [f"params.yaml: runs.pronoun_number.train: {says}"]
    params["runs"]["pronoun_number"]["train"] = {"preserve_n_best": 1, "load_best_model_at_end": False}
    validate_params(params, "params.yaml")


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


def test_the_file_that_says_so_is_always_the_same_and_written_only_when_all_is_valid(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("runs: {}\n")
    arguments = ["check_params", "--output", str(tmp_path / "new/checked.txt")]
    assert main([*arguments, str(tmp_path / "bad.yaml")]) == 1
    assert not (tmp_path / "new").exists()
    contents = set()
    for params in ("params.yaml", "configs/bring_your_own.yaml"):
        assert main([*arguments, str(ROOT / params)]) == 0
        contents.add((tmp_path / "new/checked.txt").read_bytes())
    assert len(contents) == 1
    assert list(tmp_path.glob("new/*")) == [tmp_path / "new/checked.txt"]


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ("seeds: [0, 1, 2]", "seeds: [0, 1, 010]", "seeds[2]: 8 for the stages, but 10 for DVC"),
        (
            "{max_steps: 300,",
            "{bias_decoder: no,",
            "runs.pronoun_number.train.bias_decoder: False for the stages, but 'no'",
        ),
        ("seeds: [0, 1, 2] ", "seeds: # zero\n  - 0", None),
    ],
)
def test_what_dvc_reads_otherwise_is_refused(
    written: str, instead: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(written, instead))
    validate_params(read_params(path), "params.yaml")  # the stages have nothing against it
    assert main(["check_params", str(path)]) == (said is not None)
    if said:
        assert f"params.yaml: {said}" in capsys.readouterr().err


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
