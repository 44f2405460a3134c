"""Phase diagrams from the table of a sweep: what is averaged over seeds, what is significant, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from common.dynamics import CHAOS
from dynloss_ext import plot

Array = NDArray[Any]
Columns = Mapping[str, Array]  # of the table, one entry a member; NaN for what is missing

LEVEL = 0.05  # of the false discoveries among the cells that are called significant
NOT_SIGNIFICANT = "#bdbdbd"
PERIODS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Grid:
    """Members by amplitude, period and seed.

    Attributes:
        amplitudes, periods: (m,) and (n,), ascending, without A = 1.
        seeds: (s,).
    """

    amplitudes: Array
    periods: Array
    seeds: Array
    _columns: Columns

    @classmethod
    def of(cls, columns: Columns) -> Grid:
        oscillating = columns["amplitude"] != 1
        return cls(
            np.unique(columns["amplitude"][oscillating]),
            np.unique(columns["period"][oscillating]),
            np.unique(columns["seed"]),
            columns,
        )

    def cells(self, name: str) -> Array:
        """A column as (m, n, s); NaN where there is no such member."""
        values = np.full((len(self.amplitudes), len(self.periods), len(self.seeds)), np.nan)
        chosen = self._columns["amplitude"] != 1
        place = (
            np.searchsorted(self.amplitudes, self._columns["amplitude"][chosen]),
            np.searchsorted(self.periods, self._columns["period"][chosen]),
            np.searchsorted(self.seeds, self._columns["seed"][chosen]),
        )
        values[place] = self._columns[name][chosen]
        return values

    def plain(self, name: str) -> Array:
        """Of the members with A = 1, by seed: (s,)."""
        values = np.full(len(self.seeds), np.nan)
        chosen = self._columns["amplitude"] == 1
        values[np.searchsorted(self.seeds, self._columns["seed"][chosen])] = self._columns[name][chosen]
        return values


def paired_gain(values: Array, plain: Array) -> tuple[Array, Array]:
    """The mean over seeds of value minus the plain one's of the same seed, and its p-value by Student's paired t-test.

    Args:
        values: (..., s). plain: (s,).

    Returns:
        Two arrays (...); a p-value is NaN for fewer than two pairs. Where all differences are the same, as those of
        accuracies of few seeds may be, the t-test has no spread to go by: the p-value is then that of the sign test,
        2^(1 - s), and 1 if they are 0.
    """
    from scipy.stats import t as student

    difference = values - plain
    count = np.isfinite(difference).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(difference, -1) / count
        spread = np.sqrt(np.nansum((difference - mean[..., None]) ** 2, -1) / (count - 1))
        statistic = np.abs(mean) / (spread / np.sqrt(count))
        p = 2 * student.sf(statistic, np.maximum(count - 1, 1))
        tied = spread <= 1e-9 * np.abs(mean)  # to the rounding of the differences
    p = np.where(tied, np.where(mean == 0, 1.0, 0.5 ** (count - 1.0)), p)
    return mean, np.where(count < 2, np.nan, p)


def significant(p: Array, level: float = LEVEL) -> Array:
    """Which of some p-values are significant with a false discovery rate of `level` (Benjamini and Hochberg 1995)."""
    flat = p[np.isfinite(p)]
    order = np.sort(flat)
    below = order <= level * np.arange(1, len(order) + 1) / max(len(order), 1)
    bound = order[below].max() if below.any() else -1.0
    result: Array = np.isfinite(p) & (p <= bound)
    return result


def _ticks(axis: Axes, grid: Grid) -> None:
    def shown(values: Array) -> tuple[Array, list[str]]:
        places = np.unique(np.linspace(0, len(values) - 1, min(len(values), 12)).round().astype(int))
        return places, [f"{float(f'{values[i]:.3g}'):g}" for i in places]

    axis.set_xticks(*shown(grid.periods), rotation=45, ha="right")
    axis.set_yticks(*shown(grid.amplitudes))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("period $T$ (steps)")
    axis.set_ylabel("amplitude $A$")


def _map(axis: Axes, grid: Grid, values: Array, **options: Any) -> Any:
    axis.set_facecolor("white")
    image = axis.imshow(values, origin="lower", aspect="auto", interpolation="nearest", **options)
    _ticks(axis, grid)
    return image


def mean_and_gain(
    grid: Grid, names: Mapping[str, str], title: str | None = None, other: tuple[Grid, str] | None = None
) -> tuple[Figure, dict[str, Any]]:
    """For each column a map of its mean over seeds, and one of its gain over A = 1, paired by seed.

    Args:
        grid: of the sweep.
        names: column -> what it is called.
        title: a line above everything.
        other: the same grid of another sweep, and its name: the gain is then over its members with the same A and T.

    Returns:
        The figure, and per column the largest gain, where it is, and how many cells gain and lose significantly.
    """
    found: dict[str, Any] = {}
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(7.9, 0.8 + 2.9 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), 2, squeeze=False)
        for (name, label), (left, right) in zip(names.items(), axes, strict=True):
            values = grid.cells(name)
            plain, rival = (grid.plain(name), "A = 1") if other is None else (other[0].cells(name), other[1])
            with np.errstate(invalid="ignore"):
                mean = np.nanmean(values, -1) if np.isfinite(values).any() else values[..., 0]
            baseline = float(np.nanmean(plain)) if np.isfinite(plain).any() else math.nan
            figure.colorbar(_map(left, grid, mean, cmap="viridis"), ax=left)
            left.set_title(f"{label} ({rival}: {baseline:.3f})")
            gain, p = paired_gain(values, plain)
            clear = significant(p)
            reach = float(np.nanmax(np.abs(gain), initial=1e-3))
            shown = np.where(clear, gain, np.nan)
            image = _map(right, grid, shown, cmap="RdBu", norm=TwoSlopeNorm(0, -reach, reach))
            right.set_facecolor(NOT_SIGNIFICANT)
            figure.colorbar(image, ax=right)
            right.set_title(f"gain over {rival}, paired by {len(grid.seeds)} seeds")
            if np.isfinite(gain).any():
                best = np.unravel_index(int(np.nanargmax(gain)), gain.shape)
                found[name] = {
                    "plain": baseline,
                    # over seeds: the cells of another sweep share theirs
                    "plain_standard_error": _standard_error(_mean(plain.reshape(-1, plain.shape[-1]).T)),
                    "largest_gain": float(gain[best]),
                    "its_standard_error": _standard_error((values - plain)[best]),
                    "at_amplitude": float(grid.amplitudes[best[0]]),
                    "at_period": float(grid.periods[best[1]]),
                    "cells": int(np.isfinite(p).sum()),
                    "significant_gains": int((clear & (gain > 0)).sum()),
                    "significant_losses": int((clear & (gain < 0)).sum()),
                }
        grey = Patch(color=NOT_SIGNIFICANT, label=f"not significant (false discovery rate {LEVEL:g})")
        figure.legend(handles=[grey], loc="outside lower right")
        if title:
            figure.suptitle(title, fontsize=9)
    return figure, found


def _standard_error(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1) / math.sqrt(len(finite))) if len(finite) > 1 else math.nan


def most_common(values: Array) -> Array:
    """The most common finite value along the last dimension, the smallest of several; NaN where there is none."""
    result = np.full(values.shape[:-1], np.nan)
    for place in np.ndindex(result.shape):
        finite = values[place][np.isfinite(values[place])]
        if len(finite):
            found, counts = np.unique(finite, return_counts=True)
            result[place] = found[counts.argmax()]
    return result


def period_map(axis: Axes, grid: Grid, periods: Array) -> None:
    """Colour: the detected period; grey: no period fits; white: none was measured."""
    colours = [plot.PERIOD_COLOURS.get(1, "#1b1b1b"), *(f"C{i}" for i in range(len(PERIODS) - 1)), "#7fcdbb"]
    index = np.full(periods.shape, np.nan)
    for place, period in enumerate(PERIODS):
        index[periods == period] = place
    index[periods > PERIODS[-1]] = len(PERIODS)
    index[periods == CHAOS] = len(PERIODS) + 1
    cmap = ListedColormap([*colours, "#bdbdbd"])
    _map(axis, grid, index, cmap=cmap, norm=BoundaryNorm(np.arange(-0.5, cmap.N), cmap.N))
    names = [*(str(period) for period in PERIODS), f"more than {PERIODS[-1]}", "none"]
    present = sorted({int(i) for i in index[np.isfinite(index)]})
    handles = [Patch(color=cmap(i), label=names[i]) for i in present]
    axis.legend(handles=handles, title="period", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def dynamics_maps(grid: Grid, title: str | None = None) -> Figure:
    """Periods of the last cycle, the share of it that is no smooth motion, instabilities, λ_max against 2/lr."""
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(8.4, 6.2), layout="constrained")
        axes = figure.subplots(2, 2)
        period_map(axes[0, 0], grid, most_common(grid.cells("richest_period")))
        axes[0, 0].set_title("richest period in the last cycle, of most seeds")
        for axis, name, label, cmap in (
            (axes[0, 1], "unstable_share", "share of the last cycle that is not smooth", "magma"),
            (axes[1, 0], "num_instabilities", "instabilities", "viridis"),
            (axes[1, 1], "relative_lambda", "largest λ$_{max}$ of the last cycle · lr / 2", "RdBu_r"),
        ):
            values = grid.cells(name)
            mean = most_common(values) if not np.isfinite(values).any() else _mean(values)
            norm = None
            if name == "relative_lambda" and np.isfinite(mean).any():
                norm = TwoSlopeNorm(1.0, min(0.5, float(np.nanmin(mean))), max(1.5, float(np.nanquantile(mean, 0.95))))
            figure.colorbar(_map(axis, grid, mean, cmap=cmap, norm=norm), ax=axis)
            axis.set_title(label)
        if title:
            figure.suptitle(title, fontsize=9)
    return figure


def _mean(values: Array) -> Array:
    count = np.isfinite(values).sum(-1)
    with np.errstate(invalid="ignore"):
        mean: Array = np.nansum(values, -1) / count
    return mean


def slices(grid: Grid, names: Mapping[str, str], periods: Sequence[float], title: str | None = None) -> Figure:
    """Each column against A at some periods: the mean over seeds with a band of one σ of the mean; dashed: A = 1.

    Of each period the nearest one that the sweep has, once.
    """
    nearest = sorted({int(np.argmin(np.abs(grid.periods - period))) for period in periods})
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(3.8 * len(names), 2.9), layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for axis, (name, label) in zip(axes, names.items(), strict=True):
            values, plain = grid.cells(name), grid.plain(name)
            for place, colour in zip(nearest, plot.EIGENVALUE_COLOURS, strict=False):
                column = values[:, place]
                mean, count = _mean(column), np.isfinite(column).sum(-1)
                with np.errstate(invalid="ignore", divide="ignore"):
                    error = np.sqrt(_mean((column - mean[:, None]) ** 2) / (count - 1))
                axis.plot(grid.amplitudes, mean, color=colour, label=f"$T$ = {grid.periods[place]:g}")
                axis.fill_between(grid.amplitudes, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
            baseline, error = float(_mean(plain[None])[0]), _standard_error(plain)
            axis.axhline(baseline, color="0.4", ls="--", lw=0.9, label="$A$ = 1")
            if math.isfinite(error):
                axis.axhspan(baseline - error, baseline + error, color="0.4", alpha=0.15, lw=0)
            axis.set_xscale("log")
            axis.set_xlabel("amplitude $A$")
            axis.set_ylabel(label)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
        if title:
            figure.suptitle(title, fontsize=9)
    return figure


def ranked(values: Array) -> Array:
    """Ranks from 0 to 1, equal values alike: every colour then covers as much of an image (Sohl-Dickstein 2024)."""
    result = np.full(values.shape, np.nan)
    finite = np.isfinite(values)
    _, inverse, counts = np.unique(values[finite], return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    result[finite] = (middle / max(finite.sum() - 1, 1))[inverse]
    return result


def fine_map(grid: Grid, name: str, label: str, title: str | None = None) -> Figure:
    """A column of the first seed over a fine grid, in colours by rank; white: not finite."""
    values = grid.cells(name)[..., 0]
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        axis = figure.subplots()
        image = _map(axis, grid, ranked(values), cmap="magma", norm=Normalize(0, 1))
        bar = figure.colorbar(image, ax=axis, label=f"{label}, by rank")
        finite = np.sort(values[np.isfinite(values)])
        if len(finite):
            places = np.linspace(0, 1, 6)
            marks = finite[(places * (len(finite) - 1)).round().astype(int)]
            bar.set_ticks(places.tolist(), labels=[f"{mark:.4g}" for mark in marks])
        if title:
            axis.set_title(title)
    return figure
