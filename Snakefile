# The pipeline for Snakemake: `snakemake --cores all`. Parameters, code and commands of a stage are those of dvc.yaml;
# `python -m pipeline.cached STAGE` restores the stage from DVC's cache or runs it (docs/engines.md).
#   - spec and version : the stage's parameters and code; they change when the earlier result is not up to date
#   - update(...)      : the earlier file stays until the stage has succeeded
import re
import shlex
import sys
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from gradiend_core.errors import GradiendError
from pipeline import dag, engine
from pipeline.check_params import check_for_engines, write_checked

# Jobs on a cluster read this file too; they use what the main process has found.
if workflow.is_main_process:
    try:
        check_for_engines()
        for reason in dag.prepare():
            logger.info(reason)
    except GradiendError as error:
        raise WorkflowError(str(error)) from None


# Not for a dry run, which may look on while others work.
onstart:
    engine.take_turn(logger.info)
    try:
        write_checked()  # what every stage of dvc.yaml depends on
    except GradiendError as error:
        raise WorkflowError(str(error)) from None


# Only for `--software-deployment-method apptainer`; container.def says how to build it.
container: "pipeline.sif"


PARAMS = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
SEEDS = PARAMS["seeds"]
SHARDS = PARAMS["gradient_shards"]
TRAINED, LOCAL, HUB = (PARAMS["base_models"][source] for source in ("trained", "local", "hub"))
GRAMMAR, TEXT = (PARAMS["corpora"][source] for source in ("grammar", "text"))
DATASETS, RUNS = PARAMS["datasets"], PARAMS["runs"]
MODEL_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

# `python` in a rule is the one that runs Snakemake, also when its environment was not activated. The GPUs of a job on a
# cluster are those that its scheduler has given it (pipeline/gpus.py).
GPUS_GIVEN = " GRADIEND_GPUS_GIVEN=1" if workflow.remote_exec else ""
shell.prefix(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH{GPUS_GIVEN}; ")


def one_of(names):
    """The wildcard constraint for exactly these names; for none of them, one that nothing matches."""
    return "|".join(map(re.escape, names)) or r"(?!)"


def version(address):
    """The version of a stage's spec, so that Snakemake notices a change whatever the modification times are."""
    return lambda wildcards: dag.version(address.format(**wildcards))


def language_model_threads():
    """Half of this machine's cores, so that two such stages run side by side; 4 on a cluster."""
    if workflow.remote_exec:  # a node's cores are not the job's
        return 4
    try:
        return max(1, workflow.cores // 2)
    except WorkflowError:
        return 4


def growing(mem_mb):
    """So much memory at first, twice as much when the job is tried again, and so on."""
    return lambda wildcards, attempt: mem_mb * attempt


def all_rows(wildcards, input, attempt):
    """Memory for all gradients at once, in float32: twice the files if these are in bfloat16."""
    return attempt * max(8000, 4000 + int(2 * input.size_mb))


def processes(wildcards):
    """Those that train a base model together, each with a core and, where there are any, a GPU of its own."""
    return TRAINED[wildcards.model].get("training", {}).get("processes", 1)


def base_model(wildcards):
    return [f"artifacts/base_models/{RUNS[wildcards.run]['base_model']}/{name}" for name in MODEL_FILES]


def dataset(wildcards):
    return [f"artifacts/datasets/{RUNS[wildcards.run]['dataset']}/{name}.parquet" for name in ("training", "neutral")]


wildcard_constraints:
    run=one_of(RUNS),
    seed=one_of(map(str, SEEDS)),
    shard=one_of(map(str, SHARDS)),
    dataset=one_of(DATASETS),


localrules:
    all,


rule all:
    input:
        rewritten=[
            f"artifacts/runs/{run}/rewritten/{target}/model.safetensors"
            for run, section in RUNS.items()
            for target in section["target_classes"]
        ],
        encoder=expand("artifacts/runs/{run}/encoder/metrics.json", run=RUNS),
        decoder=expand("artifacts/runs/{run}/decoder/metrics.json", run=RUNS),
        plots=expand(
            "artifacts/runs/{run}/plots/{figure}.png",
            run=RUNS,
            figure=["training", "encoder", "decoder"],
        ),


rule corpus_grammar:
    input:
        spec=".stages/corpus_grammar@{corpus}.spec.json",
    output:
        texts=update("artifacts/corpora/{corpus}/texts.parquet"),
        manifest=update("artifacts/manifests/corpora/{corpus}.json"),
    log:
        "logs/corpus_grammar/{corpus}.log",
    benchmark:
        "benchmarks/corpus_grammar/{corpus}.tsv"
    wildcard_constraints:
        corpus=one_of(GRAMMAR),
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=30,
    params:
        version=version("corpus_grammar@{corpus}"),
    message:
        "Write the texts of corpus {wildcards.corpus} from its grammar"
    shell:
        "python -m pipeline.cached --threads {threads} corpus_grammar@{wildcards.corpus} > {log} 2>&1"


rule corpus_text:
    input:
        text=lambda wildcards: TEXT[wildcards.corpus]["path"],
        spec=".stages/corpus_text@{corpus}.spec.json",
    output:
        texts=update("artifacts/corpora/{corpus}/texts.parquet"),
        manifest=update("artifacts/manifests/corpora/{corpus}.json"),
    log:
        "logs/corpus_text/{corpus}.log",
    benchmark:
        "benchmarks/corpus_text/{corpus}.tsv"
    wildcard_constraints:
        corpus=one_of(TEXT),
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=30,
    params:
        version=version("corpus_text@{corpus}"),
    message:
        "Read the texts of corpus {wildcards.corpus}"
    shell:
        "python -m pipeline.cached --threads {threads} corpus_text@{wildcards.corpus} > {log} 2>&1"


rule base_model_trained:
    input:
        texts=lambda wildcards: f"artifacts/corpora/{TRAINED[wildcards.model]['corpus']}/texts.parquet",
        spec=".stages/base_model_trained@{model}.spec.json",
    output:
        config=update("artifacts/base_models/{model}/config.json"),
        weights=update("artifacts/base_models/{model}/model.safetensors"),
        tokenizer=update("artifacts/base_models/{model}/tokenizer.json"),
        tokenizer_config=update("artifacts/base_models/{model}/tokenizer_config.json"),
        metrics=update("artifacts/base_models/{model}/metrics.json"),
        manifest=update("artifacts/manifests/base_models/{model}.json"),
    log:
        "logs/base_model_trained/{model}.log",
    benchmark:
        "benchmarks/base_model_trained/{model}.tsv"
    wildcard_constraints:
        model=one_of(TRAINED),
    threads: processes
    resources:
        mem_mb=growing(8000),
        runtime=240,
        gpu=processes,
    params:
        version=version("base_model_trained@{model}"),
    message:
        "Train the small base model {wildcards.model} on its corpus"
    shell:
        "python -m pipeline.cached --threads 1 --gpus {resources.gpu} "
        "base_model_trained@{wildcards.model} > {log} 2>&1"


rule base_model_local:
    input:
        folder=lambda wildcards: LOCAL[wildcards.model]["path"],
        spec=".stages/base_model_local@{model}.spec.json",
    output:
        config=update("artifacts/base_models/{model}/config.json"),
        weights=update("artifacts/base_models/{model}/model.safetensors"),
        tokenizer=update("artifacts/base_models/{model}/tokenizer.json"),
        tokenizer_config=update("artifacts/base_models/{model}/tokenizer_config.json"),
        manifest=update("artifacts/manifests/base_models/{model}.json"),
    log:
        "logs/base_model_local/{model}.log",
    benchmark:
        "benchmarks/base_model_local/{model}.tsv"
    wildcard_constraints:
        model=one_of(LOCAL),
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=60,
    params:
        version=version("base_model_local@{model}"),
    message:
        "Copy the base model {wildcards.model} from its folder"
    shell:
        "python -m pipeline.cached --threads {threads} base_model_local@{wildcards.model} > {log} 2>&1"


rule base_model_hub:
    input:
        spec=".stages/base_model_hub@{model}.spec.json",
    output:
        config=update("artifacts/base_models/{model}/config.json"),
        weights=update("artifacts/base_models/{model}/model.safetensors"),
        tokenizer=update("artifacts/base_models/{model}/tokenizer.json"),
        tokenizer_config=update("artifacts/base_models/{model}/tokenizer_config.json"),
        manifest=update("artifacts/manifests/base_models/{model}.json"),
    log:
        "logs/base_model_hub/{model}.log",
    benchmark:
        "benchmarks/base_model_hub/{model}.tsv"
    wildcard_constraints:
        model=one_of(HUB),
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=240,
    params:
        version=version("base_model_hub@{model}"),
    message:
        "Download the base model {wildcards.model} at its pinned revision"
    shell:
        "python -m pipeline.cached --threads {threads} base_model_hub@{wildcards.model} > {log} 2>&1"


rule generate_data:
    input:
        texts=lambda wildcards: f"artifacts/corpora/{DATASETS[wildcards.dataset]['corpus']}/texts.parquet",
        spec=".stages/generate_data@{dataset}.spec.json",
    output:
        training=update("artifacts/datasets/{dataset}/training.parquet"),
        neutral=update("artifacts/datasets/{dataset}/neutral.parquet"),
        manifest=update("artifacts/manifests/datasets/{dataset}.json"),
    log:
        "logs/generate_data/{dataset}.log",
    benchmark:
        "benchmarks/generate_data/{dataset}.tsv"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=60,
    params:
        version=version("generate_data@{dataset}"),
    message:
        "Select and mask the sentences of dataset {wildcards.dataset}"
    shell:
        "python -m pipeline.cached --threads {threads} generate_data@{wildcards.dataset} > {log} 2>&1"


rule pre_prune:
    input:
        base_model=base_model,
        dataset=dataset,
        spec=".stages/pre_prune@{run}.spec.json",
    output:
        selection=update("artifacts/runs/{run}/selection.safetensors"),
        manifest=update("artifacts/manifests/pre_prune/{run}.json"),
    log:
        "logs/pre_prune/{run}.log",
    benchmark:
        "benchmarks/pre_prune/{run}.tsv"
    threads: language_model_threads()
    resources:
        mem_mb=growing(16000),
        runtime=120,
        gpu=1,
    params:
        version=version("pre_prune@{run}"),
    message:
        "Choose the weights whose gradients run {wildcards.run} keeps"
    shell:
        "python -m pipeline.cached --threads {threads} --gpus {resources.gpu} " "pre_prune@{wildcards.run} > {log} 2>&1"


# The selection pins base model and data by content: to depend on it is to depend on all three (see dvc.yaml).
rule cache_gradients:
    input:
        selection="artifacts/runs/{run}/selection.safetensors",
        spec=".stages/cache_gradients@{run}-{shard}.spec.json",
    output:
        gradients=update("artifacts/runs/{run}/gradients/shard-{shard}.safetensors"),
        rows=update("artifacts/runs/{run}/gradients/shard-{shard}.parquet"),
        manifest=update("artifacts/manifests/cache_gradients/{run}-{shard}.json"),
    log:
        "logs/cache_gradients/{run}-{shard}.log",
    benchmark:
        "benchmarks/cache_gradients/{run}-{shard}.tsv"
    threads: language_model_threads()
    resources:
        mem_mb=growing(16000),
        runtime=480,
        gpu=1,
    params:
        version=version("cache_gradients@{run}-{shard}"),
    message:
        "Collect the gradients of run {wildcards.run}, shard {wildcards.shard}"
    shell:
        "python -m pipeline.cached --threads {threads} --gpus {resources.gpu} "
        "cache_gradients@{wildcards.run}-{wildcards.shard} > {log} 2>&1"


rule train:
    input:
        gradients=expand("artifacts/runs/{{run}}/gradients/shard-{shard}.safetensors", shard=SHARDS),
        rows=expand("artifacts/runs/{{run}}/gradients/shard-{shard}.parquet", shard=SHARDS),
        spec=".stages/train@{run}-{seed}.spec.json",
    output:
        model=update("artifacts/runs/{run}/seeds/{seed}/model.safetensors"),
        config=update("artifacts/runs/{run}/seeds/{seed}/config.json"),
        history=update("artifacts/runs/{run}/seeds/{seed}/history.parquet"),
        runners_up=update("artifacts/runs/{run}/seeds/{seed}/runners_up.safetensors"),
        metrics=update("artifacts/runs/{run}/seeds/{seed}/metrics.json"),
        manifest=update("artifacts/manifests/train/{run}-{seed}.json"),
    log:
        "logs/train/{run}-{seed}.log",
    benchmark:
        "benchmarks/train/{run}-{seed}.tsv"
    threads: 1
    resources:
        mem_mb=all_rows,
        runtime=120,
        gpu=1,
    params:
        version=version("train@{run}-{seed}"),
    message:
        "Train run {wildcards.run} with seed {wildcards.seed}"
    shell:
        "python -m pipeline.cached --threads {threads} --gpus {resources.gpu} "
        "train@{wildcards.run}-{wildcards.seed} > {log} 2>&1"


rule select_seed:
    input:
        seed_models=expand("artifacts/runs/{{run}}/seeds/{seed}/model.safetensors", seed=SEEDS),
        seed_configs=expand("artifacts/runs/{{run}}/seeds/{seed}/config.json", seed=SEEDS),
        seed_histories=expand("artifacts/runs/{{run}}/seeds/{seed}/history.parquet", seed=SEEDS),
        seed_runners_up=expand("artifacts/runs/{{run}}/seeds/{seed}/runners_up.safetensors", seed=SEEDS),
        seed_metrics=expand("artifacts/runs/{{run}}/seeds/{seed}/metrics.json", seed=SEEDS),
        spec=".stages/select_seed@{run}.spec.json",
    output:
        seed_report=update("artifacts/runs/{run}/seed_report.json"),
        manifest=update("artifacts/manifests/select_seed/{run}.json"),
    log:
        "logs/select_seed/{run}.log",
    benchmark:
        "benchmarks/select_seed/{run}.tsv"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=30,
    params:
        version=version("select_seed@{run}"),
    message:
        "Select the seed of run {wildcards.run}"
    shell:
        "python -m pipeline.cached --threads {threads} select_seed@{wildcards.run} > {log} 2>&1"


rule post_prune:
    input:
        seed_report="artifacts/runs/{run}/seed_report.json",
        seed_models=expand("artifacts/runs/{{run}}/seeds/{seed}/model.safetensors", seed=SEEDS),
        seed_configs=expand("artifacts/runs/{{run}}/seeds/{seed}/config.json", seed=SEEDS),
        seed_histories=expand("artifacts/runs/{{run}}/seeds/{seed}/history.parquet", seed=SEEDS),
        seed_runners_up=expand("artifacts/runs/{{run}}/seeds/{seed}/runners_up.safetensors", seed=SEEDS),
        seed_metrics=expand("artifacts/runs/{{run}}/seeds/{seed}/metrics.json", seed=SEEDS),
        gradients=expand("artifacts/runs/{{run}}/gradients/shard-{shard}.safetensors", shard=SHARDS),
        rows=expand("artifacts/runs/{{run}}/gradients/shard-{shard}.parquet", shard=SHARDS),
        spec=".stages/post_prune@{run}.spec.json",
    output:
        model=update("artifacts/runs/{run}/model/model.safetensors"),
        config=update("artifacts/runs/{run}/model/config.json"),
        metrics=update("artifacts/runs/{run}/model/metrics.json"),
        manifest=update("artifacts/manifests/post_prune/{run}.json"),
    log:
        "logs/post_prune/{run}.log",
    benchmark:
        "benchmarks/post_prune/{run}.tsv"
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=30,
    params:
        version=version("post_prune@{run}"),
    message:
        "Prune the selected model of run {wildcards.run}"
    shell:
        "python -m pipeline.cached --threads {threads} post_prune@{wildcards.run} > {log} 2>&1"


rule evaluate_encoder:
    input:
        model="artifacts/runs/{run}/model/model.safetensors",
        config="artifacts/runs/{run}/model/config.json",
        gradients=expand("artifacts/runs/{{run}}/gradients/shard-{shard}.safetensors", shard=SHARDS),
        rows=expand("artifacts/runs/{{run}}/gradients/shard-{shard}.parquet", shard=SHARDS),
        spec=".stages/evaluate_encoder@{run}.spec.json",
    output:
        encodings=update("artifacts/runs/{run}/encoder/encodings.parquet"),
        metrics=report(
            update("artifacts/runs/{run}/encoder/metrics.json"),
            caption="workflow/report/encoder_metrics.rst",
            category="Metrics",
            labels={"run": "{run}", "metrics": "encoder"},
        ),
        details=update("artifacts/runs/{run}/encoder/details.json"),
        manifest=update("artifacts/manifests/evaluate_encoder/{run}.json"),
    log:
        "logs/evaluate_encoder/{run}.log",
    benchmark:
        "benchmarks/evaluate_encoder/{run}.tsv"
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=60,
    params:
        version=version("evaluate_encoder@{run}"),
    message:
        "Encode the rows of run {wildcards.run} and measure how well its classes separate"
    shell:
        "python -m pipeline.cached --threads {threads} evaluate_encoder@{wildcards.run} > {log} 2>&1"


rule evaluate_decoder:
    input:
        model="artifacts/runs/{run}/model/model.safetensors",
        config="artifacts/runs/{run}/model/config.json",
        base_model=base_model,
        dataset=dataset,
        spec=".stages/evaluate_decoder@{run}.spec.json",
    output:
        grid=update("artifacts/runs/{run}/decoder/grid.parquet"),
        metrics=report(
            update("artifacts/runs/{run}/decoder/metrics.json"),
            caption="workflow/report/decoder_metrics.rst",
            category="Metrics",
            labels={"run": "{run}", "metrics": "decoder"},
        ),
        manifest=update("artifacts/manifests/evaluate_decoder/{run}.json"),
    log:
        "logs/evaluate_decoder/{run}.log",
    benchmark:
        "benchmarks/evaluate_decoder/{run}.tsv"
    threads: language_model_threads()
    resources:
        mem_mb=growing(16000),
        runtime=480,
        gpu=1,
    params:
        version=version("evaluate_decoder@{run}"),
    message:
        "Score changed base models of run {wildcards.run} over the grid of factors and rates"
    shell:
        "python -m pipeline.cached --threads {threads} --gpus {resources.gpu} "
        "evaluate_decoder@{wildcards.run} > {log} 2>&1"


rule plot:
    input:
        seed_report="artifacts/runs/{run}/seed_report.json",
        seed_models=expand("artifacts/runs/{{run}}/seeds/{seed}/model.safetensors", seed=SEEDS),
        seed_configs=expand("artifacts/runs/{{run}}/seeds/{seed}/config.json", seed=SEEDS),
        seed_histories=expand("artifacts/runs/{{run}}/seeds/{seed}/history.parquet", seed=SEEDS),
        seed_runners_up=expand("artifacts/runs/{{run}}/seeds/{seed}/runners_up.safetensors", seed=SEEDS),
        seed_metrics=expand("artifacts/runs/{{run}}/seeds/{seed}/metrics.json", seed=SEEDS),
        encodings="artifacts/runs/{run}/encoder/encodings.parquet",
        grid="artifacts/runs/{run}/decoder/grid.parquet",
        decoder_metrics="artifacts/runs/{run}/decoder/metrics.json",
        spec=".stages/plot@{run}.spec.json",
    output:
        training=report(
            update("artifacts/runs/{run}/plots/training.png"),
            caption="workflow/report/training_plot.rst",
            category="Figures",
            labels={"run": "{run}", "figure": "training"},
        ),
        training_pdf=update("artifacts/runs/{run}/plots/training.pdf"),
        training_curves=update("artifacts/runs/{run}/plots/training.csv"),
        encoder=report(
            update("artifacts/runs/{run}/plots/encoder.png"),
            caption="workflow/report/encoder_plot.rst",
            category="Figures",
            labels={"run": "{run}", "figure": "encoder"},
        ),
        encoder_pdf=update("artifacts/runs/{run}/plots/encoder.pdf"),
        decoder=report(
            update("artifacts/runs/{run}/plots/decoder.png"),
            caption="workflow/report/decoder_plot.rst",
            category="Figures",
            labels={"run": "{run}", "figure": "decoder"},
        ),
        decoder_pdf=update("artifacts/runs/{run}/plots/decoder.pdf"),
        manifest=update("artifacts/manifests/plot/{run}.json"),
    log:
        "logs/plot/{run}.log",
    benchmark:
        "benchmarks/plot/{run}.tsv"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=30,
    params:
        version=version("plot@{run}"),
    message:
        "Plot training, encodings and decoder grid of run {wildcards.run}"
    shell:
        "python -m pipeline.cached --threads {threads} plot@{wildcards.run} > {log} 2>&1"


# The folders are named after the run's classes, so that every run has a rule of its own.
for run, section in RUNS.items():

    rule:
        name:
            f"rewrite_model_{run}"
        input:
            model=f"artifacts/runs/{run}/model/model.safetensors",
            config=f"artifacts/runs/{run}/model/config.json",
            base_model=expand("artifacts/base_models/{model}/{name}", model=section["base_model"], name=MODEL_FILES),
            decoder=f"artifacts/runs/{run}/decoder/metrics.json",
            spec=f".stages/rewrite_model@{run}.spec.json",
        output:
            models=update(
                expand(
                    "artifacts/runs/{run}/rewritten/{target}/{name}",
                    run=run,
                    target=section["target_classes"],
                    name=["README.md", *MODEL_FILES],
                )
            ),
            manifest=update(f"artifacts/manifests/rewrite_model/{run}.json"),
        log:
            f"logs/rewrite_model/{run}.log",
        benchmark:
            f"benchmarks/rewrite_model/{run}.tsv"
        threads: 1
        resources:
            mem_mb=growing(8000),
            runtime=60,
        params:
            version=version(f"rewrite_model@{run}"),
            address=f"rewrite_model@{run}",
        message:
            f"Write the changed base models of run {run}"
        shell:
            "python -m pipeline.cached --threads {threads} {params.address} > {log} 2>&1"
