"""The whole params file, and the references between its sections."""

from collections.abc import Collection, Iterator
from typing import Annotated, Any

from pydantic import Field

from gradiend_core.config.arguments import explain
from gradiend_core.config.base_models import HubBaseModel, LocalBaseModel, TrainedBaseModel
from gradiend_core.config.cache_gradients import CacheGradients
from gradiend_core.config.corpora import GrammarCorpus, TextCorpus
from gradiend_core.config.datasets import Dataset
from gradiend_core.config.evaluate_decoder import EvaluateDecoder
from gradiend_core.config.evaluate_encoder import EvaluateEncoder
from gradiend_core.config.plot import Plot
from gradiend_core.config.post_prune import PostPrune
from gradiend_core.config.pre_prune import PrePrune
from gradiend_core.config.section import Name, Section, Seed, near_miss, validate
from gradiend_core.config.select_seed import SelectSeed
from gradiend_core.config.train import Train
from gradiend_core.errors import GradiendError


class Corpora(Section):
    """Where texts come from."""

    grammar: dict[Name, GrammarCorpus] = Field(description="corpora written from a grammar")
    text: dict[Name, TextCorpus] = Field(description="corpora read from your own files")


class BaseModels(Section):
    """Where language models come from."""

    trained: dict[Name, TrainedBaseModel] = Field(description="small models trained here")
    local: dict[Name, LocalBaseModel] = Field(description="model folders on this machine")
    hub: dict[Name, HubBaseModel] = Field(description="models of the Hugging Face hub")


class Run(Section):
    """One feature in one base model: a section per stage."""

    base_model: Name = Field(description="name of a base model")
    dataset: Name = Field(description="name of a dataset")
    target_classes: list[Name] = Field(
        min_length=2, max_length=2, description="two classes of the dataset; the first is encoded as +1"
    )
    pre_prune: PrePrune
    cache_gradients: CacheGradients
    train: Train
    select_seed: SelectSeed
    post_prune: PostPrune
    evaluate_encoder: EvaluateEncoder
    evaluate_decoder: EvaluateDecoder
    plot: Plot


class Params(Section):
    """The whole file."""

    seeds: list[Seed] = Field(min_length=1, description="training seeds of every run, in the order of selection")
    gradient_shards: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=1, description="0 .. n-1: the gradient store of a run is computed as n independent jobs"
    )
    corpora: Corpora = Field(description="texts")
    base_models: BaseModels = Field(description="language models")
    datasets: dict[Name, Dataset] = Field(min_length=1, description="features to look for")
    runs: dict[Name, Run] = Field(min_length=1, description="what to train")


def validate_params(data: dict[str, Any], where: str) -> Params:
    """Check a whole params file, references included; raises one `GradiendError` that lists every problem.

    References are looked at once every section is valid by itself.
    """
    params = validate(Params, data, where, explain)
    problems = [f"{where}: {problem}" for problem in _broken_references(params)]
    if problems:
        raise GradiendError("\n".join(problems))
    return params


def _broken_references(params: Params) -> Iterator[str]:
    corpora = [*params.corpora.grammar, *params.corpora.text]
    models = [*params.base_models.trained, *params.base_models.local, *params.base_models.hub]
    if params.gradient_shards != list(range(len(params.gradient_shards))):
        yield f"gradient_shards: must be [0, 1, …, n-1], not {params.gradient_shards}"
    for key, names in (("seeds", params.seeds), ("corpora", corpora), ("base_models", models)):
        yield from (f"{key}: {name!r} appears twice" for name in sorted(_repeated(names)))
    for name, model in params.base_models.trained.items():
        yield from _unknown(f"base_models.trained.{name}.corpus", model.corpus, corpora)
        if model.model.hidden_size % model.model.num_attention_heads:
            yield f"base_models.trained.{name}.model: num_attention_heads must divide hidden_size"
    for name, dataset in params.datasets.items():
        yield from _unknown(f"datasets.{name}.corpus", dataset.corpus, corpora)
    for name, run in params.runs.items():
        yield from _unknown(f"runs.{name}.base_model", run.base_model, models)
        yield from _unknown(f"runs.{name}.dataset", run.dataset, params.datasets)
        if run.dataset in params.datasets:
            for target in run.target_classes:
                yield from _unknown(f"runs.{name}.target_classes", target, params.datasets[run.dataset].classes)
        yield from (f"runs.{name}.target_classes: {target!r} twice" for target in _repeated(run.target_classes))


def _unknown(key: str, name: str, known: Collection[str]) -> Iterator[str]:
    if name not in known:
        yield f"{key}: no such name {name!r}{near_miss(name, list(known)) or '; none is defined'}"


def _repeated(names: Collection[Any]) -> set[Any]:
    return {name for name in names if list(names).count(name) > 1}
