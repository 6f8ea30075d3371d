"""Training a masked language model: a plain loop as reference, several processes as one, kills without a trace."""

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import BertForMaskedLM, PreTrainedTokenizerFast, TrainingArguments, get_scheduler

from gradiend_core.config.base_models import MaskedLMTraining
from gradiend_core.config.section import validate
from gradiend_core.config.train import Train
from gradiend_core.corpus.texts import TEXTS
from gradiend_core.errors import GradiendError
from gradiend_core.files import read_json
from gradiend_core.lm import masked_trainer, training_job
from gradiend_core.lm.masked_trainer import MaskedTrainer, training_arguments
from gradiend_core.lm.masking import IGNORED, Encoded, MaskedOnce, Masker, share
from gradiend_core.lm.pretrain import train_masked_lm, train_tokenizer
from gradiend_core.lm.processes import _first_failure, run_processes
from gradiend_core.lm.trainer_checkpoints import TrainerCheckpoints
from gradiend_core.lm.training_job import TrainedMaskedLM, TrainingJob, check_job, new_model, read_result, train_share
from gradiend_core.tables import write_table
from pipeline import base_model_trained as stage

ROOT = Path(__file__).parents[2]
FOLDER = ".partial-resume-checkpoints"
NAMES = ["man", "queen", "dogs", "cat", "girl"]
SENTENCES = [
    f"The {noun} {verb} {'very ' * (number % 3)}late."
    for number, (noun, verb) in enumerate((noun, verb) for noun in NAMES for verb in ["walked", "slept", "ran", "sat"])
]
# Twenty texts, so that the last batch of a pass has 4 rows, of which 3 processes would not get the same number.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODEL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    **NO_DROPOUT,
}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
SETTINGS: dict[str, Any] = {
    "max_steps": 20,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "mlm_probability": 0.4,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES, vocab_size=120)


def settings(**changes: Any) -> MaskedLMTraining:
    return validate(MaskedLMTraining, SETTINGS | changes, "training")


def trained(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> TrainedMaskedLM:
    training = settings(**changes)
    return train_masked_lm(SENTENCES, tokenizer, model_config=MODEL, training=training, validation=SENTENCES[::3])


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a tensor, keys' biases aside.

    A key's bias adds the same to all scores of a query, which softmax takes away: its gradient is rounding alone, which
    Adam makes as large as any other.
    """
    assert first.keys() == second.keys()
    names = [name for name in first if "key.bias" not in name]
    return max(float((first[name] - second[name]).norm() / first[name].norm().clamp(min=1e-9)) for name in names)


# --- settings


def test_keys_that_train_has_too_are_the_same() -> None:
    # The metrics are those of other models; `tune` is about gradients of one scale.
    others = {"learning_rate", "metric_for_best_model"}
    mine, its = MaskedLMTraining.model_fields, Train.model_fields
    for name in mine.keys() & its.keys() - others:
        assert mine[name].metadata == its[name].metadata, name
        assert str(mine[name].annotation).replace("optimization", "train") == str(its[name].annotation).replace(
            "optimization", "train"
        ), name
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert its.keys() & known - {"resume_from_checkpoint"} <= mine.keys(), "train has keys of transformers that lack"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "must be -1, or greater than or equal to 1"),
        ({"max_steps": -1}, "nothing to train: give max_steps or num_train_epochs a value above 0"),
        ({"batch_size": 15, "processes": 2}, "batch_size 15 is not .* = 8 * 1 * 2 = 16"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are the same thing"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "set save_strategy to epoch, too"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3},
            "save_steps 100 is not a multiple of eval_steps 3",
        ),
        ({"eval_strategy": "steps", "eval_delay": 21}, "eval_delay 21 exceeds max_steps 20"),
        ({"optimizer_groups": [{"pattern": "("}]}, "not a regular expression"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GradiendError, match=f"training.*{message}".replace("*", r"\*").replace(r".\*", ".*")):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer_groups": [{"pattern": "embedings"}]},
            r"optimizer_groups\[0\].pattern 'embedings' is found in no trained parameter",
        ),
        ({"eval_strategy": "steps"}, "eval_strategy: the corpus has no validation texts"),
        (
            {"report_to": ["tensorboard"]},
            r"tensorboard is not installed: pip install 'gradiend-pipeline\[tensorboard\]",
        ),
        ({"processes": 3}, "processes: 3, but there are 2 GPUs here"),
    ],
)
def test_what_cannot_be_honoured_here_is_named_before_training(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(training_job, "find_spec", lambda _: None)
    with pytest.raises(GradiendError, match=message):
        check_job(job(tokenizer, Path("nowhere"), settings(**changes), validation=[]))


def job(
    tokenizer: PreTrainedTokenizerFast, folder: Path, training: MaskedLMTraining, validation: list[str]
) -> TrainingJob:
    return TrainingJob(SENTENCES, validation, tokenizer, MODEL, training, TrainerCheckpoints(folder, {}), None)


@pytest.mark.parametrize(
    ("changes", "argument", "value"),
    [
        ({"torch_compile": True}, "torch_compile", True),
        ({"bf16": True}, "bf16", True),
        ({"gradient_checkpointing": True}, "activation_checkpointing", True),
        ({}, "activation_checkpointing", False),
        ({"logging_steps": 7}, "logging_steps", 7),
        ({}, "logging_steps", 0.2),
        ({"logging_first_step": True}, "logging_first_step", True),
        ({"max_grad_norm": None}, "max_grad_norm", 0.0),
        ({"warmup_ratio": 0.3}, "warmup_steps", 0.3),
        ({"processes": 2}, "ddp_backend", "gloo"),
        ({"eval_strategy": "epoch", "eval_delay": 3}, "eval_delay", 3),
        ({"metric_for_best_model": "accuracy"}, "greater_is_better", True),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, "greater_is_better", False),
        ({}, "greater_is_better", False),
    ],
)
def test_arguments_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], argument: str, value: Any
) -> None:
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _: torch.device("cpu")))
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    arguments = training_arguments(settings(**changes), tmp_path, bar=False, device=torch.device("cpu"))
    assert getattr(arguments, argument) == value
    assert arguments._n_gpu == 1, "several GPUs would be used by one process"


# --- a plain loop as reference


def plain_training(tokenizer: PreTrainedTokenizerFast, training: MaskedLMTraining, steps: int) -> dict[str, Tensor]:
    """The same training with PyTorch alone: ordinary model, whole vocabulary scored, one pass for every batch."""
    model = BertForMaskedLM(new_model(job(tokenizer, Path("x"), training, [])).config)
    with torch.random.fork_rng():
        model.load_state_dict(new_model(job(tokenizer, Path("x"), training, [])).state_dict())
    rates = {"embeddings": 1e-3} if training.optimizer_groups else {}
    groups = []
    for name, parameter in model.named_parameters():
        decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else training.weight_decay
        rate = next((rate for pattern, rate in rates.items() if pattern in name), training.learning_rate)
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    kind = torch.optim.Adam if training.optim == "adam" else torch.optim.AdamW
    betas = (training.adam_beta1, training.adam_beta2)
    optimizer = kind(groups, lr=training.learning_rate, betas=betas, eps=training.adam_epsilon)
    warmup = training.warmup_steps or int(training.warmup_ratio * steps + 0.999)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps)
    masker, texts = Masker(tokenizer, training.mlm_probability, training.seed), Encoded(tokenizer, SENTENCES)
    batches = (masker([texts[row] for row in rows]) for rows in orders(training))
    passes_per_epoch, done = -(-len(texts) // training.per_device_train_batch_size), 0
    for _ in range(steps):
        count = min(training.gradient_accumulation_steps, passes_per_epoch - done % passes_per_epoch)
        together = [next(batches) for _ in range(count)]
        done += count
        items = sum(int((batch["labels"] != IGNORED).sum()) for batch in together)
        for batch in together:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            (loss / items).backward()  # type: ignore[no-untyped-call]
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.state_dict()


def orders(training: MaskedLMTraining) -> Iterator[list[int]]:
    """Rows of each batch: epoch e in the order that seed + e draws."""
    size, epoch = training.per_device_train_batch_size, 0
    while True:
        generator = torch.Generator().manual_seed(training.seed + epoch)
        order = torch.randperm(len(SENTENCES), generator=generator).tolist()
        yield from (order[start : start + size] for start in range(0, len(order), size))
        epoch += 1


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 20),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "batch_size": 12}, 20),
        ({"num_train_epochs": 2.5, "max_steps": -1}, 8),
        ({"num_train_epochs": 2, "max_steps": 5}, 5),
        ({"optim": "adam", "weight_decay": 0.1}, 20),
        ({"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3}, 20),
        ({"max_grad_norm": 0.1, "adam_epsilon": 0.1}, 20),
        ({"max_grad_norm": None, "adam_epsilon": 0.1}, 20),
        ({"lr_scheduler_type": "polynomial", "warmup_ratio": 0.3}, 20),
        ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4, "seed": 7}, 20),
        ({"optimizer_groups": [{"pattern": "embeddings", "learning_rate": 1e-3}]}, 20),
        ({"gradient_checkpointing": True}, 20),
        ({"float32_matmul_precision": "high", "detect_anomaly": True}, 20),
    ],
)
def test_training_follows_a_plain_loop(tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], steps: int) -> None:
    training = settings(**changes)
    with torch.random.fork_rng():
        expected = plain_training(tokenizer, training, steps)
    model = train_masked_lm(SENTENCES, tokenizer, model_config=MODEL, training=training).model
    assert difference(expected, model.state_dict()) < 1e-4
    initial = new_model(job(tokenizer, Path("x"), training, [])).state_dict()
    assert difference(initial, model.state_dict()) > 1e-2


def test_groups_may_have_settings_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    own = {"weight_decay": 0.5, "adam_beta1": 0.1, "adam_beta2": 0.2, "adam_epsilon": 0.3}
    groups = [{"pattern": "position"}, {"pattern": "embeddings", **own}]
    training = settings(optimizer_groups=groups, learning_rate=0.7, weight_decay=0.01)
    model = new_model(job(tokenizer, Path("x"), training, []))
    decayed = [name for name, _ in model.named_parameters() if "bias" not in name and "LayerNorm" not in name]
    found = masked_trainer.parameter_groups(model, decayed, training)
    of = {id(parameter): group for group in found for parameter in group["params"]}
    assert len(of) == len(list(model.parameters()))
    place = {name: of[id(parameter)] for name, parameter in model.named_parameters()}
    assert place["bert.embeddings.position_embeddings.weight"]["weight_decay"] == 0.01
    words = place["bert.embeddings.word_embeddings.weight"]
    assert (words["lr"], words["weight_decay"], words["betas"], words["eps"]) == (0.7, 0.5, (0.1, 0.2), 0.3)
    assert place["bert.embeddings.LayerNorm.weight"]["weight_decay"] == 0.0
    assert place["bert.embeddings.LayerNorm.weight"]["betas"] == (0.1, 0.2)
    assert place["cls.predictions.bias"]["betas"] == (0.9, 0.999)


def test_a_step_without_masked_tokens_has_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = Masker(tokenizer, 1e-9, 0)(Encoded(tokenizer, SENTENCES).ids[:4])
    assert bool((batch["labels"] == IGNORED).all())
    with torch.random.fork_rng():
        model = new_model(job(tokenizer, Path("x"), settings(), []))
    loss = model(**batch, num_items_in_batch=torch.tensor(0))["loss"]
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_bfloat16_changes_little(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = trained(tokenizer, max_steps=3).model.state_dict()
    half = trained(tokenizer, max_steps=3, bf16=True).model.state_dict()
    assert all(value.dtype == torch.float32 for value in half.values())
    assert 1e-5 < difference(plain, half) < 0.3


def test_diverged_training_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    for changes, why in (
        ({}, "20: .* is not finite"),
        ({"save_steps": 4}, "4: .* is not finite"),
        ({"detect_anomaly": True}, r"\d: Function .* returned nan values"),
    ):
        with pytest.raises(GradiendError, match=rf"training stopped at step {why}.*lower learning_rate"):
            trained(tokenizer, learning_rate=1e38, max_grad_norm=None, weight_decay=1.0, **changes)


def test_precision_of_products_is_that_of_the_training_alone(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    original = MaskedTrainer.training_step

    def training_step(self: MaskedTrainer, *arguments: Any, **options: Any) -> Tensor:
        seen.add(torch.get_float32_matmul_precision())
        return original(self, *arguments, **options)

    monkeypatch.setattr(MaskedTrainer, "training_step", training_step)
    trained(tokenizer, max_steps=1, float32_matmul_precision="high")
    assert seen == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


# --- evaluation


@pytest.mark.parametrize("size", [3, 8])
def test_evaluation_counts_every_masked_position_once(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    result = trained(tokenizer, eval_strategy="steps", eval_steps=20, per_device_train_batch_size=size)
    rows = MaskedOnce(Masker(tokenizer, SETTINGS["mlm_probability"], 0), Encoded(tokenizer, SENTENCES[::3]))
    losses, right = [], []
    for row in (rows[number] for number in range(len(rows))):
        masked = row["labels"] != IGNORED
        with torch.no_grad():
            scores = result.model(input_ids=row["input_ids"][None]).logits[0, masked].double()
        losses += torch.nn.functional.cross_entropy(scores, row["labels"][masked], reduction="none").tolist()
        right += (scores.argmax(-1) == row["labels"][masked]).tolist()
    assert len(losses) > 10
    assert 0 < sum(right) < len(right)
    assert result.validation["step"] == 20
    assert result.validation["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.validation["accuracy"] == pytest.approx(sum(right) / len(right))


def test_no_evaluation_unless_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert trained(tokenizer, max_steps=2).validation == {}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 8}, [8, 16, 20]),
        ({"eval_strategy": "steps", "eval_steps": 8, "eval_delay": 9}, [16, 20]),
        ({"eval_strategy": "epoch"}, [3, 6, 9, 12, 15, 18, 20]),
        ({"eval_strategy": "epoch", "eval_delay": 4}, [12, 15, 18, 20]),
    ],
)
def test_evaluated_steps(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], steps: list[int]
) -> None:
    with caplog.at_level("INFO"):
        trained(tokenizer, **changes)
    lines = [record.getMessage() for record in caplog.records if "validation loss" in record.msg]
    assert [int(line.split()[1].rstrip(":")) for line in lines] == steps


@pytest.mark.parametrize(
    ("changes", "step"), [({}, 12), ({"greater_is_better": True}, 16), ({"metric_for_best_model": "accuracy"}, 4)]
)
def test_best_model_is_kept(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], step: int
) -> None:
    evaluations = iter([(3.0, 0.9), (2.0, 0.1), (1.0, 0.2), (4.0, 0.3), (2.5, 0.4)])
    monkeypatch.setattr(
        masked_trainer, "_metrics", lambda _: dict(zip(("loss", "accuracy"), next(evaluations), strict=True))
    )
    seen: dict[int, Tensor] = {}
    original = MaskedTrainer._evaluate

    def evaluate(self: MaskedTrainer, *arguments: Any, **options: Any) -> Any:
        seen[self.state.global_step] = self._model.bert.embeddings.word_embeddings.weight.detach().clone()
        return original(self, *arguments, **options)

    monkeypatch.setattr(MaskedTrainer, "_evaluate", evaluate)
    result = trained(
        tokenizer, eval_strategy="steps", eval_steps=4, save_steps=8, load_best_model_at_end=True, **changes
    )
    assert result.validation["step"] == step
    assert torch.equal(result.model.bert.embeddings.word_embeddings.weight, seen[step])


# --- log lines and event files


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [4, 8, 12, 16, 20]),
        ({"logging_steps": 8}, [8, 16]),
        ({"logging_steps": 8, "logging_first_step": True}, [1, 8, 16]),
    ],
)
def test_log_lines(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], steps: list[int]
) -> None:
    with caplog.at_level("INFO"):
        trained(tokenizer, **changes)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "20 steps of 8 texts, 8 passes over 20 texts"
    assert [int(line.split()[1]) for line in messages if "loss" in line and " of 20" in line] == steps


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is optional")
def test_event_files_have_each_step_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = settings(report_to=["tensorboard"], logging_steps=1, save_steps=4, eval_strategy="epoch")

    def run() -> TrainedMaskedLM:
        with TrainerCheckpoints(tmp_path / "saves", {}) as saves:
            return train_masked_lm(
                *(SENTENCES, tokenizer),
                model_config=MODEL,
                training=training,
                validation=SENTENCES,
                checkpoints=saves,
                events=tmp_path / "events",
            )

    with monkeypatch.context() as patch:
        stop_after(11, patch)
        with pytest.raises(Stopped):
            run()
    run()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6, 9, 12, 15, 18, 20]


# --- interruptions


class Stopped(BaseException):
    """What a test stops a training with."""


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let training stop after so many passes; the result grows by one for every pass."""
    taken: list[int] = []
    original = MaskedTrainer.training_step

    def training_step(self: MaskedTrainer, *arguments: Any, **options: Any) -> Tensor:
        if len(taken) == step:
            raise Stopped
        taken.append(1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(MaskedTrainer, "training_step", training_step)
    return taken


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml (section `model`) and a corpus."""
    monkeypatch.chdir(tmp_path)
    write_params({})
    texts = [(text, "train") for text in SENTENCES] + [(f"{text} Yes.", "validation") for text in SENTENCES[::3]]
    texts += [(f"{text} No.", "test") for text in SENTENCES[::4]]
    Path("corpus").mkdir()
    write_table(Path("corpus/texts.parquet"), pd.DataFrame(texts, columns=list(TEXTS)), TEXTS)
    return tmp_path


def write_params(changes: dict[str, Any], shape: dict[str, float] = DROPOUT) -> None:
    of_saves = {"save_steps": 5, "eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    training = SETTINGS | of_saves | changes
    model = {"corpus": "x", "vocab_size": 120, "model": MODEL | shape, "training": training, "probe_words": ["cat"]}
    Path("params.yaml").write_text(yaml.safe_dump({"model": model}))


def run_stage(name: str) -> Path:
    arguments = ["--params", "model", "--corpus", "corpus", "--output", name]
    threads = torch.get_num_threads()
    stage.main([*arguments, "--manifest", f"manifests/{name}.json"])
    torch.set_num_threads(threads)
    return Path(name)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a model and its manifest."""
    files = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    return files | {"manifest": Path(f"manifests/{folder.name}.json").read_bytes().replace(folder.name.encode(), b"")}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("changes", "moments"),
    [
        ({}, [5, 19]),
        ({"save_steps": 3, "eval_steps": 3, "save_total_limit": 3}, [6, 11]),
        ({"gradient_accumulation_steps": 2}, [17]),
    ],
)
def test_interrupted_training_goes_on_at_the_last_save(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], moments: list[int]
) -> None:
    write_params(changes)
    with monkeypatch.context() as patch:
        passes = stop_after(1000, patch)
        expected = bytes_of(run_stage("whole"))
    assert len(expected) == 6
    every = changes.get("save_steps", 5)
    for moment in moments:
        with monkeypatch.context() as patch:
            stop_after(moment, patch)
            with pytest.raises(Stopped):
                run_stage("parts")
        with monkeypatch.context() as patch:
            taken = stop_after(1000, patch)
            assert bytes_of(run_stage("parts")) == expected
        steps = moment if "gradient_accumulation_steps" not in changes else moment // 3 * 2 + moment % 3 // 2
        saved = steps // every * every
        done = saved if "gradient_accumulation_steps" not in changes else saved // 2 * 3 + saved % 2 * 2
        assert len(taken) == len(passes) - done
        assert not (Path("parts") / FOLDER).exists()
        for path in Path("parts").iterdir():
            path.unlink()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("changed", ["code", "params", "corpus"])
def test_other_circumstances_begin_afresh(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: str
) -> None:
    with monkeypatch.context() as patch:
        stop_after(12, patch)
        with pytest.raises(Stopped):
            run_stage("parts")
    if changed == "code":
        monkeypatch.setattr(stage, "code_digest", lambda: "edited")
    elif changed == "params":
        write_params({"adam_beta2": 0.9})
    else:
        texts = pd.read_parquet("corpus/texts.parquet")
        write_table(Path("corpus/texts.parquet"), texts.iloc[::-1].reset_index(drop=True), TEXTS)
    taken = stop_after(1000, monkeypatch)
    with caplog.at_level("INFO"):
        run_stage("parts")
    assert f"made with another {changed}" in caplog.text
    assert len(taken) == 20


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_steps": 4, "save_total_limit": 9}, [4, 8, 12]),
        ({"save_steps": 4, "save_total_limit": 2}, [8, 12]),
        ({"save_strategy": "epoch", "save_total_limit": 9}, [3, 6, 9, 12]),
    ],
)
def test_saved_steps(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], saved: list[int]) -> None:
    write_params({"load_best_model_at_end": False} | changes)
    stop_after(14, monkeypatch)
    with pytest.raises(Stopped):
        run_stage("parts")
    assert sorted(int(path.name[11:]) for path in Path("parts").glob(f"{FOLDER}/checkpoint-*")) == saved


@pytest.mark.usefixtures("project")
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = bytes_of(run_stage("whole"))
    with monkeypatch.context() as patch:
        stop_after(13, patch)
        with pytest.raises(Stopped):
            run_stage("parts")
    unfinished = Path("parts") / FOLDER / "checkpoint-15"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    with caplog.at_level("INFO"):
        assert bytes_of(run_stage("parts")) == expected
    assert "checkpoint-15: not continued (it is not complete)" in caplog.text
    assert "continued after step 10" in caplog.text


@pytest.mark.usefixtures("project")
def test_a_checkpoint_whose_removal_was_interrupted_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bytes_of(run_stage("parts"))

    def remove_a_part(folder: str | Path, **_: Any) -> None:
        for file in Path(folder).glob("checkpoint-*/optimizer.pt"):
            file.unlink()

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", remove_a_part)
        run_stage("parts")
    assert list(Path("parts").glob(f"{FOLDER}/checkpoint-*/model.safetensors"))
    assert bytes_of(run_stage("parts")) == expected


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("best", [True, False])
def test_an_interruption_after_the_last_step_is_mended(monkeypatch: pytest.MonkeyPatch, best: bool) -> None:
    write_params({"load_best_model_at_end": best})
    expected = bytes_of(run_stage("whole"))

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_masked_lm", stop)
        with pytest.raises(Stopped):
            run_stage("parts")
    assert bytes_of(run_stage("parts")) == expected


@pytest.mark.usefixtures("project")
def test_loading_a_checkpoint_executes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(12, patch)
        with pytest.raises(Stopped):
            run_stage("parts")
    loaded, original = [], torch.load

    def load(*arguments: Any, weights_only: bool = False, **options: Any) -> Any:
        loaded.append(weights_only)
        return original(*arguments, weights_only=weights_only, **options)

    monkeypatch.setattr(torch, "load", load)
    run_stage("parts")
    assert len(loaded) == 3  # optimiser, schedule, random generators
    assert all(loaded)
    assert "Warning" not in capsys.readouterr().err


@pytest.mark.usefixtures("project")
def test_two_processes_do_not_train_one_model() -> None:
    with (
        TrainerCheckpoints(Path("one") / FOLDER, {}),
        pytest.raises(GradiendError, match="another process is training this model"),
    ):
        run_stage("one")


def _train(folder: Path, name: str, log: Path) -> None:
    """Run the stage; `log` appears when training begins."""
    os.chdir(folder)
    original = MaskedTrainer.training_step

    def training_step(self: MaskedTrainer, *arguments: Any, **options: Any) -> Tensor:
        log.touch()
        return original(self, *arguments, **options)

    MaskedTrainer.training_step = training_step  # type: ignore[method-assign]
    run_stage(name)


def test_kills_at_random_moments_change_no_byte(project: Path) -> None:
    write_params({"save_steps": 1, "eval_steps": 4, "max_steps": 30, "load_best_model_at_end": False})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "safetensors.torch", "torch", "transformers", __name__])
    moments, kills, log = random.Random(0), 0, project / "log"

    def attempt(name: str, share: float | None, whole: float = 0.0) -> float:
        """Train for a share of the time that the whole takes; the time it took."""
        log.unlink(missing_ok=True)
        process = context.Process(target=_train, args=(project, name, log))
        process.start()
        while process.is_alive() and not log.exists():
            time.sleep(0.002)
        started = time.monotonic()
        process.join(None if share is None else share * whole)
        process.kill()
        process.join()
        nonlocal kills
        kills += process.exitcode != 0
        return time.monotonic() - started

    whole = attempt("whole", None)
    for _ in range(2):
        attempt("parts", moments.uniform(0, 0.4), whole)
    attempt("parts", None)
    assert bytes_of(Path("parts")) == bytes_of(Path("whole"))
    assert not (Path("parts") / FOLDER).exists()
    assert kills > 0


# --- several processes


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_shares_are_the_batch(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    batch = Masker(tokenizer, 0.5, 0)([Encoded(tokenizer, SENTENCES)[row] for row in range(rows)])
    shares = [share(batch, process, 3) for process in range(3)]
    assert all(len(part["labels"]) > 0 for part in shares)
    together = [
        (*ids, *labels) for part in shares for ids, labels in zip(part["input_ids"], part["labels"], strict=True)
    ]
    counted = [row for row in together if any(int(token) != IGNORED for token in row[len(row) // 2 :])]
    whole = [(*ids, *labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert sorted(map(repr, counted)) == sorted(
        repr(row) for row in whole if any(int(token) != IGNORED for token in row[len(row) // 2 :])
    )


@pytest.mark.usefixtures("project")
def test_two_processes_are_one() -> None:
    """As a user starts it; the same texts, masks, evaluations and weights as one process with twice the batch."""
    changes = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    write_params(changes, NO_DROPOUT)
    run_stage("one")
    write_params(changes | {"processes": 2, "per_device_train_batch_size": 4}, NO_DROPOUT)
    whole = yaml.safe_load((ROOT / "params.yaml").read_text())
    whole["base_models"]["trained"]["two"] = yaml.safe_load(Path("params.yaml").read_text())["model"]
    whole["base_models"]["trained"]["two"]["corpus"] = "english"
    Path("params.yaml").write_text(yaml.safe_dump(whole))
    command = [sys.executable, "-m", "pipeline", "base_model_trained", "--params", "base_models.trained.two"]
    done = subprocess.run(
        [*command, "--corpus", "corpus", "--output", "two", "--manifest", "manifests/two.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("base_model_trained: step 20 of 20: loss") == 1, done.stderr
    assert all(line.startswith("base_model_trained: ") for line in done.stderr.splitlines()), done.stderr
    one, two = (load_file(f"{name}/model.safetensors") for name in ("one", "two"))
    assert difference(one, two) < 1e-5
    mine, its = (read_json(Path(f"{name}/metrics.json")) for name in ("one", "two"))
    assert its["validation"] == pytest.approx(mine["validation"], rel=1e-5)
    assert not (Path("two") / FOLDER).exists()


def _several(jobs: list[TrainingJob]) -> None:
    """What each of the processes does: one training after the other, because it takes long to start them."""
    for one in jobs:
        train_share(one)


def test_accumulation_and_few_rows_in_two_processes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "accumulation": {"gradient_accumulation_steps": 2},
        "one row each": {"per_device_train_batch_size": 1, "max_steps": 25},
        "diverged": {"learning_rate": 1e38, "max_grad_norm": None, "weight_decay": 1.0},
    }
    jobs = {}
    for name, changes in kinds.items():
        size = changes.get("per_device_train_batch_size", 4)
        training = settings(**changes | {"processes": 2, "per_device_train_batch_size": size})
        (tmp_path / name).mkdir()
        jobs[name] = job(tokenizer, tmp_path / name, training, SENTENCES[::3])
    with pytest.raises(GradiendError, match="training stopped at step"):
        run_processes(_several, list(jobs.values()), 2)
    for name, changes in list(kinds.items())[:2]:
        size = 2 * changes.get("per_device_train_batch_size", 4)
        alone = changes | {"per_device_train_batch_size": size}
        mine = train_masked_lm(
            SENTENCES, tokenizer, model_config=MODEL, training=settings(**alone), validation=SENTENCES[::3]
        )
        its = read_result(jobs[name])
        assert difference(mine.model.state_dict(), its.model.state_dict()) < 1e-5, name
        assert its.validation == pytest.approx(mine.validation, rel=1e-5), name


def test_a_killed_process_is_one_message() -> None:
    failure = ChildFailedError("train", {1: ProcessFailure(1, 4711, -signal.SIGKILL, "none")})
    message = str(_first_failure(failure, 2))
    assert message.startswith("process 1 of 2 was killed (SIGKILL, as the system does when memory runs out). Run it")
