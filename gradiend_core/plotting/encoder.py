"""The encoder figure: how the encodings of the two classes and of neutral text are distributed in each split."""

import math
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.mlab import GaussianKDE
from matplotlib.ticker import MultipleLocator

from gradiend_core.errors import GradiendError
from gradiend_core.plotting import style

_MOST_POINTS = 200  # beyond this, single rows are a blot and the outline says more
_FEWEST_FOR_OUTLINE = 5  # distinct values; a density of fewer is an invention
_HALF_WIDTH = 0.4
_GOLDEN = (5**0.5 - 1) / 2
_TILT = 40  # degrees, of names too long to stand side by side

_Array = np.ndarray[tuple[int], np.dtype[np.float64]]


class _Group(NamedTuple):
    """One distribution: its name, its colour and its values."""

    name: str
    color: str
    values: _Array


@style.paper_style()
def plot_encodings(encodings: pd.DataFrame, *, target_classes: tuple[str, str], title: str) -> Figure:
    """The distribution of `encoded`: a panel per split; per panel the two classes, then the neutral rows.

    `encodings` has the columns type, split, label and encoded. A training row belongs to the class whose gradient the
    encoder sees: `target_classes[0]` for a positive label, `target_classes[1]` for a negative one. Neutral words are
    other words of training sentences, neutral text is sentences of its own. Every group shows its density, cut at its
    extremes (a bar per value where fewer than five differ), its quartiles (bar), its median (line) and, up to 200,
    every row. The number of rows stands above. Raises `GradiendError` when there is no row with an encoding.
    """
    rows = encodings.dropna(subset=["encoded"])
    panels = {split: _groups(rows[_split_names(rows) == split], target_classes) for split in _splits(rows)}
    if not panels:
        raise GradiendError("encodings: no row to plot. Evaluate the encoder on a split that has rows.")
    counts = [len(groups) for groups in panels.values()]
    width = style.SINGLE_COLUMN if sum(counts) <= 5 else style.DOUBLE_COLUMN
    slot = 0.88 * width / (sum(counts) + 0.5 * len(counts))
    names = {group.name: _broken(group.name, slot) for groups in panels.values() for group in groups}
    tilted = max(style.text_width(name) for name in names.values()) > slot
    extra = max(style.text_width(name) for name in names) * math.sin(math.radians(_TILT)) if tilted else 0.0
    figure = Figure(figsize=(width, 2.6 + extra))
    grid = figure.subplots(1, len(counts), sharey=True, squeeze=False, width_ratios=counts)
    for axes, (split, groups) in zip(grid[0], panels.items(), strict=True):
        _draw_panel(axes, groups)
        _name_groups(axes, [group.name if tilted else names[group.name] for group in groups], tilted)
        axes.set_title(style.plain(split), pad=14, fontweight="bold")
    grid[0][0].set_ylabel("encoding")
    grid[0][0].set_ylim(-1.08, 1.08)
    grid[0][0].yaxis.set_major_locator(MultipleLocator(0.5))
    grid[0][0].annotate(
        "n =", (0, 1), (-3, 4), xycoords="axes fraction", textcoords="offset points", ha="right", color=style.GREY
    )
    style.mark_panels(list(grid[0]))
    return style.finish(figure, title, [])


def _split_names(rows: pd.DataFrame) -> "pd.Series[str]":
    """The split of every row; rows that belong to none (neutral text) are named so."""
    return rows["split"].fillna("no split").astype(str)


def _splits(rows: pd.DataFrame) -> list[str]:
    present = set(_split_names(rows))
    usual = [split for split in ("train", "validation", "test") if split in present]
    return usual + sorted(present - set(usual))


def _groups(rows: pd.DataFrame, target_classes: tuple[str, str]) -> list[_Group]:
    """The groups of one split that have rows, in the order they are drawn."""
    training = rows["type"] == "training"
    looks = style.class_looks(target_classes, target_classes)
    members = [
        (target_classes[0], looks[target_classes[0]].color, training & (rows["label"] > 0)),
        (target_classes[1], looks[target_classes[1]].color, training & (rows["label"] < 0)),
        ("label 0", style.PURPLE, training & (rows["label"] == 0)),
        ("neutral words", style.GREEN, rows["type"] == "neutral_training_masked"),
        ("neutral text", style.GREY, rows["type"] == "neutral_dataset"),
    ]
    encoded = rows["encoded"]
    return [_Group(name, color, encoded[of].to_numpy(np.float64)) for name, color, of in members if of.any()]


def _draw_panel(axes: Axes, groups: list[_Group]) -> None:
    """The groups of one split side by side, the number of rows above each."""
    axes.axhline(0, color=style.BLACK, linewidth=0.6, zorder=1)
    for position, group in enumerate(groups):
        _draw_group(axes, position, group)
        n = len(group.values)
        axes.annotate(
            f"{n}" if n < 100_000 else f"{n / 1000:.0f}k",
            (position, 1),
            (0, 4),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            color=style.GREY,
        )
    axes.set_xlim(-0.6, len(groups) - 0.4)


def _name_groups(axes: Axes, names: list[str], tilted: bool) -> None:
    axes.set_xticks(range(len(names)), [style.plain(name) for name in names])
    axes.tick_params(axis="x", length=0)
    if tilted:
        for label in axes.get_xticklabels():
            label.set(rotation=_TILT, ha="right", rotation_mode="anchor")


def _broken(name: str, width: float) -> str:
    """`name` on as few lines of `width` inches as breaks after spaces, underscores and hyphens allow."""
    lines = [""]
    for part in re.findall(r"[^ _-]*[ _-]*", name):
        if lines[-1] and style.text_width(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip(" ") for line in lines)


def _draw_group(axes: Axes, position: int, group: _Group) -> None:
    """Outline, rows, quartiles and median of one group around x = `position`."""
    values = np.sort(group.values)
    distinct = np.unique(values)
    if distinct.size < _FEWEST_FOR_OUTLINE:
        axes.hlines(
            distinct, position - _HALF_WIDTH, position + _HALF_WIDTH, color=group.color, alpha=0.35, linewidth=3
        )
    else:
        levels = np.linspace(values[0], values[-1], 200)
        density = np.asarray(GaussianKDE(values).evaluate(levels))
        reach = _HALF_WIDTH * density / density.max()
        axes.fill_betweenx(
            levels, position - reach, position + reach, facecolor=group.color, edgecolor=group.color, alpha=0.35, lw=0.6
        )
    if values.size <= _MOST_POINTS:
        # Multiples of the golden ratio spread evenly without a random generator.
        jitter = ((np.arange(values.size) * _GOLDEN) % 1 - 0.5) * _HALF_WIDTH
        axes.scatter(position + jitter, values, s=2.5, color=group.color, linewidths=0, alpha=0.7, zorder=2)
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    axes.plot([position, position], [low, high], color=style.BLACK, linewidth=2.2, solid_capstyle="butt", zorder=3)
    axes.plot([position - 0.22, position + 0.22], [middle, middle], color=style.BLACK, linewidth=1.1, zorder=3)
