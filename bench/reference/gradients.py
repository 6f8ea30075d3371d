"""Reference values that run the language model: gradients, pre-pruning, training, rewriting, scoring."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import tiny_model
import torch
from gradiend.model.model import GradiendModel
from gradiend.trainer.core.arguments import TrainingArguments
from gradiend.trainer.core.callbacks import TrainingCallback
from gradiend.trainer.core.pruning import PrePruneConfig, _stratified_indices, pre_prune
from gradiend.trainer.core.training import train as core_train
from gradiend.trainer.text.prediction.decoder_eval_utils import (
    annotate_text_probability_rows,
    compute_probability_shift_score_mlm,
    compute_probability_shift_score_row_wise,
)
from gradiend.trainer.text.prediction.model_with_gradiend import TextPredictionModelWithGradiend
from gradiend.trainer.text.prediction.trainer import TextPredictionTrainer
from torch.utils.data import DataLoader

Tensors = dict[str, torch.Tensor]
Values = dict[str, Any]

BATCH_SIZE = 4
PRUNE_SAMPLES = 8
TRAINED_SIZE = 64
STEPS = 100
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 1e-2
ADAM_EPSILON = 1e-8
# What differs between the trajectories: the optimiser, and the gradient rows of a step (gradiend_batch_size).
TRAJECTORIES: dict[str, tuple[str, int]] = {"adamw": ("adamw", 1), "adam": ("adam", 1), "two_rows": ("adamw", 2)}
PARTS = ("encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum")
REWRITES = ((0.5, 1.0), (0.5, -1.0))
TARGETS = {name: [word] for name, word in tiny_model.WORDS.items()}


class RowItems:
    """A list-like view of single-example items that knows which row each item came from.

    It has no `data` table, so that the reference's sampler looks at the items it will index (it misaligns otherwise).
    """

    def __init__(self, items: list[dict[str, Any]], row_of: dict[str, int]) -> None:
        self.items = sorted(items, key=lambda item: row_of[item["template"]])
        self.rows = [row_of[item["template"]] for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class Reference:
    """The reference trainer and model on the tiny base model, and the values computed with them."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.rows = rows
        self.row_of = {str(row["masked"]): int(row["row"]) for row in rows}
        self.trainer = TextPredictionTrainer(
            model=str(folder),
            data=tiny_model.reference_frame(rows),
            target_classes=list(tiny_model.CLASSES),
            alternative_col="alternative",
            alternative_class_col="alternative_class",
            args=TrainingArguments(train_batch_size=BATCH_SIZE, seed=0),
        )
        self.model = self.load()

    def load(self, **kwargs: Any) -> Any:
        """Return a fresh base model with a fresh GRADIEND."""
        torch.manual_seed(0)
        return TextPredictionModelWithGradiend.from_pretrained(
            str(self.folder), source="alternative", target="diff", **kwargs
        )

    def dataset(self, batch_size: int) -> Any:
        """Return the trainer's own training dataset, with the short padding of the tiny model."""
        data = self.trainer.create_training_data(self.model, batch_size=batch_size)
        data.max_length = tiny_model.MAX_LENGTH
        return data

    def gradient_rows(self, model: Any, source: str, target: str) -> list[dict[str, Any]]:
        """Return the rows of the reference's gradient dataset (one vector pair for each batch of examples)."""
        return list(
            self.trainer.create_gradient_training_dataset(self.dataset(BATCH_SIZE), model, source=source, target=target)
        )

    def gradients(self) -> tuple[Tensors, Values]:
        """Batch gradients in mapping order, and two single examples with more than one scored position."""
        both = self.gradient_rows(self.model, "factual", "alternative")
        diff = self.gradient_rows(self.model, "alternative", "diff")
        tensors = {
            "gradients.factual": torch.stack([batch["source"] for batch in both]),
            "gradients.alternative": torch.stack([batch["target"] for batch in both]),
            "gradients.diff_first": diff[0]["target"],
        }
        creator, item = self.model.gradient_creator, self.dataset(1)._create_item
        singles = {
            "two_slots": ("[MASK] said that [MASK] was late .", "he"),
            "two_pieces": ("the nurse knew [MASK] was tired .", "himself"),
        }
        for name, (masked, token) in singles.items():
            tensors[f"gradients.{name}"] = creator(item(masked, token))
        mapping = [[name, list(spec["shape"])] for name, spec in self.model.gradiend.param_map.items()]
        return {k: v.detach() for k, v in tensors.items()}, {
            "batches": [[self.row_of[t] for t in batch["template"]] for batch in both],
            "labels_source_alternative": [int(batch["label"][0]) for batch in diff],
            "labels_source_factual": [int(batch["label"][0]) for batch in both],
            "parameters": mapping,
            "singles": {name: list(pair) for name, pair in singles.items()},
        }

    def prune(self, source: str, topk: float | int, streaming: bool, lazy: bool = False) -> dict[str, Any]:
        """Run the reference's pre-pruning on a seeded sample; return kept indices, rows and the pruned model."""
        config = PrePruneConfig(n_samples=PRUNE_SAMPLES, topk=topk, source=source, seed=0, use_streaming=streaming)
        single = self.dataset(1)
        items = RowItems([single[i] for i in range(len(single))], self.row_of)
        ids = self.trainer.get_target_feature_class_ids()
        sample = _stratified_indices(items, PRUNE_SAMPLES, config.feature_class_key, ids, config.seed)
        model = self.load(pre_prune_config=config) if lazy else self.load()
        torch.manual_seed(0)
        with captured_importance(model) as captured:
            model, kept = pre_prune(model, items, config, definition=self.trainer, return_keep_idx=True)
        return {"model": model, "kept": kept, "rows": [items.rows[i] for i in sample], "importance": captured}

    def pre_prune(self) -> tuple[Tensors, Values]:
        """Kept base-global indices (topk=0.1) for both sources, by both implementations of the reference."""
        tensors: Tensors = {}
        values: Values = {"n_samples": PRUNE_SAMPLES, "seed": 0, "topk": 0.1}
        for source in ("alternative", "diff"):
            classic = self.prune(source, 0.1, streaming=False)
            streaming = self.prune(source, 0.1, streaming=True)
            kept = classic["kept"]
            tensors[f"pre_prune.{source}.kept"] = kept.to(torch.int32)
            ranked = classic["importance"][0].sort(descending=True).values
            values[source] = {
                "importance_first_dropped": float(ranked[len(kept)]),
                "importance_last_kept": float(ranked[len(kept) - 1]),
                "importance_max": float(ranked[0]),
                "rows": classic["rows"],
                "streaming_agrees": bool(torch.equal(kept, streaming["kept"])),
            }
        return tensors, values

    def training(self) -> tuple[Tensors, Values, Any]:
        """A hundred steps of the reference's own loop for every trajectory; also the model of the first one."""
        tensors: Tensors = {}
        values: Values = {}
        models = []
        for name, (optimizer, rows_per_step) in TRAJECTORIES.items():
            model, data, start = self.untrained()
            if tensors and not all(torch.equal(tensors[key], start[key]) for key in start):
                raise AssertionError("the reference's trajectories do not start alike")
            tensors |= start
            loader = DataLoader(data, batch_size=rows_per_step, shuffle=False)
            tensors |= run_training(model, loader, start["training.source"], optimizer, f"training.{name}")
            values[name] = {
                "adam_epsilon": ADAM_EPSILON,
                "learning_rate": LEARNING_RATE,
                "loss": "element-mean squared error",
                "optimizer": optimizer,
                "source": "alternative",
                "steps": STEPS,
                "target": "diff",
                "weight_decay": WEIGHT_DECAY,
                "rows_of_a_pass": [[int(row) for row in rows] for rows in loader.batch_sampler],
                "encoder_norm": model.gradiend.encoder_norm,
                "decoder_norm": model.gradiend.decoder_norm,
            }
            models.append(model)
        return tensors, values, models[0]

    def untrained(self) -> tuple[Any, Any, Tensors]:
        """A pre-pruned GRADIEND (m = 1), the package's gradient dataset, and what both contain."""
        pruned = self.prune("alternative", TRAINED_SIZE, streaming=True, lazy=True)
        data = self.trainer.create_gradient_training_dataset(self.dataset(BATCH_SIZE), pruned["model"])
        batches = list(data)
        return (
            pruned["model"],
            data,
            {
                "training.source": torch.stack([batch["source"] for batch in batches]).detach(),
                "training.target": torch.stack([batch["target"] for batch in batches]).detach(),
                "training.kept": pruned["kept"].to(torch.int32),
                **weights(pruned["model"].gradiend, "training.initial"),
            },
        )

    def rewriting(self, model: Any) -> tuple[Tensors, Values]:
        """Base weights at the kept coordinates before and after rewriting; the rest must not have moved."""
        kept = model.gradiend._get_base_global_index_map()
        before = flat_parameters(model, model.base_model)
        tensors = {"rewrite.base": before[kept]}
        values: Values = {"rewrites": [], "coordinates": "training.kept"}
        for number, (rate, factor) in enumerate(REWRITES):
            after = flat_parameters(model, model.rewrite_base_model(rate, factor))
            if (after != before).sum() != (after[kept] != before[kept]).sum():
                raise AssertionError("the reference changed a weight outside the kept coordinates")
            tensors[f"rewrite.{number}"] = after[kept]
            values["rewrites"].append({"feature_factor": factor, "learning_rate": rate})
        return tensors, values

    def scoring(self, model: Any) -> Values:
        """Class-word probabilities of the validation and test rows, for the base and the rewritten models."""
        rows = [row for row in self.rows if row["split"] != "train"]
        frame = pd.DataFrame(rows).rename(
            columns={"factual_class": "factual_id", "alternative_class": "alternative_id"}
        )
        values: Values = {"rows": [row["row"] for row in rows], "models": {}}
        models = {"base": model.base_model} | {
            f"rewrite.{i}": model.rewrite_base_model(*pair) for i, pair in enumerate(REWRITES)
        }
        for name, scored in models.items():
            per_row, _ = annotate_text_probability_rows(scored, model.tokenizer, frame, TARGETS)
            values["models"][name] = {
                "by_dataset": compute_probability_shift_score_mlm(
                    scored, model.tokenizer, frame, TARGETS, dataset_class_col="factual_id"
                ),
                "by_dataset_row_wise": compute_probability_shift_score_row_wise(scored, model.tokenizer, frame),
                "per_row": {c: per_row[f"p_class_{c}"].tolist() for c in tiny_model.CLASSES},
            }
        return values


@contextmanager
def captured_importance(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the importance vectors that the reference passes to its own pruning."""
    captured: list[torch.Tensor] = []
    original = model.prune_gradiend

    def spy(**kwargs: Any) -> Any:
        if kwargs.get("importance") is not None:
            captured.append(kwargs["importance"].clone())
        return original(**kwargs)

    model.prune_gradiend = spy
    try:
        yield captured
    finally:
        del model.prune_gradiend


def run_training(model: Any, loader: Any, sources: torch.Tensor, optimizer: str, prefix: str) -> Tensors:
    """Run the reference's training loop in place on `model`; losses and encodings of every step, the final weights."""
    losses: list[float] = []
    encodings: list[torch.Tensor] = []

    def encode() -> None:
        with torch.no_grad():
            encodings.append(model.gradiend.forward_encoder(sources).squeeze(1).clone())

    class Recorder(TrainingCallback):
        def on_step_end(self, step: int, loss: float, model: Any, config: dict[str, Any], **kwargs: Any) -> None:
            losses.append(float(loss))
            encode()

    encode()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=f"{folder}/model",
            learning_rate=LEARNING_RATE,
            max_steps=STEPS,
            num_train_epochs=STEPS,
            weight_decay=WEIGHT_DECAY,
            adam_epsilon=ADAM_EPSILON,
            optim=optimizer,
            gradiend_batch_size=loader.batch_size,
            do_eval=False,
            save_only_best=False,
            seed=0,
        )
        core_train(model, loader, training_args=arguments, callbacks=[Recorder()])
    return {
        f"{prefix}.losses": torch.tensor(losses, dtype=torch.float64),
        f"{prefix}.encodings": torch.stack(encodings),
        **weights(model.gradiend, f"{prefix}.final"),
    }


def weights(gradiend: Any, prefix: str) -> Tensors:
    """Return copies of the four weight tensors of a GRADIEND."""
    encoder, decoder = gradiend.encoder[0].linear, gradiend.decoder[0].linear
    named = {
        "encoder.weight": encoder.weight,
        "encoder.bias": encoder.bias,
        "decoder.weight": decoder.weight,
        "decoder.bias": decoder.bias,
    }
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in named.items()}


def flat_parameters(model: Any, base: torch.nn.Module) -> torch.Tensor:
    """Return the mapped parameters of `base`, flattened and concatenated in mapping order."""
    named = dict(base.named_parameters())
    return torch.cat([named[name].detach().flatten() for name in model.gradiend.param_map])


def initialisation() -> tuple[Tensors, Values]:
    """Fresh GRADIENDs by the reference's initialisation after `torch.manual_seed`, and one forward pass each."""
    tensors: Tensors = {}
    values: Values = {}
    for name, size, latent, seed in (("init.0", 32, 1, 3), ("init.1", 20, 2, 5)):
        torch.manual_seed(seed)
        model = GradiendModel(input_dim=size, latent_dim=latent, device=torch.device("cpu"))
        vector = torch.linspace(-1.0, 2.0, size)
        with torch.no_grad():
            decoded, encoded = model(vector, return_encoded=True)
        tensors |= weights(model, name) | {
            f"{name}.input": vector,
            f"{name}.encoded": encoded,
            f"{name}.decoded": decoded,
        }
        values[name] = {"latent_dim": latent, "n": size, "seed": seed}
    return tensors, values


def importance(model: Any) -> tuple[Tensors, Values]:
    """Importance of every coordinate and top-k selections of the trained model, for each part."""
    tensors: Tensors = {}
    values: Values = {}
    for part in PARTS:
        tensors[f"importance.{part}"] = model.gradiend.get_weight_importance(part=part).detach().clone()
        values[part] = {
            "local_top_0.07": model.gradiend.get_topk_weights(part=part, topk=0.07),
            "local_top_10": model.gradiend.get_topk_weights(part=part, topk=10),
            "base_global_top_10": model.get_topk_weights(part=part, topk=10),
        }
    return tensors, values
