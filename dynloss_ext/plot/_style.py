"""The colours of all figures, and what they are drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Array = NDArray[Any]

# Okabe and Ito's colours, which colour-blind readers tell apart; ten of them for CIFAR-10, with Tol's wine and indigo.
_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
CLASS_COLOURS = (*_OKABE_ITO, "#999999", "#882255", "#332288")
EIGENVALUE_COLOURS = ("#1b1b1b", *_OKABE_ITO, "#882255", "#332288")
LINE_STYLES = ("-", "--", "-.", ":")  # one after the other where a palette is used up
PERIOD_COLOURS: dict[int | None, str] = {
    1: "#1b1b1b",
    2: "#0072b2",
    4: "#e69f00",
    8: "#009e73",
    16: "#cc79a7",
    None: "#d7191c",
}
OTHER_PERIOD_COLOUR = "#56b4e9"
LINEAR_CHANGE = 1e-3  # changes of F up to it are drawn on a linear scale
START_COLOUR, STOP_COLOUR = "#1a9641", "#d7191c"
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.direction": "out",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 0.8,
    "path.simplify": True,
}


def over_steps(figure: Figure, axes: Array, spans: Sequence[tuple[float, float]], title: str | None) -> Figure:
    """The figure, finished: each column of panels over its span of steps."""
    for column, (first, last) in enumerate(spans):
        axes[-1, column].set_xlim(first, last)
        axes[-1, column].set_xlabel("step")
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    figure.align_ylabels(axes[:, 0])
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def span(step: Any) -> tuple[float, float]:
    """Limits of an axis of steps, which matplotlib wants apart even for a single one."""
    first, last = (float(step[0]), float(step[-1])) if len(step) else (0.0, 1.0)
    return (first, last) if first != last else (first - 0.5, last + 0.5)


def curve_style(palette: Sequence[str], index: int) -> dict[str, Any]:
    turn, place = divmod(index, len(palette))
    return {"color": palette[place], "ls": LINE_STYLES[turn % len(LINE_STYLES)]}


def legend_above(axis: Axes, handles: Sequence[Any] = (), *, title_left: str | None = None, columns: int = 6) -> None:
    """A legend on top of the axes, where it hides no data; in rows of `columns` at most, which fit the figure."""
    handles = list(handles) or axis.get_legend_handles_labels()[0]
    if title_left:
        handles = [Line2D([], [], lw=0, label=title_left), *handles]
    rows = max(1, math.ceil(len(handles) / columns))
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.97), "borderpad": 0.1}
    ncols = math.ceil(len(handles) / rows)
    axis.legend(handles=handles, ncols=ncols, handlelength=1.4, columnspacing=1.2, **place)


def dot_lonely_points(axis: Axes) -> None:
    """Dots for points to which no line leads: each side of them is the end, or not finite."""
    for line in axis.get_lines():
        finite = np.pad(np.isfinite(np.asarray(line.get_ydata(), dtype=float)), 1)
        lonely = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
        if len(lonely) and line.get_marker() in ("None", "", None):
            line.set(marker=".", markevery=lonely.tolist())
