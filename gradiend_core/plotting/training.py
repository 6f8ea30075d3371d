"""The training figure: loss, learning rate, validation correlation and class means over the steps of every seed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator

from gradiend_core.plotting import style
from gradiend_core.plotting.style import LineLook

# Four colours, none of a class, and three line styles have no common factor: twelve seeds before a look comes back.
_COLORS = (style.GREEN, style.PURPLE, style.ORANGE, style.SKY)
_LINES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0.0, (4.0, 1.2)),
    (0.0, (1.2, 1.0)),
    (0.0, (5.0, 1.2, 1.2, 1.2)),
)
_STRONG, _THIN = 1.6, 0.8
_BAND = 0.18  # how opaque the bands of a standard deviation are


@style.paper_style()
def plot_training(
    histories: Mapping[int, pd.DataFrame],
    best_steps: Mapping[int, int],
    *,
    selected_seed: int,
    converged: Mapping[int, bool],
    stopped_steps: Mapping[int, int],
    target_classes: tuple[str, str],
    title: str,
    class_mean_threshold: float = 0.5,
) -> Figure:
    """Training loss, learning rate, validation correlation and mean encodings against the step, for every seed.

    Each history has the columns step, loss, correlation, mean_positive (the mean encoding of the rows with label +1,
    `target_classes[0]`), mean_negative and, where there are such, mean_neutral, learning_rate (its panel is drawn only
    then), std_positive and std_negative: one row per evaluation; missing values are left out. The selected seed is
    drawn strong, with a line at its best step and bands of one standard deviation about its class means; every seed's
    best step has a marker. The dotted lines of the class means are the convergence criterion, ± `class_mean_threshold`.
    Seeds in `stopped_steps` diverged at that step: a cross on the step axis says so instead, and the axes have room
    for the others.
    """
    with_rate = _has(histories, "learning_rate")
    ratios = (1.0, 0.55, 1.0, 1.35) if with_rate else (1.0, 1.0, 1.35)
    figure = Figure(figsize=(style.SINGLE_COLUMN, 1.22 * sum(ratios)))
    loss, *rate, correlation, means = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    seeds = [seed for seed in sorted(histories) if seed != selected_seed] + [selected_seed]  # the selected on top
    looks = _seed_looks(sorted(histories), selected_seed)
    for seed in seeds:
        history, strong = histories[seed].sort_values("step"), seed == selected_seed
        best_step = None if seed in stopped_steps else best_steps[seed]
        _draw(loss, history, "loss", best_step, looks[seed], strong)
        for axes in rate:
            _draw(axes, history, "learning_rate", best_step, looks[seed], strong)
        _draw(correlation, history, "correlation", best_step, looks[seed], strong)
        _draw_means(means, history, best_step, looks[seed], strong, target_classes)
    panels = (loss, *rate, correlation, means)
    for axes in panels:
        axes.axvline(best_steps[selected_seed], color=style.BLACK, linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)
        for seed, step in stopped_steps.items():
            _draw_stop(axes, step, looks[seed])
    finished = {seed: history for seed, history in histories.items() if seed not in stopped_steps}
    _scale_loss(loss, finished)
    for axes in rate:
        _scale_rate(axes, histories)
    _scale_correlation(correlation, histories)
    _scale_means(means, finished, selected_seed, class_mean_threshold)
    style.mark_panels(panels)
    figure.align_ylabels()
    notes = {seed: "not converged" for seed in histories if not converged[seed]}
    notes |= {seed: f"diverged at step {step}" for seed, step in stopped_steps.items()}
    notes |= {selected_seed: ", ".join(filter(None, ["selected", notes.get(selected_seed)]))}
    seed_handles: list[Artist] = [
        _seed_handle(seed, looks[seed], seed == selected_seed, notes.get(seed), seed in stopped_steps)
        for seed in sorted(histories)
    ]
    mean_handles = _mean_handles(histories, selected_seed, target_classes, class_mean_threshold)
    return style.finish(figure, title, seed_handles + mean_handles)


def training_curves(histories: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """The histories of all seeds below each other, with the column `seed` in front."""
    return pd.concat([history.assign(seed=seed) for seed, history in histories.items()]).set_index("seed").reset_index()


def _has(histories: Mapping[int, pd.DataFrame], column: str) -> bool:
    """Whether any history has a value of a column that not every training writes."""
    return any(column in history and history[column].notna().any() for history in histories.values())


def _seed_looks(seeds: list[int], selected_seed: int) -> dict[int, LineLook]:
    looks = {selected_seed: LineLook(style.BLACK, "-", "o")}
    for i, seed in enumerate(seed for seed in seeds if seed != selected_seed):
        looks[seed] = LineLook(_COLORS[i % len(_COLORS)], _LINES[i % len(_LINES)], "o")
    return looks


def _draw(axes: Axes, history: pd.DataFrame, column: str, best_step: int | None, look: LineLook, strong: bool) -> None:
    """One curve and, where the best step has a value, its marker."""
    points = history.reindex(columns=["step", column]).dropna()
    axes.plot(
        points["step"].to_numpy(),
        points[column].to_numpy(),
        color=look.color,
        linestyle=look.linestyle,
        linewidth=_STRONG if strong else _THIN,
    )
    best = points[points["step"] == best_step]
    if best.empty:  # the loss of step 0, say; an empty unclipped line would still claim room in the layout
        return
    axes.plot(
        best["step"].to_numpy(),
        best[column].to_numpy(),
        color=look.color,
        marker=look.marker,
        linestyle="none",
        markersize=5.0 if strong else 3.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        zorder=3,
        clip_on=False,
    )


def _draw_stop(axes: Axes, step: int, look: LineLook) -> None:
    """A cross on the step axis."""
    place = axes.get_xaxis_transform()
    axes.plot([step], [0], color=look.color, marker="x", markersize=4, clip_on=False, transform=place)


def _draw_means(
    axes: Axes,
    history: pd.DataFrame,
    best_step: int | None,
    look: LineLook,
    strong: bool,
    target_classes: tuple[str, str],
) -> None:
    """The neutral mean thin and grey, the two class means in their colours, all in the seed's line style.

    Bands of the selected seed alone: those of several lie on each other.
    """
    if "mean_neutral" in history:
        points = history[["step", "mean_neutral"]].dropna()
        axes.plot(
            points["step"].to_numpy(),
            points["mean_neutral"].to_numpy(),
            color=style.GREY,
            linestyle=look.linestyle,
            linewidth=0.6,
        )
    classes = style.class_looks(target_classes, target_classes)
    for name, side in zip(target_classes, ("positive", "negative"), strict=True):
        of_class = LineLook(classes[name].color, look.linestyle, classes[name].marker)
        _draw(axes, history, f"mean_{side}", best_step, of_class, strong)
        if strong and f"std_{side}" in history:
            points = history[["step", f"mean_{side}", f"std_{side}"]].dropna()
            step, mean, spread = (points[column].to_numpy() for column in points)
            axes.fill_between(step, mean - spread, mean + spread, color=of_class.color, alpha=_BAND, linewidth=0)


def _values(histories: Mapping[int, pd.DataFrame], column: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    parts = [histories[seed][column] for seed in sorted(histories) if column in histories[seed]]
    return np.concatenate([part.dropna().to_numpy(np.float64) for part in parts])


def _scale_loss(axes: Axes, histories: Mapping[int, pd.DataFrame]) -> None:
    """Room for these losses: a logarithmic axis if they span more than a decade, with labels at 2 and 5 below two."""
    axes.set_ylabel("training loss")
    losses = _values(histories, "loss")
    if losses.size:
        axes.dataLim.intervaly = losses.min(), losses.max()
        axes.autoscale_view()
    if losses.size and losses.min() > 0 and losses.max() > 10 * losses.min():
        axes.set_yscale("log")
        if losses.max() < 100 * losses.min():
            axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain_number))


def _plain_number(value: float, _: int | None) -> str:
    return f"{value:g}"


def _scale_correlation(axes: Axes, histories: Mapping[int, pd.DataFrame]) -> None:
    axes.set_ylabel("validation\ncorrelation")
    lowest = min(0.0, *_values(histories, "correlation"))
    axes.set_ylim(-1.05 if lowest < -0.5 else lowest - 0.05, 1.05)


def _scale_rate(axes: Axes, histories: Mapping[int, pd.DataFrame]) -> None:
    axes.set_ylabel("learning\nrate")
    axes.set_ylim(0, 1.12 * max(_values(histories, "learning_rate")))


def _scale_means(axes: Axes, histories: Mapping[int, pd.DataFrame], selected_seed: int, threshold: float) -> None:
    """From -1 to 1, where tanh lies, or further where an encoder without bounds, or a band, goes further."""
    axes.set_xlabel("step")
    axes.set_ylabel("mean encoding")
    ends = [1.0, threshold]
    for side in ("positive", "negative"):
        ends += abs(_values(histories, f"mean_{side}")).tolist()
        selected = histories[selected_seed]
        if f"std_{side}" in selected:
            ends += (selected[f"mean_{side}"].abs() + selected[f"std_{side}"]).dropna().tolist()
    furthest = 1.08 * max(ends)
    axes.set_ylim(-furthest, furthest)
    for level in (threshold, -threshold):
        axes.axhline(level, color=style.BLACK, linestyle=":", linewidth=0.7, zorder=1)


def _seed_handle(seed: int, look: LineLook, selected: bool, note: str | None, stopped: bool) -> Line2D:
    label = f"seed {seed} ({note})" if note else f"seed {seed}"
    width = _STRONG if selected else _THIN
    handle = Line2D([], [], color=look.color, linestyle=look.linestyle, linewidth=width, label=label)
    if stopped:
        handle.set(marker="x", markersize=4)
    return handle


def _mean_handles(
    histories: Mapping[int, pd.DataFrame], selected_seed: int, target_classes: tuple[str, str], threshold: float
) -> list[Artist]:
    looks = style.class_looks(target_classes, target_classes)
    handles: list[Artist] = [
        Line2D([], [], color=looks[name].color, marker=looks[name].marker, markersize=4, label=f"mean of {name}")
        for name in target_classes
    ]
    if _has({selected_seed: histories[selected_seed]}, "std_positive"):
        handles.append(Patch(facecolor=style.GREY, alpha=2 * _BAND, label="± std. dev."))
    if _has(histories, "mean_neutral"):
        handles.append(Line2D([], [], color=style.GREY, linewidth=0.6, label="mean of neutral"))
    best = Line2D([], [], color=style.GREY, marker="o", markersize=4, linestyle="none", label="best step")
    criterion = Line2D([], [], color=style.BLACK, linestyle=":", linewidth=0.7, label=f"criterion ±{threshold:g}")
    return [*handles, best, criterion]
