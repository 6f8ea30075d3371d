"""Try decoded updates on the base model and choose one per target class (semantics, section 8)."""

import logging
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gradiend_core.config.evaluate_decoder import EvaluateDecoder
from gradiend_core.data.tables import NEUTRAL_DATASET
from gradiend_core.errors import GradiendError
from gradiend_core.evaluation.scoring import ClassScorer, LanguageModelScorer
from gradiend_core.evaluation.tables import BASE_ID, GRID
from gradiend_core.lm.folder import max_tokens
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.model.rewriting import rewritten
from gradiend_core.progress import track
from gradiend_core.statistics import ratio_interval

logger = logging.getLogger(__name__)


def evaluate_grid(
    gradiend: GradiendModel,
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    training: pd.DataFrame,
    neutral: pd.DataFrame,
    params: EvaluateDecoder,
) -> pd.DataFrame:
    """The grid table (`GRID`): the base model and every candidate (φ, η), scored on the same rows.

    Updates are added to the weights in place and undone exactly (WEAK-02).
    """
    rows = _test_rows(training, gradiend.target_classes, params)
    words = class_words(training, gradiend.target_classes)
    length = max_tokens(base_model, tokenizer)
    classes = ClassScorer.prepare(tokenizer, list(rows["masked"]), words, max_length=length)
    texts = _neutral_texts(neutral, params)
    language = LanguageModelScorer.prepare(
        tokenizer, texts, mlm_probability=params.mlm_probability, seed=params.seed, max_length=length
    )
    logger.info(
        "%d candidates on %d rows and %d neutral texts",
        len(params.lrs) * len(params.feature_factors),
        len(rows),
        len(texts),
    )

    def score() -> pd.DataFrame:
        probabilities = classes.probabilities(base_model, params.eval_batch_size)
        correct, masked = language.correct(base_model, params.eval_batch_size)
        return _summarise(rows, probabilities, correct, masked, params)

    parts = [score().assign(id=BASE_ID, feature_factor=np.nan, learning_rate=np.nan)]
    for factor, rate in track(list(product(params.feature_factors, params.lrs)), "decoder grid"):
        with rewritten(base_model, gradiend, learning_rate=rate, feature_factor=factor):
            parts.append(score().assign(id=f"{factor:+g}, {rate:g}", feature_factor=factor, learning_rate=rate))
    return pd.concat(parts, ignore_index=True)[list(GRID)]


def class_words(training: pd.DataFrame, target_classes: tuple[str, str]) -> dict[str, list[str]]:
    """The words of each target class as the data has them, in lower case unless the data never does, sorted."""
    words = {}
    for name in target_classes:
        seen = set(training.loc[training["factual_class"] == name, "factual"])
        words[name] = sorted({word.lower() if word.lower() in seen else word for word in seen})
    return words


def select_candidates(grid: pd.DataFrame, gradiend: GradiendModel, lms_ratio: float) -> dict[str, Any]:
    """Per target class the candidate that makes it most likely on the other class' rows.

    Among the candidates whose φ strengthens the class and whose LMS is at least `lms_ratio` times the base's, the
    largest probability wins, the earlier of equal ones. If none qualifies, the smallest rate is taken and flagged
    as `fallback` (WEAK-07).
    """
    first, second = gradiend.target_classes
    return {
        target: _select(grid, target, other, gradiend.strengthening_factor(target), lms_ratio)
        for target, other in ((first, second), (second, first))
    }


def _select(grid: pd.DataFrame, target: str, other: str, factor: float, lms_ratio: float) -> dict[str, Any]:
    scored = grid[(grid["dataset_class"] == other) & (grid["scored_class"] == target)]
    base = scored[scored["id"] == BASE_ID].iloc[0]
    candidates = scored[scored["feature_factor"] * factor > 0]
    if candidates.empty:
        raise GradiendError(
            f"evaluate_decoder.feature_factors: none has the sign of {factor:+g}, which strengthens {target!r}"
        )
    qualified = candidates[candidates["lms"] >= lms_ratio * base["lms"]]
    fallback = qualified.empty
    if fallback:
        chosen = candidates.iloc[int(candidates["learning_rate"].argmin())]
        logger.warning("%s: no candidate keeps %g of the LMS; the smallest rate is taken", target, lms_ratio)
    else:
        chosen = qualified.iloc[int(qualified["probability"].argmax())]
    return {
        "id": chosen["id"],
        "feature_factor": float(chosen["feature_factor"]),
        "learning_rate": float(chosen["learning_rate"]),
        "value": float(chosen["probability"]),
        "value_low": float(chosen["probability_low"]),
        "value_high": float(chosen["probability_high"]),
        "base_value": float(base["probability"]),
        "lms": float(chosen["lms"]),
        "lms_low": float(chosen["lms_low"]),
        "lms_high": float(chosen["lms_high"]),
        "base_lms": float(base["lms"]),
        "fallback": bool(fallback),
        "strengthen": True,
    }


def _test_rows(training: pd.DataFrame, target_classes: tuple[str, str], params: EvaluateDecoder) -> pd.DataFrame:
    """Templates of the split with their factual class, each once, capped per class."""
    chosen = training[(training["split"] == params.split) & training["factual_class"].isin(target_classes)]
    chosen = chosen.drop_duplicates(["masked", "factual_class"])[["masked", "factual_class"]]
    if params.max_size_training_like is None:
        return chosen.reset_index(drop=True)
    parts = [_sample(group, params.max_size_training_like, params.seed) for _, group in chosen.groupby("factual_class")]
    return pd.concat(parts, ignore_index=True)


def _neutral_texts(neutral: pd.DataFrame, params: EvaluateDecoder) -> list[str]:
    """Neutral texts of the split (of every split when it has none), capped."""
    texts = neutral[neutral["type"] == NEUTRAL_DATASET].drop_duplicates("text")
    texts = texts[texts["split"] == params.split] if (texts["split"] == params.split).any() else texts
    if texts.empty:
        raise GradiendError("the dataset has no neutral text, so that no LMS can be computed; raise neutral_max_size")
    if params.max_size_neutral is not None:
        texts = _sample(texts, params.max_size_neutral, params.seed)
    return list(texts["text"])


def _sample(frame: pd.DataFrame, size: int, seed: int) -> pd.DataFrame:
    order = np.random.default_rng(seed).permutation(len(frame))[:size]
    return frame.iloc[np.sort(order)]


def _summarise(
    rows: pd.DataFrame,
    probabilities: Mapping[str, NDArray[np.float64]],
    correct: NDArray[np.float64],
    masked: NDArray[np.float64],
    params: EvaluateDecoder,
) -> pd.DataFrame:
    """One line per (dataset class, scored class) with means and their intervals."""
    bootstrap: dict[str, Any] = {
        "samples": params.bootstrap_samples,
        "confidence": params.confidence,
        "seed": params.seed,
    }
    lms = dict(zip(("lms", "lms_low", "lms_high"), ratio_interval(correct, masked, **bootstrap), strict=True))
    lines = []
    for dataset_class, group in rows.groupby("factual_class", sort=True):
        for scored_class, values in probabilities.items():
            inside = values[group.index.to_numpy()]
            names = ("probability", "probability_low", "probability_high")
            interval = dict(zip(names, ratio_interval(inside, np.ones_like(inside), **bootstrap), strict=True))
            lines.append({"dataset_class": dataset_class, "scored_class": scored_class} | interval | lms)
    return pd.DataFrame(lines)
