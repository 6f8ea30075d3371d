"""The figures show the data they were given, survive odd data, and are saved with bytes that depend on it alone."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from dvc.render.match import match_defs_renderers
from dvc.repo import Repo
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradiend_core.errors import GradiendError
from gradiend_core.plotting import style
from gradiend_core.plotting.decoder import plot_decoder
from gradiend_core.plotting.encoder import plot_encodings
from gradiend_core.plotting.training import plot_training, training_curves
from gradiend_core.training.tables import HISTORY

ROOT = Path(__file__).parents[2]

CLASSES = ("masc_nom", "3PL")
ODD = ("_a$b$c", "$x_y")


def history(rate: float = 0.05, neutral: bool = True) -> pd.DataFrame:
    step = np.arange(0, 101, 20)
    gain = 1 - np.exp(-rate * step)
    return pd.DataFrame(
        {
            "step": step,
            "loss": np.where(step == 0, np.nan, np.exp(-rate * step)),
            "correlation": gain,
            "r2": gain,
            "mean_positive": gain,
            "mean_negative": -gain + 0.05,
            "mean_neutral": 0.1 * gain if neutral else np.nan,
        }
    )


def training_figure(
    histories: dict[int, pd.DataFrame] | None = None,
    classes: tuple[str, str] = CLASSES,
    stopped_steps: dict[int, int] | None = None,
) -> Figure:
    histories = histories or {0: history(), 1: history(0.08), 2: history(0.002)}
    return plot_training(
        histories,
        {seed: 60 + 20 * (seed % 3) for seed in histories},
        selected_seed=1 if 1 in histories else 0,
        converged={seed: seed != 2 for seed in histories},
        stopped_steps=stopped_steps or {},
        target_classes=classes,
        title="a run",
    )


def encodings(neutral: bool = True, per_group: int = 9) -> pd.DataFrame:
    rows = [
        {"type": kind, "split": split, "label": label, "encoded": (0.8 + 0.2 * i / per_group) * label + 0.01 * i}
        for split in ("test", "train")
        for kind, label in (
            ("training", 1.0),
            ("training", -1.0),
            *((("neutral_training_masked", 0.0), ("neutral_dataset", 0.0)) if neutral else ()),
        )
        for i in range(per_group)
    ]
    return pd.DataFrame(rows)


def grid(classes: tuple[str, str] = CLASSES) -> pd.DataFrame:
    rows = []
    candidates = [("base", np.nan, np.nan)] + [(f"{f}/{r}", f, r) for r in (1.0, 0.1, 0.01) for f in (-1.0, 1.0)]
    for number, (name, factor, rate) in enumerate(candidates):
        for i, dataset in enumerate(classes):
            for j, scored in enumerate(classes):
                p, lms = 0.1 + 0.3 * i + 0.2 * j + 0.02 * number, 0.5 - 0.02 * number
                rows.append([name, factor, rate, dataset, scored, p, p - 0.05, p + 0.05, lms, lms - 0.01, lms + 0.01])
    bounds = ["probability", "probability_low", "probability_high", "lms", "lms_low", "lms_high"]
    return pd.DataFrame(
        rows, columns=["id", "feature_factor", "learning_rate", "dataset_class", "scored_class", *bounds]
    )


@functools.cache
def decoder_figure(classes: tuple[str, str] = CLASSES, fallback: bool = False) -> Figure:
    selections = {
        classes[0]: {"feature_factor": 1.0, "learning_rate": 0.1, "fallback": False},
        classes[1]: {"feature_factor": -1.0, "learning_rate": 0.01, "fallback": fallback},
    }
    return plot_decoder(grid(classes), selections, target_classes=classes, title="a run")


def encoder_figure(classes: tuple[str, str] = CLASSES) -> Figure:
    return plot_encodings(encodings(), target_classes=classes, title="a run")


def data(line: Line2D) -> tuple[list[float], list[float]]:
    """The x and y of every point of a line."""
    return np.asarray(line.get_xdata(), float).tolist(), np.asarray(line.get_ydata(), float).tolist()


def line_with(axes: Axes, x: "pd.Series[float]", y: "pd.Series[float]") -> Line2D:
    """The one line that draws exactly these points."""
    (found,) = [line for line in axes.lines if data(line) == (x.tolist(), y.tolist())]
    return found


def constant_levels(axes: Axes) -> list[float]:
    """The heights of the horizontal lines across an axes."""
    return [data(line)[1][0] for line in axes.lines if data(line)[0] == [0, 1]]


def upright_lines(axes: Axes) -> list[list[float]]:
    """The places of the vertical lines across an axes."""
    return [data(line)[0] for line in axes.lines if data(line)[1] == [0, 1]]


def stars(axes: Axes) -> list[Line2D]:
    return [line for line in axes.lines if line.get_marker() == "*"]


def clouds(axes: Axes) -> list[PathCollection]:
    """The scattered points of an axes, group by group."""
    return [cloud for cloud in axes.collections if isinstance(cloud, PathCollection)]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_training_draws_every_seed_as_given() -> None:
    histories = {0: history(), 1: history(0.08), 2: history(0.002)}
    panels = training_figure(histories).axes
    for seed, table in histories.items():
        for axes, column in ((panels[0], "loss"), (panels[1], "correlation"), (panels[2], "mean_negative")):
            given = table[["step", column]].dropna()
            line = line_with(axes, given["step"], given[column])
            assert (line.get_linewidth() > 1.5) == (seed == 1)
        line_with(panels[2], table["step"], table["mean_neutral"])
    assert {0.5, -0.5} <= set(constant_levels(panels[2]))


def test_training_marks_the_best_step_of_every_seed() -> None:
    histories = {0: history(), 1: history(0.08), 2: history(0.002)}
    panels = training_figure(histories).axes
    for seed, table in histories.items():
        best = table[table["step"] == 60 + 20 * seed]
        x = best["step"]
        assert line_with(panels[1], x, best["correlation"]).get_marker() == "o"
        assert line_with(panels[2], x, best["mean_positive"]).get_marker() == "^"
        assert line_with(panels[2], x, best["mean_negative"]).get_marker() == "v"
    for axes in panels:
        assert upright_lines(axes) == [[80, 80]]


def test_training_legend_names_the_selected_and_the_not_converged() -> None:
    assert legend_texts(training_figure())[:3] == ["seed 0", "seed 1 (selected)", "seed 2 (not converged)"]


def test_training_with_one_seed_and_no_neutral_rows() -> None:
    for table in (history(neutral=False), history().drop(columns="mean_neutral")):
        figure = training_figure({0: table})
        assert legend_texts(figure)[0] == "seed 0 (selected)"
        assert not any("neutral" in text for text in legend_texts(figure))


def detailed(rate: float = 0.05, spread: float = 0.1) -> pd.DataFrame:
    """A history with the columns that not every training writes."""
    table = history(rate)
    rates = np.where(table["step"] == 0, np.nan, 0.01 * (1 - table["step"] / 200))
    return table.assign(learning_rate=rates, std_positive=spread, std_negative=2 * spread)


def bands(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """The lower and upper edge of every band."""
    found = []
    for band in axes.collections:
        corners = np.asarray(band.get_paths()[0].vertices, float)
        steps = sorted(set(corners[:, 0]))
        edges = [corners[corners[:, 0] == step, 1] for step in steps]
        found.append(([float(edge.min()) for edge in edges], [float(edge.max()) for edge in edges]))
    return found


def test_training_draws_the_learning_rate_where_there_is_one() -> None:
    histories = {0: detailed(), 1: history(0.08)}
    panels = training_figure(histories).axes
    assert [axes.get_ylabel().replace("\n", " ") for axes in panels] == [
        "training loss",
        "learning rate",
        "validation correlation",
        "mean encoding",
    ]
    given = histories[0][["step", "learning_rate"]].dropna()
    line_with(panels[1], given["step"], given["learning_rate"])
    assert panels[1].get_ylim()[0] == 0
    assert panels[1].get_ylim()[1] > given["learning_rate"].max()
    assert len(training_figure({0: history().assign(learning_rate=np.nan)}).axes) == 3


def test_training_draws_the_spread_of_the_selected_seed() -> None:
    table = detailed()
    figure = training_figure({0: detailed(0.02), 1: table})
    edges = bands(figure.axes[-1])
    for (low, high), side, spread in zip(edges, ("positive", "negative"), (0.1, 0.2), strict=True):
        assert low == pytest.approx((table[f"mean_{side}"] - spread).tolist())
        assert high == pytest.approx((table[f"mean_{side}"] + spread).tolist())
    assert "± std. dev." in legend_texts(figure)
    figure = training_figure()
    assert not bands(figure.axes[-1])
    assert "± std. dev." not in legend_texts(figure)


def test_axis_of_the_means_holds_encodings_without_bounds_and_bands() -> None:
    assert training_figure().axes[-1].get_ylim() == pytest.approx((-1.08, 1.08))
    wide = history().assign(mean_positive=3.0)
    assert training_figure({0: history(), 1: wide}).axes[-1].get_ylim() == pytest.approx((-3.24, 3.24))
    assert training_figure({0: detailed(spread=2.0)}).axes[-1].get_ylim()[1] > 4.0


@pytest.mark.parametrize("evaluations", [0, 1, 3])
def test_training_marks_where_a_seed_diverged_and_has_room_for_the_others(evaluations: int) -> None:
    wild = detailed().assign(loss=1e9, mean_positive=1e3)[:evaluations]
    others = {0: detailed(), 1: detailed(0.08)}
    calm = training_figure(others)
    figure = training_figure(others | {2: wild}, stopped_steps={2: 50})
    assert legend_texts(figure)[2] == "seed 2 (diverged at step 50)"
    for axes, without in zip(figure.axes, calm.axes, strict=True):
        assert axes.get_ylim() == pytest.approx(without.get_ylim())
        (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert data(cross) == ([50], [0])
    drawn = [data(line)[1] for line in figure.axes[-1].lines]
    assert wild["mean_positive"].tolist() in drawn
    assert not [line for axes in calm.axes for line in axes.lines if line.get_marker() == "x"]


def test_curves_of_all_seeds_are_one_table() -> None:
    histories = {3: history(), 1: history(0.08)[:2]}
    curves = training_curves(histories)
    assert curves.columns.tolist() == ["seed", *history()]
    assert curves["seed"].tolist() == [3] * 6 + [1] * 2
    for seed, table in histories.items():
        own = curves[curves["seed"] == seed].drop(columns="seed").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, table)


@pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # in dvc, of pygtrie
def test_dvc_plots_the_seeds_of_a_run_as_curves_of_one_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True)
    shutil.copytree(ROOT / ".dvc/plots", ".dvc/plots")
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]["plot"]["do"]
    [curves] = [plot for plot in stage["plots"] if isinstance(plot, dict)]
    stages = {"plot": {"foreach": ["one"], "do": {"cmd": "true", "plots": [curves]}}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}).replace("${key}", "${item}"))
    file = Path("artifacts/runs/one/plots/training.csv")
    file.parent.mkdir(parents=True)
    table = pd.DataFrame({name: np.arange(3.0) for name in HISTORY} | {"step": range(3)})
    training_curves({0: table, 7: table[:2]}).to_csv(file, index=False)
    repo = Repo()
    [plot] = match_defs_renderers(repo.plots.show(), templates_dir=repo.plots.templates_dir)
    drawn = plot.renderer.get_filled_template()
    rows = drawn["data"]["values"]
    assert [(row["seed"], row["step"]) for row in rows] == [("0", "0"), ("0", "1"), ("0", "2"), ("7", "0"), ("7", "1")]
    encoding = drawn["spec"]["encoding"]
    assert (encoding["x"]["field"], encoding["color"]["field"], encoding["strokeDash"]["field"]) == (
        "step",
        "seed",
        "rev",
    )
    assert set(drawn["transform"][0]["fold"]) == set(drawn["facet"]["sort"]) <= set(rows[0])


@pytest.mark.parametrize(("largest", "labels"), [(30.0, ["1", "2", "5", "10", "20"]), (3000.0, [])])
def test_loss_axis_has_plain_labels_below_two_decades(largest: float, labels: list[str]) -> None:
    table = history().assign(loss=np.geomspace(largest, 1.0, 6))
    axis = training_figure({0: table}).axes[0].yaxis
    shown = [text.get_text() for text in [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]]
    assert set(labels) <= set(shown)
    assert not labels or not any("times" in text for text in shown)


def test_loss_axis_is_logarithmic_over_a_decade_only() -> None:
    assert training_figure({0: history(0.05)}).axes[0].get_yscale() == "log"
    assert training_figure({0: history(0.002)}).axes[0].get_yscale() == "linear"
    assert training_figure({0: history().assign(loss=0.0)}).axes[0].get_yscale() == "linear"


def test_encoder_draws_every_row_of_a_small_group_and_its_median() -> None:
    table = encodings()
    figure = encoder_figure()
    assert [axes.get_title() for axes in figure.axes] == ["train", "test"]
    kinds = (("training", 1.0), ("training", -1.0), ("neutral_training_masked", 0.0), ("neutral_dataset", 0.0))
    for axes, split in zip(figure.axes, ("train", "test"), strict=True):
        for position, (kind, label) in enumerate(kinds):
            given = table[(table["type"] == kind) & (table["split"] == split) & (table["label"] == label)]["encoded"]
            x, y = np.asarray(clouds(axes)[position].get_offsets()).T
            assert np.array_equal(np.sort(y), np.sort(given))
            assert np.all(abs(x - position) < 0.5)
            assert any(data(line)[1] == [given.median()] * 2 for line in axes.lines)
        assert [text.get_text() for text in axes.texts if text.get_text() != "n ="] == ["9"] * 4
        assert 0.0 in constant_levels(axes)


def test_encoder_names_classes_by_the_sign_of_the_label() -> None:
    axes = encoder_figure().axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert [name.replace("\n", "").replace(" ", "") for name in names[:2]] == list(CLASSES)
    positive, negative = (np.asarray(cloud.get_offsets())[:, 1] for cloud in clouds(axes)[:2])
    assert positive.min() > 0 > negative.max()


def test_encoder_without_neutral_rows_and_with_constant_or_missing_values() -> None:
    table = encodings(neutral=False)
    table.loc[table["split"] == "test", "encoded"] = table["label"]
    table.loc[0, "encoded"] = np.nan
    figure = plot_encodings(table, target_classes=ODD, title="a run")
    counts = [text.get_text() for text in figure.axes[1].texts if text.get_text() != "n ="]
    assert counts == ["8", "9"]


def test_encoder_without_any_encoding_is_refused() -> None:
    with pytest.raises(GradiendError, match="no row"):
        plot_encodings(encodings().assign(encoded=np.nan), target_classes=CLASSES, title="a run")


def test_decoder_draws_the_grid_as_given() -> None:
    table, panels = grid(), np.reshape(np.array(decoder_figure().axes, dtype=object), (3, 2))
    for column, factor in enumerate((1.0, -1.0)):
        of_factor = table[table["feature_factor"] == factor].sort_values("learning_rate")
        scores = of_factor.drop_duplicates("learning_rate")
        line_with(panels[0, column], scores["learning_rate"], scores["lms"])
        assert constant_levels(panels[0, column]) == [0.5, 0.99 * 0.5]
        for row, dataset in enumerate(CLASSES, start=1):
            of_dataset = of_factor[of_factor["dataset_class"] == dataset]
            assert panels[row, column].get_xscale() == "log"
            assert f"rows of {dataset}" == panels[row, column].get_title(loc="left")
            for scored in CLASSES:
                curve = of_dataset[of_dataset["scored_class"] == scored]
                line_with(panels[row, column], curve["learning_rate"], curve["probability"])
            base = table[(table["id"] == "base") & (table["dataset_class"] == dataset)]
            assert sorted(constant_levels(panels[row, column])) == sorted(base["probability"])


def test_decoder_marks_the_selected_candidates() -> None:
    table, panels = grid(), np.reshape(np.array(decoder_figure().axes, dtype=object), (3, 2))
    for column, (name, factor, rate) in enumerate(((CLASSES[0], 1.0, 0.1), (CLASSES[1], -1.0, 0.01))):
        chosen = table[(table["feature_factor"] == factor) & (table["learning_rate"] == rate)]
        for row, dataset in enumerate([None, *CLASSES]):
            (star,) = stars(panels[row, column])
            at = chosen[(chosen["dataset_class"] == dataset) & (chosen["scored_class"] == name)]
            y = chosen["lms"].iloc[0] if dataset is None else at["probability"].item()
            assert data(star) == ([rate], [y])
            assert upright_lines(panels[row, column]) == [[rate, rate]]


def test_decoder_flags_a_fallback() -> None:
    texts = legend_texts(decoder_figure(fallback=True))
    assert [text for text in texts if "fallback" in text] == [
        f"selected for {CLASSES[1]}: rate 0.01\n(fallback: none kept 99 % of base LMS)"
    ]
    assert not any("fallback" in text for text in legend_texts(decoder_figure()))
    panels = decoder_figure(fallback=True).axes
    assert [to_hex(stars(axes)[0].get_markerfacecolor()) == "#ffffff" for axes in panels[:2]] == [False, True]


def test_decoder_with_one_candidate_and_no_selection() -> None:
    table = grid()
    table = table[table["id"].isin(["base", "1.0/0.1"])]
    figure = plot_decoder(table, {}, target_classes=CLASSES, title="a run")
    assert len(figure.axes) == 3
    assert not any(stars(axes) for axes in figure.axes)


def test_special_characters_are_shown_as_they_are() -> None:
    figure = training_figure({0: history()}, ODD)
    assert legend_texts(figure)[1:3] == ["mean of _a\\$b\\$c", "mean of \\$x_y"]
    assert not any(is_math_text(text) for text in legend_texts(figure))
    assert any(text == "P(_a\\$b\\$c)" for text in legend_texts(decoder_figure(ODD)))
    tick_names = [label.get_text() for label in encoder_figure(ODD).axes[0].get_xticklabels()]
    assert [name.replace("\n", "") for name in tick_names[:2]] == ["_a\\$b\\$c", "\\$x_y"]


def test_nothing_leaves_the_page_or_overlaps_the_legend() -> None:
    long = ("a_very_long_name_of_a_class", "another_very_long_name")
    for figure in (training_figure(classes=long), decoder_figure(long, fallback=True)):
        renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
        legend = figure.legends[0].get_window_extent(renderer)
        boxes = [box for axes in figure.axes if (box := axes.get_tightbbox(renderer)) is not None]
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.width
        assert all(legend.y1 <= box.y0 and box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_users_settings_are_neither_used_nor_changed() -> None:
    with matplotlib.rc_context({"font.size": 20.0, "axes.labelsize": 30.0}):
        figure = training_figure({0: history()})
        assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.labelsize"]) == (20.0, 30.0)
    assert figure.axes[0].yaxis.label.get_fontsize() == style.FONT_SIZE


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_equal_figures_have_equal_bytes(tmp_path: Path, suffix: str) -> None:
    first, again, other = (tmp_path / f"{name}{suffix}" for name in ("first", "again", "other"))
    figure = encoder_figure()
    style.save_figure(figure, first)
    style.save_figure(figure, again)
    style.save_figure(encoder_figure(), other)
    assert first.read_bytes() == again.read_bytes() == other.read_bytes()
    assert b"Date" not in first.read_bytes()
    if suffix == ".pdf":
        assert b"/FontFile2" in first.read_bytes()


def test_another_process_saves_the_same_bytes_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import test_plotting as t; figure = t.encoder_figure()\n"
        "for s in ('png', 'pdf'): t.style.save_figure(figure, Path(sys.argv[1], 'there.' + s))\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent), str(here.parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    for suffix in ("png", "pdf"):
        style.save_figure(encoder_figure(), tmp_path / f"here.{suffix}")
        assert (tmp_path / f"here.{suffix}").read_bytes() == (tmp_path / f"there.{suffix}").read_bytes()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GradiendError, match=r"\.png and \.pdf"):
        style.save_figure(Figure(), tmp_path / "figure.svg")
