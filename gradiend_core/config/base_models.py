"""Parameters of the base_model stages."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.section import Name, Section, Seed


class BertShape(Section):
    """The shape of a small BERT, under the names of `transformers.BertConfig`."""

    hidden_size: int = Field(128, ge=1, description="width of the residual stream")
    num_hidden_layers: int = Field(2, ge=1, description="transformer layers")
    num_attention_heads: int = Field(2, ge=1, description="attention heads; must divide hidden_size")
    intermediate_size: int = Field(512, ge=1, description="width of the feed-forward layers")
    max_position_embeddings: int = Field(64, ge=4, description="longest input, in tokens")
    hidden_dropout_prob: float = Field(0.0, ge=0, lt=1, description="dropout of layer outputs during training")
    attention_probs_dropout_prob: float = Field(0.0, ge=0, lt=1, description="dropout of attention during training")
    initializer_range: float = Field(0.1, gt=0, description="standard deviation of the initial weights")


class MaskedLMTraining(Section):
    """How the model is trained, under the names of `transformers.TrainingArguments`."""

    max_steps: int = Field(1000, ge=1, description="optimiser steps")
    learning_rate: float = Field(1.0e-3, gt=0, description="peak learning rate")
    per_device_train_batch_size: int = Field(64, ge=1, description="texts per step")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="learning-rate schedule"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="second beta of AdamW")
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of tokens masked")
    seed: Seed = Field(0, description="seed of initialisation, order and masks")


class TrainedBaseModel(Section):
    """A small BERT and its WordPiece tokenizer, trained on a corpus as an ordinary masked language model."""

    corpus: Name = Field(description="the corpus to train on (its train split)")
    vocab_size: int = Field(8000, ge=10, description="entries of the tokenizer, at most")
    model: BertShape = Field(description="shape of the model")
    training: MaskedLMTraining = Field(description="training arguments")
    probe_words: list[str] = Field(
        [], description="words whose masked-prediction accuracy on the test split is reported"
    )


class LocalBaseModel(Section):
    """A model folder that `AutoModelForMaskedLM.from_pretrained` loads."""

    path: str = Field(description="folder with config.json, weights and tokenizer")


class HubBaseModel(Section):
    """A model of the Hugging Face hub."""

    repo_id: str = Field(description="e.g. google-bert/bert-base-uncased")
    revision: str = Field(
        min_length=7, pattern=r"^[0-9a-f]+$", description="commit hash; a branch name would not be reproducible"
    )
