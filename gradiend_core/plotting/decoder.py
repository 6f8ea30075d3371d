"""The decoder figure: what each candidate change does to language modelling and to the classes' probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gradiend_core.plotting import style
from gradiend_core.plotting.style import LineLook


@style.paper_style()
def plot_decoder(
    grid: pd.DataFrame,
    selections: Mapping[str, Mapping[str, Any]],
    *,
    target_classes: tuple[str, str],
    title: str,
    lms_threshold: float = 0.99,
) -> Figure:
    """Language-modelling score and class probabilities against the learning rate, a column per feature factor.

    `grid` has one row per candidate, dataset_class (whose rows are scored) and scored_class (whose words' probability),
    with the columns id ("base": the unmodified model), feature_factor, learning_rate, probability, probability_low,
    probability_high, lms, lms_low and lms_high. `selections` gives per target class the feature_factor, learning_rate
    and fallback of the chosen candidate: a star on its curves and a dashed line, hollow where it is only the fallback
    because no candidate kept `lms_threshold` of the base model's score. Classes without a selection get no mark.
    """
    base, candidates = grid[grid["id"] == "base"], grid[grid["id"] != "base"]
    factors = sorted(candidates["feature_factor"].unique(), reverse=True)
    datasets = style.ordered_classes(grid["dataset_class"], target_classes)
    width = style.SINGLE_COLUMN if len(factors) <= 1 else style.DOUBLE_COLUMN
    figure = Figure(figsize=(width, 1.5 + 1.25 * len(datasets)))
    ratios = [0.9] + [1.0] * len(datasets)
    panels = figure.subplots(len(ratios), len(factors), sharex=True, sharey="row", squeeze=False, height_ratios=ratios)
    chosen = {name: selections[name] for name in target_classes if name in selections}
    looks = style.class_looks(grid["scored_class"], target_classes)
    for column, factor in enumerate(factors):
        of_factor = candidates[candidates["feature_factor"] == factor].sort_values("learning_rate")
        here = {name: choice for name, choice in chosen.items() if choice["feature_factor"] == factor}
        _draw_lms(panels[0, column], of_factor, base, here, looks, lms_threshold)
        for row, dataset in enumerate(datasets, start=1):
            _draw_probabilities(panels[row, column], _of(of_factor, dataset), _of(base, dataset), here, looks)
            panels[row, column].set_title(style.plain(f"rows of {dataset}"), loc="left", pad=3)
        panels[0, column].set_title(f"feature factor {style.signed(float(factor))}", fontweight="bold")
        panels[-1, column].set_xlabel("learning rate")
    for axes, quantity in zip(panels[:, 0], ["LMS"] + ["probability"] * len(datasets), strict=True):
        axes.set_ylabel(quantity)
    panels[0, 0].set_xscale("log")
    style.mark_panels(list(panels.flat))
    figure.align_ylabels()
    scored = style.ordered_classes(grid["scored_class"], target_classes)
    return style.finish(figure, title, _handles(scored, looks, chosen, lms_threshold))


def _of(rows: pd.DataFrame, dataset: str) -> pd.DataFrame:
    return rows[rows["dataset_class"] == dataset]


def _draw_lms(
    axes: Axes,
    candidates: pd.DataFrame,
    base: pd.DataFrame,
    chosen: Mapping[str, Mapping[str, Any]],
    looks: Mapping[str, LineLook],
    threshold: float,
) -> None:
    """The score of each candidate, which its grid rows repeat, with the base model's and the threshold."""
    scores = candidates.drop_duplicates("learning_rate")
    _draw_curve(axes, scores, "lms", LineLook(style.BLACK, "-", "o"))
    for base_lms in base["lms"].unique():
        axes.axhline(base_lms, color=style.GREY, linestyle=":", linewidth=1.0, zorder=1)
        axes.axhline(threshold * base_lms, color=style.GREY, linestyle=(0, (6, 1.5, 1, 1.5)), linewidth=0.8, zorder=1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    for name, choice in chosen.items():
        _mark(axes, scores, "lms", choice, looks[name], list(looks).index(name))


def _draw_probabilities(
    axes: Axes,
    candidates: pd.DataFrame,
    base: pd.DataFrame,
    chosen: Mapping[str, Mapping[str, Any]],
    looks: Mapping[str, LineLook],
) -> None:
    """P(class) on the rows of one dataset class, a curve per scored class, with the base model's."""
    for name, look in looks.items():
        curve = candidates[candidates["scored_class"] == name]
        _draw_curve(axes, curve, "probability", look)
        for level in base.loc[base["scored_class"] == name, "probability"]:
            axes.axhline(level, color=look.color, linestyle=":", linewidth=1.0, zorder=1)
        if name in chosen:
            _mark(axes, curve, "probability", chosen[name], look, list(looks).index(name))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_curve(axes: Axes, rows: pd.DataFrame, column: str, look: LineLook) -> None:
    """A curve over the learning rate in its bootstrap band."""
    rates = rows["learning_rate"].to_numpy()
    low, high = rows[f"{column}_low"].to_numpy(), rows[f"{column}_high"].to_numpy()
    axes.fill_between(rates, low, high, color=look.color, alpha=0.2, linewidth=0)
    axes.plot(
        rates,
        rows[column].to_numpy(),
        color=look.color,
        linestyle=look.linestyle,
        marker=look.marker,
        markersize=2.8,
        markeredgewidth=0,
    )


def _mark(axes: Axes, curve: pd.DataFrame, column: str, choice: Mapping[str, Any], look: LineLook, turn: int) -> None:
    """The selected candidate: a line at its rate and a star on its curve; lines of two classes interleave."""
    rate = float(choice["learning_rate"])
    axes.axvline(rate, color=look.color, linestyle=(4.0 * turn, (4.0, 4.0)), linewidth=0.8, zorder=1)
    at = curve[curve["learning_rate"] == rate]
    if not at.empty:
        axes.plot(at["learning_rate"].to_numpy(), at[column].to_numpy(), zorder=4, clip_on=False, **_star(choice, look))


def _star(choice: Mapping[str, Any], look: LineLook) -> dict[str, Any]:
    return {
        "marker": "*",
        "markersize": 9,
        "linestyle": "none",
        "markeredgewidth": 0.8 if choice["fallback"] else 0.5,
        "markeredgecolor": look.color if choice["fallback"] else "white",
        "markerfacecolor": "white" if choice["fallback"] else look.color,
    }


def _handles(
    scored: Sequence[str], looks: Mapping[str, LineLook], chosen: Mapping[str, Mapping[str, Any]], threshold: float
) -> list[Artist]:
    kept = f"{100 * threshold:g} % of base LMS"
    handles: list[Artist] = [
        Line2D([], [], color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=3.5, label=label)
        for label, look in ((f"P({name})", looks[name]) for name in scored)
    ]
    handles += [
        Line2D([], [], color=style.GREY, linestyle=":", linewidth=1.0, label="base model"),
        Line2D([], [], color=style.GREY, linestyle=(0, (6, 1.5, 1, 1.5)), linewidth=0.8, label=kept),
        Patch(facecolor=style.GREY, alpha=0.3, label="bootstrap interval"),
    ]
    for name, choice in chosen.items():
        label = f"selected for {name}: rate {float(choice['learning_rate']):g}"
        if choice["fallback"]:
            label += f"\n(fallback: none kept {kept})"
        handles.append(Line2D([], [], label=label, **_star(choice, looks[name])))
    return handles
