"""What makes each stage due in the trials of kills, and whom they kill."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from project import Project

VICTIMS: Final[Mapping[str, tuple[str, ...]]] = {
    "cached": ("stage", "engine", "all"),
    "snakemake": ("stage", "cached", "engine", "all"),
    "dvc": ("stage", "engine", "all"),
}
_SAVES = ".partial-resume-checkpoints"


@dataclass(frozen=True)
class Case:
    """What makes a stage due: values of params.yaml by their dotted keys, and texts replaced in files.

    A stage that can be continued finds what is saved in files like `saved` of artifacts/, and `says` so.
    """

    stage: str
    values: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[tuple[str, str, str], ...] = ()
    saved: str = ""
    says: str = "continued after step"
    followers: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage}+" if self.followers else self.stage

    def apply(self, project: Project) -> None:
        """Make the change in a project."""
        path = project.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for key, value in self.values.items():
            *sections, last = key.split(".")
            section = params
            for name in sections:
                section = section[name]
            section[last] = value
        path.write_text(yaml.safe_dump(params))
        for text in self.texts:
            project.replace(*text)


_PRE_PRUNE = {"runs.gender.pre_prune.topk": 0.12}
_POST_PRUNE = {"runs.gender.post_prune.topk": 0.4}
_TRAINED = "base_models.trained"
_EVERY_BLOCK = ("_SECONDS_BETWEEN_CHECKPOINTS = 5.0", "_SECONDS_BETWEEN_CHECKPOINTS = 0.0")
_DROPOUT = ('"hidden_dropout_prob": 0.0', '"hidden_dropout_prob": 0.1')
_LIST = [
    Case("corpus_grammar@english", {"corpora.grammar.english.max_size": 1900}),
    Case("corpus_text@notes", {"corpora.text.notes.max_size": 400}),
    Case(
        "base_model_trained@tiny",
        {f"{_TRAINED}.tiny.training.max_steps": 200, f"{_TRAINED}.tiny.training.save_steps": 20},
        saved=f"base_models/tiny/{_SAVES}/checkpoint-*/complete.json",
    ),
    Case(
        "base_model_trained@pair",
        {f"{_TRAINED}.pair.training.max_steps": 16},
        saved=f"base_models/pair/{_SAVES}/checkpoint-*/complete.json",
    ),
    Case("base_model_local@copied", texts=(("my_model/config.json", *_DROPOUT),)),
    Case("generate_data@gender", {"datasets.gender.max_size_per_class": 50}),
    Case("pre_prune@gender", _PRE_PRUNE),
    Case(
        "cache_gradients@gender-0",
        {"runs.gender.cache_gradients.dtype": "bfloat16", "runs.gender.cache_gradients.batch_size": 1},
        (("pipeline/cache_gradients.py", *_EVERY_BLOCK),),
        saved="runs/gender/gradients/.partial-resume-shard-0.safetensors.progress.json",
        says="rows are there already",
    ),
    Case(
        "train@gender-0",
        {"runs.gender.train.max_steps": 300, "runs.gender.train.save_steps": 10},
        saved=f"runs/gender/seeds/0/{_SAVES}/step-*.safetensors",
    ),
    Case("select_seed@gender", {"runs.gender.select_seed.convergent_score_threshold": 0.4}),
    Case("post_prune@gender", _POST_PRUNE),
    Case("evaluate_encoder@gender", {"runs.gender.evaluate_encoder.bootstrap_samples": 60}),
    Case("evaluate_decoder@gender", {"runs.gender.evaluate_decoder.lrs": [1.0, 0.5, 0.1]}),
    Case("rewrite_model@gender", texts=(("gradiend_core/model/card.py", "How it was made", "How this was made"),)),
    Case("plot@gender", {"runs.gender.plot.dpi": 80}),
    Case("pre_prune@gender", _PRE_PRUNE, followers=True),
    Case("post_prune@gender", _POST_PRUNE, followers=True),
]
CASES: Final = {case.name: case for case in _LIST}


def victims(case: Case, engine: str) -> tuple[str, ...]:
    """Whom to kill: the engine, all that it has started, or one of these."""
    if case.followers:
        return ("engine", "all")
    return VICTIMS[engine] + (("child",) if case.stage == "base_model_trained@pair" else ())
