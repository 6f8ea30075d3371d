"""What became of the arguments of the reference package, and of training loops at large: a table of docs/params.md."""

from collections.abc import Sequence
from typing import Final, NamedTuple


class Argument(NamedTuple):
    """The keys of params.yaml that honour an argument (below `runs.<name>` or at the top), or none; and why."""

    keys: tuple[str, ...]
    words: str


def _key(*keys: str, words: str = "") -> Argument:
    return Argument(keys, words)


def _same(section: str, names: str) -> dict[str, Argument]:
    """Arguments that a section honours under their own names."""
    return {name: _key(f"{section}.{name}") for name in names.split()}


def _instead(words: str, *names: str) -> dict[str, Argument]:
    """Arguments that are no key, because something else does what they are for."""
    return {name: Argument((), words) for name in names}


_LOSS: Final = "the loss is the squared error, `train.scaling` says how it is averaged; another one is a change of code"
_ONE_PASS: Final = "gradients are computed once, before training (`cache_gradients`)"
_CAUSAL: Final = "no auxiliary head: data and evaluation are for masked models"
_EVERY_ROW: Final = "every row counts, which stored gradients make cheap"
_RUNTIME: Final = "`benchmarks/` has time and memory of every job, progress lines the time left"
_SEARCH: Final = "the search has two settings, `train.learning_rate_probe_steps` and `train.learning_rate_max_probes`"
_PRODUCTS: Final = "a step is two products with one matrix each: no activations to compute again or to move away"
_ONE_DEVICE: Final = "a seed trains on one device; seeds and runs go side by side (docs/engines.md)"
_MAPPED: Final = "the stored gradients are mapped into memory: there is no loader"

# By the name of the class that has them; the last group holds what other training loops have besides.
ARGUMENTS: Final[dict[str, dict[str, Argument]]] = {
    "TrainingArguments": {
        **_same("train", "source target train_batch_size gradiend_batch_size train_max_size num_train_epochs"),
        **_same("train", "weight_decay adam_epsilon optim eval_strategy eval_steps save_steps latent_dim"),
        **_same("train", "activation_encoder activation_decoder bias_decoder supervised_encoder supervised_decoder"),
        **_same("select_seed", "max_seeds min_convergent_seeds convergent_metric convergent_score_threshold"),
        **_same("select_seed", "convergent_mean_by_class_threshold seed_stability_topk seed_stability_part"),
        **_same("select_seed", "fail_on_non_convergence"),
        **_same("pre_prune", "params"),
        "max_steps": _key("train.max_steps", words="overrides `num_train_epochs`, as documented there"),
        "learning_rate": _key("train.learning_rate", words="a number or `tune`; see `train.scaling`"),
        "lr_search_config": _key("train.learning_rate_probe_steps", "train.learning_rate_max_probes"),
        "base_gradient_batch_size": _key("train.train_batch_size", words="rows averaged into one gradient vector"),
        "seed": _key("seeds", words="the list itself; nothing is ever drawn without a seed"),
        "do_eval": _key("train.eval_strategy", words="`no`: the last step alone is evaluated"),
        "save_strategy": _key(
            "train.save_strategy", words="of what an interrupted training continues from; the best model is always kept"
        ),
        "save_only_best": _key("train.load_best_model_at_end"),
        "torch_dtype": _key("pre_prune.base_model_dtype", "cache_gradients.base_model_dtype"),
        "eval_batch_size": _key("evaluate_decoder.eval_batch_size"),
        "decoder_eval_lrs": _key("evaluate_decoder.lrs"),
        "decoder_eval_feature_factors": _key("evaluate_decoder.feature_factors"),
        "decoder_eval_max_size_training_like": _key("evaluate_decoder.max_size_training_like"),
        "decoder_eval_max_size_neutral": _key("evaluate_decoder.max_size_neutral"),
        "positive_class": _key("target_classes", words="the first of them"),
        "pre_prune_config": _key("pre_prune", words="a section, see `PrePruneConfig`"),
        "post_prune_config": _key("post_prune", words="a section, see `PostPruneConfig`"),
        "convergence_metric": _key("select_seed.convergent_metric", words="an earlier name of it"),
        "convergence_threshold": _key("select_seed.convergent_score_threshold", words="an earlier name of it"),
        "analyze_seed_stability": _key("select_seed.seed_stability_topk", words="from two converged seeds on"),
        **_instead("this folder is the experiment: results are under `artifacts/`", "experiment_dir", "output_dir"),
        **_instead("`artifacts/runs/<name>/seeds/`", "seed_runs_dir"),
        **_instead("results are keyed by the content of all they depend on, and restored when they exist", "use_cache"),
        **_instead("every seed's model stays", "saved_seed_runs", "keep_seed_runs"),
        **_instead("`artifacts/` may be deleted at any time: both engines restore it", "delete_models"),
        **_instead("manifests say what made a result; comments in params.yaml are free", "metadata"),
        **_instead(
            "rows of the target classes train; rows of label 0 are neutral ones, for evaluation alone",
            "add_identity_for_other_classes",
            "include_other_classes",
        ),
        **_instead(_ONE_PASS, "precompute_gradient_batches", "precompute_gradient_buffer_size", "use_cached_gradients"),
        **_instead(
            _RUNTIME,
            "gradient_timing_steps",
            "runtime_monitor",
            "runtime_monitor_interval",
            "runtime_monitor_system_stats",
        ),
        **_instead(_LOSS, "criterion"),
        **_instead("own evaluations read `history.parquet`, `encodings.parquet` or the model", "evaluate_fn"),
        **_instead(_EVERY_ROW, "encoder_eval_train_max_size", "encoder_eval_max_size", "seed_selection_eval_max_size"),
        **_instead("every row counts; encodings are reported for each class, too", "encoder_eval_balance"),
        **_instead("models with code of their own are not loaded", "trust_remote_code"),
        **_instead("corpora are files of yours", "dataset_trust_remote_code"),
        **_instead("no text is generated, so that no key or value is needed twice", "model_use_cache"),
        **_instead("once, after training, where the encoder's activation allows it", "normalize_gradiend"),
        **_instead("a GRADIEND stays on one device", "encoder_decoder_same_device"),
        **_instead(
            "a model too large for one GPU is spread over all of them", "base_model_device_map", "base_model_max_memory"
        ),
        **_instead("the cross-entropy at the masked places: models are masked ones", "prediction_objective"),
        **_instead("one marker, made when the data are", "mask_placeholder"),
        **_instead(
            _CAUSAL,
            "decoder_mlm_head_epochs",
            "decoder_mlm_head_batch_size",
            "decoder_mlm_head_lr",
            "decoder_mlm_head_max_size",
            "decoder_sequence_cloze_rhs_window",
        ),
        **_instead(
            "splits belong to texts, so that the scores of seeds compare",
            "split_resplit_per_seed",
            "split_resplit_strategy",
        ),
        **_instead("a run has one selection, which all its seeds share", "reuse_pre_prune"),
        **_instead("figures always say which seeds have not converged", "highlight_non_convergence"),
    },
    "PrePruneConfig": {
        **_same("pre_prune", "n_samples topk threshold source batch_size seed"),
        **_instead("rows are drawn alike from every target transition", "feature_class_key"),
        "target_feature_class_ids": _key("target_classes"),
        "dataset": _key("dataset", words="its training rows"),
        **_instead("the sample comes before the store, which holds the kept entries only", "use_cached_gradients"),
        **_instead("always: never more than one row's gradient is in memory", "use_streaming"),
    },
    "PostPruneConfig": {
        **_same("post_prune", "topk threshold part"),
        "mask": _key("post_prune.mask", words="a file and its SHA-256"),
        **_instead("pruning gives a new model; that of the seed stays", "inplace"),
        **_instead("`GradiendModel.selection` of the result says what was kept", "return_mask"),
    },
    "LRSearchConfig": {
        "probe_steps": _key("train.learning_rate_probe_steps"),
        "max_probes": _key("train.learning_rate_max_probes"),
        **_instead(
            _SEARCH,
            *("probe_eval_steps", "confirm", "early_stop", "resolution", "factor", "min_ratio", "lr_bounds"),
            *("center_window", "max_window_probes"),
        ),
        **_instead("every seed searches for itself", "probe_seeds"),
        **_instead(
            "`metrics.json` has the rate and the score of every probe", "keep_probe_artifacts", "lr_search.json"
        ),
        "tune_learning_rate": _key("train.learning_rate", words="`tune`"),
        **_instead("the log has a line for every probe", "verbose"),
    },
    "Other training loops": {
        "micro_batch_size": _key("train.gradiend_batch_size"),
        "per_device_train_batch_size": _key("train.gradiend_batch_size"),
        "max_gradient_norm": _key("train.max_grad_norm"),
        "eval_every": _key("train.eval_steps"),
        "save_every": _key("train.save_steps"),
        "log_every": _key("train.logging_steps"),
        "logging_strategy": _key("train.logging_steps", words="0 logs nothing but the progress"),
        "best_model_metric": _key("train.metric_for_best_model"),
        "best_model_greater_is_better": _key("train.greater_is_better"),
        "preserve_best_model": _key("train.load_best_model_at_end"),
        "tf32": _key("train.float32_matmul_precision", words="`high`"),
        **_instead("an interrupted training always continues, and to the same bytes", "resume_from_checkpoint"),
        **_instead("`logs/tensorboard/`", "logging_dir"),
        **_instead("this folder is the run", "run_name", "overwrite_output_dir"),
        **_instead("`CUDA_VISIBLE_DEVICES` chooses; without a GPU the CPU computes", "device", "use_cpu", "no_cuda"),
        "mixed_precision": _key("cache_gradients.dtype", words="of the stored gradients; sums and weights are float32"),
        "bf16": _key("cache_gradients.dtype", words="`bfloat16`, of the stored gradients"),
        **_instead(
            "stored gradients are float32 or bfloat16, sums and weights float32",
            *("fp16", "fp8_recipe", "fp8_dim_alignment", "qat_recipe", "default_dtype"),
        ),
        **_instead(
            _PRODUCTS,
            *("gradient_checkpointing", "enable_activation_offloading", "activation_memory_budget"),
            *("fuse_optim_with_backward", "gc_threshold", "construct_model_on"),
        ),
        **_instead(
            "`train.torch_compile` compiles one function for one shape, by the default backend",
            *("torch_compile_backend", "torch_compile_mode", "torch_compile_dynamic", "torch_compile_full_graph"),
            "dynamo_recompile_limit",
        ),
        **_instead(_RUNTIME, "speed_metrics_start_step"),
        **_instead("a GRADIEND has no attention", "sdpa_backend", "sdpa_set_priority"),
        **_instead(
            _ONE_DEVICE,
            *("ddp", "post_local_sgd", "fsdp", "fsdp2", "deepspeed", "distributed_backend", "dispatch_batches"),
            *("n_microbatches", "stages_per_rank", "pp_stage_type", "is_multistage"),
        ),
        **_instead(_MAPPED, "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        **_instead(_MAPPED, "dataloader_prefetch_factor"),
        **_instead("a pass takes every row of the largest transition", "dataloader_drop_last", "epoch_train_steps"),
        **_instead("every pass is shuffled anew", "set_dataset_epoch"),
        **_instead(_EVERY_ROW, "max_eval_steps", "per_device_eval_batch_size"),
        **_instead("evaluations and saves have steps of their own", "eval_on_save"),
        **_instead("all weights are safetensors", "save_safetensors"),
        **_instead("a stage runs on one machine", "save_on_each_node"),
        **_instead("warm-up is all that can be set about a schedule", "lr_scheduler_kwargs"),
        **_instead("groups are checked when params.yaml is read", "debug_optimizer_groups"),
    },
}


def explain(place: Sequence[int | str]) -> str | None:
    """What to do instead, for an unknown key in a run that is one of the arguments; None for any other.

    `place` leads to the key: `("runs", "number", "train", "use_cache")`.
    """
    if place[0] != "runs":
        return None
    own = {"pre_prune": "PrePruneConfig", "post_prune": "PostPruneConfig"}.get(str(place[-2]), "LRSearchConfig")
    for group in (own, "TrainingArguments", "Other training loops"):
        if argument := ARGUMENTS[group].get(str(place[-1])):
            here = f"here it is {' and '.join(argument.keys)}" if argument.keys else ""
            return f"{'; '.join(filter(None, [here, argument.words]))} (docs/params.md)"
    return None
