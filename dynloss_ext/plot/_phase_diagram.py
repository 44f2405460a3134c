"""A quantity over period and amplitude."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dynloss_ext._checks import check_array
from dynloss_ext.plot._style import STYLE, Array


@matplotlib.rc_context(STYLE)
def phase_diagram(
    periods: Any,
    amplitudes: Any,
    values: Any,
    *,
    spread: Any = None,
    label: str = "accuracy",
    baseline: float | None = None,
    title: str | None = None,
) -> Figure:
    """A quantity over the plane of period T and amplitude A, as in the paper's Figs. 1 and 2.

    Args:
        periods: (n,) periods T in steps.
        amplitudes: (m,) amplitudes A.
        values: (m, n) quantity, row per amplitude. A cell is hatched where its value is not finite: NaN for no
            run, or what a diverged one left.
        spread: (m, n) standard deviation over seeds, written below the value where it is finite.
        label: the quantity's name.
        baseline: its value without oscillations (A = 1), marked on the colour bar; colours then diverge from
            it. One that is not finite counts as none.
        title: a line above the map.

    Raises:
        ValueError: `values` or `spread` of another shape than (m, n), no period or no amplitude.
        TypeError: an array of anything but real numbers.

    Example:
        >>> figure = phase_diagram([10, 100], [2, 20], [[0.50, 0.52], [0.55, 0.61]], baseline=0.5)
        >>> figure.axes[0].get_xlabel()
        'period $T$ (steps)'
    """
    periods, amplitudes = check_array("periods", periods, 1), check_array("amplitudes", amplitudes, 1)
    values = check_array("values", values, 2, len(amplitudes))
    if values.shape[1] != len(periods):
        raise ValueError(f"values: expected shape {(len(amplitudes), len(periods))}, got {values.shape}")
    if values.size == 0:
        raise ValueError(f"values: expected at least one period and one amplitude, got shape {values.shape}")
    if spread is not None:
        spread = check_array("spread", spread, 2, len(amplitudes))
        if spread.shape != values.shape:
            raise ValueError(f"spread: expected shape {values.shape}, got {spread.shape}")
    if baseline is not None and not math.isfinite(baseline):
        baseline = None
    size = (1.8 + max(3.0, 0.62 * len(periods)), 1.2 + max(2.2, 0.45 * len(amplitudes)))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    norm, colours = _map_colours(values, baseline)
    axis.set_facecolor("#dddddd")
    axis.patch.set_hatch("///")
    axis.patch.set_edgecolor("#aaaaaa")
    image = axis.imshow(values, origin="lower", aspect="auto", norm=norm, cmap=colours, interpolation="nearest")
    if values.size <= 200:
        _write_cells(axis, values, spread, norm, matplotlib.colormaps[colours])
    axis.set_xticks(range(len(periods)), [_tick(value) for value in periods])
    axis.set_yticks(range(len(amplitudes)), [_tick(value) for value in amplitudes])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("period $T$ (steps)")
    axis.set_ylabel("amplitude $A$")
    bar = figure.colorbar(image, ax=axis, label=label, pad=0.02)
    bar.outline.set_visible(False)
    if baseline is not None:
        bar.ax.axhline(baseline, color="black", lw=1.2)
        bar.ax.text(-0.25, baseline, "$A=1$ ", ha="right", va="center", transform=bar.ax.get_yaxis_transform())
    if title:
        axis.set_title(title)
    return figure


def _map_colours(values: Array, baseline: float | None) -> tuple[Normalize, str]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if baseline is None:
        return Normalize(low, high), "viridis"
    reach = max(abs(high - baseline), abs(low - baseline)) or 1.0
    return Normalize(baseline - reach, baseline + reach), "RdBu"


def _write_cells(axis: Axes, values: Array, spread: Array | None, norm: Normalize, colours: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = colours(norm(value))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        text = _number(value)
        if spread is not None and np.isfinite(spread[row, column]):
            text += f"\n±{_number(spread[row, column])}"
        axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)


def _number(value: Any) -> str:
    """Three significant digits, but three decimals at most; a power of ten where that would be long or 0.000."""
    size = abs(float(value))
    if size == 0:
        return "0"
    if 1e-3 <= size < 1e5:
        decimals = 3 if size <= 1 else max(0, 3 - len(f"{size:.0f}"))
        return f"{value:.{decimals}f}"
    return _short_power(f"{value:.2e}")


def _tick(value: Any) -> str:
    text = f"{value:g}"
    return _short_power(f"{value:.3g}") if "e" in text else text


def _short_power(text: str) -> str:
    """1.5e6 from Python's 1.5e+06."""
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"
