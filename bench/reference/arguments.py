"""The names of the reference package's arguments, class by class."""

from __future__ import annotations

from dataclasses import fields

from gradiend import PostPruneConfig, PrePruneConfig, TrainingArguments
from gradiend.trainer.core.lr_search import LRSearchConfig

CLASSES = (TrainingArguments, PrePruneConfig, PostPruneConfig, LRSearchConfig)


def arguments() -> dict[str, list[str]]:
    """For each class its fields, in their order."""
    return {kind.__name__: [field.name for field in fields(kind)] for kind in CLASSES}
