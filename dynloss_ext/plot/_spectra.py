"""Eigenvalues: their density, and those of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynloss_ext._checks import check_array
from dynloss_ext.plot._style import EIGENVALUE_COLOURS, START_COLOUR, STYLE, Array, dot_lonely_points, finite, span
from dynloss_ext.spectrum import SpectralDensity


@matplotlib.rc_context(STYLE)
def spectral_density(
    grid: Any,
    density: Any = None,
    *,
    stderr: Any = None,
    step: Any = None,
    eigenvalues: Any = None,
    title: str | None = None,
) -> Figure:
    """Density of the Hessian's eigenvalues on a logarithmic scale (Ghorbani et al., arXiv:1901.10159).

    Args:
        grid: (G,) points λ, or (D, G); or a :class:`SpectralDensity`, with its own density and standard error.
        density: (G,) density, or (D, G) for D moments of a run, coloured by `step`. What is not finite is left
            out, as everywhere.
        stderr: standard error of `density`, in its shape, drawn as a band.
        step: (D,) steps of the rows of a (D, G) density, for the colour bar; by default it numbers the rows from 0.
        eigenvalues: (k,) eigenvalues known exactly, drawn as ticks; the axis reaches all of them.
        title: a line above the axes.

    Raises:
        ValueError: shapes that do not fit together, no point to draw, a grid that is not finite.
        TypeError: an array of anything but real numbers.
    """
    if isinstance(grid, SpectralDensity):
        for name, value in (("density", density), ("stderr", stderr)):
            if value is not None:
                raise ValueError(f"{name}: expected that of the SpectralDensity, got another one")
        grid, density, stderr = grid.grid, grid.density, grid.stderr
    elif density is None:
        raise TypeError(f"grid: expected a SpectralDensity, or points and a density, got {type(grid).__name__} alone")
    density = check_array("density", density)
    if density.ndim not in (1, 2):
        raise ValueError(f"density: expected shape (G,) or (D, G), got {density.shape}")
    if density.size == 0:
        raise ValueError(f"density: expected at least one point, got shape {density.shape}")
    curves = np.atleast_2d(density)
    grids = np.broadcast_to(check_array("grid", grid), curves.shape) if _fits(grid, curves) else None
    if grids is None:
        raise ValueError(f"grid: expected shape {curves.shape[1:]} or {curves.shape}, got {np.shape(grid)}")
    if not np.all(np.isfinite(grids)):
        raise ValueError("grid: expected finite points, got others")
    errors = None if stderr is None else check_array("stderr", stderr)
    if errors is not None and errors.shape != density.shape:
        raise ValueError(f"stderr: expected shape {density.shape}, got {errors.shape}")
    rows = np.arange(len(curves))
    steps = rows if step is None else check_array("step", np.atleast_1d(check_array("step", step)), 1, len(curves))
    exact = finite(check_array("eigenvalues", [] if eigenvalues is None else eigenvalues, 1))
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axis = figure.subplots()
    norm = Normalize(float(steps.min()), float(steps.max()))
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 256)))  # no yellow on white
    positive = curves[np.isfinite(curves) & (curves > 0)]
    top = float(positive.max()) if positive.size else 1.0
    for index, (x, y) in enumerate(zip(grids, curves, strict=True)):
        colour = colours(float(norm(steps[index]))) if len(curves) > 1 else EIGENVALUE_COLOURS[1]
        axis.plot(x, y, color=colour, lw=1.0 if len(curves) == 1 else 0.7)
        if errors is not None:
            error = np.atleast_2d(errors)[index]
            low, high = np.maximum(y - error, top * 1e-12), y + error
            axis.fill_between(x, low, high, color=colour, alpha=0.25, lw=0 if len(x) > 1 else 1.0)
    dot_lonely_points(axis)
    for value in exact:
        axis.axvline(value, 0, 0.06, color=START_COLOUR, lw=1.0)
    axis.set_ylim(top * 1e-7, top * 3)  # before the scale, which warns of a density that is 0 everywhere
    axis.set_yscale("log")
    axis.set_xlim(_reach(grids, exact))
    axis.set_xlabel(r"eigenvalue $\lambda$")
    axis.set_ylabel(r"density $\rho(\lambda)$")
    if len(curves) > 1:
        label, ticks = ("row" if step is None else "step"), MaxNLocator(7, integer=True, min_n_ticks=1)
        figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=axis, label=label, ticks=ticks)
    if title:
        axis.set_title(title)
    return figure


@matplotlib.rc_context(STYLE)
def layer_spectra(spectra: Mapping[str, Any], *, whole: Any = None, title: str | None = None) -> Figure:
    """Eigenvalues of the diagonal blocks of the Hessian, a row of dots per layer.

    Args:
        spectra: layer's name -> (k,) eigenvalues, as `eigsh` finds them for `HessianOperator.layers`. What is not
            finite is left out.
        whole: (m,) eigenvalues of the whole Hessian, drawn as lines through all rows. A block's largest never
            exceeds the whole's (Cauchy's interlacing).
        title: a line above the axes.

    Raises:
        ValueError: no layer, or values that are not one-dimensional.
        TypeError: values that are not real numbers.
    """
    if not spectra:
        raise ValueError("spectra: expected at least one layer, got none")
    rows = {name: finite(check_array(f"spectra[{name!r}]", values, 1)) for name, values in spectra.items()}
    figure = Figure(figsize=(5.6, 1.0 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    lines = finite(check_array("whole", [] if whole is None else whole, 1))
    for index, value in enumerate(lines):
        axis.axvline(value, color="#bbbbbb", lw=0.8, zorder=1, label="whole Hessian" if index == 0 else None)
    for row, values in enumerate(rows.values()):
        style: dict[str, Any] = {"mew": 0, "alpha": 0.8, "zorder": 2}
        axis.plot(values, [row] * len(values), ls="", marker="o", ms=4.5, color=EIGENVALUE_COLOURS[1], **style)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    everything = np.concatenate([*rows.values(), lines])
    low, high = (float(everything.min()), float(everything.max())) if everything.size else (0.0, 1.0)
    reach = max(abs(low), abs(high))
    if reach > 0:  # linear within a hundredth of the largest decade, logarithmic beyond
        linear = 10.0 ** (math.floor(math.log10(reach)) - 2)
        axis.set_xscale("symlog", linthresh=linear)
        axis.set_xlim(min(1.5 * low, -0.5 * linear), max(1.5 * high, 0.5 * linear))
    axis.grid(axis="y", color="#eeeeee", lw=0.6)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(r"eigenvalue $\lambda$")
    if len(lines):
        axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99))
    if title:
        axis.set_title(title, loc="left")
    return figure


def _reach(grid: Array, exact: Array) -> tuple[float, float]:
    """Limits that show the whole grid and, with room around their ticks, the exact eigenvalues beyond it."""
    low, high = float(grid.min()), float(grid.max())
    margin = 0.02 * (np.max(exact, initial=high) - np.min(exact, initial=low))
    beyond = exact[(exact < low) | (exact > high)]
    return span((np.min(beyond - margin, initial=low), np.max(beyond + margin, initial=high)))


def _fits(grid: Any, curves: Array) -> bool:
    return np.shape(grid) in (curves.shape, curves.shape[1:])
