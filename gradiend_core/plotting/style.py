"""What every figure shares: sizes, colours, text, legends, and files whose bytes depend on the data alone.

Figures are plain `matplotlib.figure.Figure` objects; neither pyplot nor a display is involved. Colours are those of
Okabe and Ito (Color Universal Design, 2008), and nothing is told apart by colour alone.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath

from gradiend_core.errors import GradiendError

SINGLE_COLUMN = 3.5
"""Width of a single-column figure, in inches."""
DOUBLE_COLUMN = 7.0
"""Width of a double-column figure, in inches."""
FONT_SIZE = 7.0
"""Smallest text, in points."""

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#767676"

_TITLE_SIZE = 8.0
_LINE_HEIGHT = 0.155  # inches per legend or title line at these sizes
_HANDLE_WIDTH = (2.4 + 0.8 + 1.2) * FONT_SIZE / 72  # inches: the legend's handle, its pad and the column spacing
_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "figure.titlesize": _TITLE_SIZE,
    "figure.titleweight": "bold",
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.0,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.3,
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class LineLook:
    """How a series is drawn: colour, line style and marker together, so that any one of them suffices."""

    color: str
    linestyle: Literal["-"] | tuple[float, tuple[float, ...]]
    marker: str


_CLASS_LOOKS = (
    LineLook(BLUE, "-", "^"),
    LineLook(VERMILLION, (0.0, (4.0, 1.2)), "v"),
    LineLook(GREEN, (0.0, (5.0, 1.2, 1.2, 1.2)), "s"),
    LineLook(PURPLE, (0.0, (2.0, 1.0)), "D"),
    LineLook(ORANGE, (0.0, (6.0, 1.0, 1.0, 1.0, 1.0, 1.0)), "o"),
)


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib's defaults plus ours, whatever the user's matplotlibrc says; restored on exit. Also a decorator."""
    with matplotlib.style.context(["default", _RC]):
        yield


def ordered_classes(names: Iterable[str], target_classes: tuple[str, str]) -> list[str]:
    """The distinct `names`: the target classes first, in their order, then the others sorted."""
    present = set(names)
    return [c for c in target_classes if c in present] + sorted(present - set(target_classes))


def class_looks(names: Iterable[str], target_classes: tuple[str, str]) -> dict[str, LineLook]:
    """A look per class: the target classes always get the first two, the other `names` the next ones in turn."""
    others = [name for name in ordered_classes(names, target_classes) if name not in target_classes]
    return {name: _CLASS_LOOKS[i % len(_CLASS_LOOKS)] for i, name in enumerate([*target_classes, *others])}


def plain(text: str) -> str:
    """`text` for matplotlib to show as it is: dollar signs would start mathematics."""
    return text.replace("$", r"\$")


def signed(value: float) -> str:
    """`value` with its sign, and a minus of the width of a plus."""
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}")


def text_width(text: str) -> float:
    """How wide the widest line of `text` is at the figures' font size, in inches; call it inside `paper_style`."""
    lines = [line for line in text.splitlines() if line.strip()]
    return max((_outline_width(line) for line in lines), default=0.0) / 72


def _outline_width(line: str) -> float:
    return float(TextPath((0, 0), plain(line), size=FONT_SIZE).vertices[:, 0].max())


def mark_panels(panels: Sequence[Axes]) -> None:
    """Horizontal grid lines, faint and below the data."""
    for axes in panels:
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.5)


def finish(figure: Figure, title: str, handles: Sequence[Artist]) -> Figure:
    """Add the title above and a legend of `handles` below, grow the figure to hold them, and fix the layout.

    The layout is computed once, here: solving it again on every save would move things by fractions of a pixel.
    """
    width, height = figure.get_size_inches()
    heading = textwrap.wrap(title, width=int(14 * width))  # some 14 bold letters per inch
    columns, rows = _legend_shape([str(handle.get_label()) for handle in handles], 0.97 * width)
    figure.set_size_inches(width, height + _LINE_HEIGHT * (len(heading) + rows))
    figure.suptitle(plain("\n".join(heading)))
    if handles:
        labels = [plain(str(handle.get_label())) for handle in handles]
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    ConstrainedLayoutEngine().execute(figure)
    return figure


def save_figure(figure: Figure, path: Path, *, dpi: int = 300) -> None:
    """Write `figure` to `path` as PNG (at `dpi`) or PDF (fonts embedded), by suffix; equal figures give equal bytes.

    Raises `GradiendError` for any other suffix.
    """
    metadata: dict[str, dict[str, Any]] = {
        ".png": {"Software": "gradiend_core"},
        ".pdf": {"Creator": "gradiend_core", "Producer": "matplotlib", "CreationDate": None},
    }
    if path.suffix not in metadata:
        raise GradiendError(f"{path}: cannot save a figure as {path.suffix!r}. Allowed are .png and .pdf; rename it.")
    with paper_style():
        figure.savefig(path, format=path.suffix[1:], dpi=dpi, metadata=metadata[path.suffix])


def _legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    """The most columns, up to four, that fit into `width` inches, and the lines of text of the tallest one."""
    sizes = [(text_width(label) + _HANDLE_WIDTH, 1 + label.count("\n")) for label in labels]
    for columns in range(min(len(labels), 4), 0, -1):
        parts = np.array_split(np.array(sizes), columns)  # as the legend does
        if columns == 1 or sum(part[:, 0].max() for part in parts) <= width:
            return columns, max(int(part[:, 1].sum()) for part in parts)
    return 1, 0
