"""Figures from recorded arrays. Nothing here computes: detect and measure first, then draw.

Every function returns a `matplotlib.figure.Figure` made without pyplot, so no window opens, no backend is
chosen and nothing has to be closed. `matplotlib.pyplot.figure(figure)` (matplotlib 3.11) hands one to pyplot, whose
`show` then shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator
from numpy.typing import NDArray

from dynloss_ext._checks import check_array
from dynloss_ext.instability import Crossing, Instability, PeriodChange, PeriodSegment, instability_threshold
from dynloss_ext.spectrum import SpectralDensity

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


@matplotlib.rc_context(STYLE)
def trajectory(
    step: Any = (),
    *,
    weights: Any = None,
    weighted_loss: Any = None,
    accuracy: Any = None,
    eig_step: Any = (),
    eigenvalues: Any = None,
    loss: Any = None,
    instabilities: Sequence[Instability] = (),
    threshold: float | None = None,
    limit: Any = None,
    ntk: Any = None,
    zoom: tuple[float, float] | None = None,
    guides: tuple[Any, Any] | None = None,
    crossings: Sequence[Crossing] = (),
    changes: Sequence[PeriodChange] = (),
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """The paper's Fig. 4: class weights, loss, its change, accuracy and curvature along a run.

    There is a panel for each quantity that is given. The loss of the whole run is drawn on a logarithmic scale, on a
    linear one if F or `loss` is nowhere positive or somewhere negative; its change on a linear scale up to 1e-3 and
    logarithmically beyond. A value with none that is finite beside it is a dot.

    Args:
        step: (S,) steps of the per-step arrays.
        weights: (S, C) class weights Γ.
        weighted_loss: (S,) dynamical loss F.
        accuracy: (S,) accuracy in [0, 1].
        eig_step: (M,) steps of the eigenvalues.
        eigenvalues: (M, k) largest Hessian eigenvalues, descending.
        loss: (S,) plain cross-entropy, drawn behind F if that is there.
        instabilities: windows to mark: their start green, their stop red.
        threshold: the dashed line, by default `instability_threshold(instabilities)`.
        limit: the optimizer's stability limit, one number or (S,) where the learning rate changes.
        ntk: (M,) largest eigenvalue of the neural tangent kernel, for one more panel.
        zoom: (first, last) step of a second column, with at least one of the steps between them.
        guides: (G,) steps and (G, g) values, such as the `branch_means` of the first g eigenvalues, drawn dashed over
            these in the zoom.
        crossings: of `limit` if that is a number, else of `threshold`, drawn there as triangles in the zoom.
        changes: of period, drawn as vertical lines in the zoom.
        class_names: C names for the legend.
        title: a line above everything.

    Raises:
        ValueError: an array whose length differs from its steps', a zoom without a step inside, nothing to draw.
        TypeError: an array of anything but real numbers.

    Example:
        >>> figure = trajectory([0, 1, 2], accuracy=[0.3, 0.5, 0.6], eig_step=[0, 2], eigenvalues=[[1.0], [2.1]])
        >>> len(figure.axes)  # a panel each
        2
    """
    threshold = instability_threshold(instabilities) if threshold is None else threshold
    step, eig_step = check_array("step", step, 1), check_array("eig_step", eig_step, 1)
    if eigenvalues is not None and np.size(eigenvalues) == 0 and len(eig_step) == 0:
        eigenvalues = None
    per_step = {"weights": weights, "weighted_loss": weighted_loss, "loss": loss, "accuracy": accuracy}
    per_record = {"eigenvalues": eigenvalues, "ntk": ntk}
    rows, records = (
        {
            name: check_array(name, values, 1 + (name in ("weights", "eigenvalues")), len(at))
            for name, values in given.items()
            if values is not None
        }
        for given, at in ((per_step, step), (per_record, eig_step))
    )
    if limit is not None:
        limit = check_array("limit", limit)
        limit = check_array("limit", limit, 1, len(step)) if limit.ndim else float(limit)
    classes = rows["weights"].shape[1] if "weights" in rows else 0
    names = list(class_names) if class_names is not None and classes else [str(i) for i in range(classes)]
    if len(names) != classes:
        raise ValueError(f"class_names: expected {classes} names, got {len(names)}")
    panels = {
        "weights": "weights" in rows,
        "loss": "weighted_loss" in rows or "loss" in rows,
        "change": "weighted_loss" in rows,
        "accuracy": "accuracy" in rows,
        **dict.fromkeys(records, True),
    }
    drawn = [name for name, given in panels.items() if given]
    if not drawn:
        raise ValueError(f"{', '.join(per_step | per_record)}: expected at least one, got none")

    guide_step = check_array("guides", () if guides is None else guides[0], 1)
    guided = check_array("guides", np.empty((0, 0)) if guides is None else guides[1], 2, len(guide_step))

    everywhere = np.sort(np.concatenate([step, eig_step]))
    spans = [_span(everywhere)]
    if zoom is not None:
        zoom = _steps_around("zoom", zoom, everywhere)
        spans.append(_span(zoom))
    size = (5.2 * len(spans) if zoom else 7.2, 1.55 * len(drawn) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(drawn), len(spans), squeeze=False, sharex="col")
    for column, (first, last) in enumerate(spans):
        inside, seen = ((at >= first) & (at <= last) for at in (step, eig_step))
        at = dict(zip(drawn, axes[:, column], strict=True))
        _step_panels(at, step[inside], {k: v[inside] for k, v in rows.items()}, names, fine=column > 0)
        if "eigenvalues" in at:
            bound = limit if np.ndim(limit) == 0 else (step[inside], limit[inside])
            _eigenvalue_panel(at["eigenvalues"], eig_step[seen], records["eigenvalues"][seen], threshold, bound)
            if column == 0:
                _legend_above(at["eigenvalues"])
            else:
                near = (guide_step >= first) & (guide_step <= last)
                level = bound if isinstance(bound, float) else threshold
                if guided.size:
                    _guide(at["eigenvalues"], guide_step[near], guided[near], records["eigenvalues"].shape[1])
                _mark_crossings(at["eigenvalues"], [c for c in crossings if first <= c.step <= last], level)
        if "ntk" in at:
            at["ntk"].plot(eig_step[seen], records["ntk"][seen], color="#5e3c99", lw=0.9)
            at["ntk"].set_ylabel(r"NTK $\lambda_{\max}$")
        for axis in axes[:, column]:
            _dot_lonely_points(axis)
            _mark_windows(axis, instabilities)
        if column == 1:
            _mark_changes(at, [change for change in changes if first <= change.step <= last])
    if zoom is not None:
        _mark_zoom(axes, zoom)
    for axis in axes[:, 1:].flat:
        axis.set_ylabel("")
    return _over_steps(figure, axes, spans, title)


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
    exact = _finite(check_array("eigenvalues", [] if eigenvalues is None else eigenvalues, 1))
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
    _dot_lonely_points(axis)
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
def bifurcation(
    step: Any,
    loss: Any,
    *,
    segments: Sequence[PeriodSegment] = (),
    eig_step: Any = (),
    lambda_max: Any = (),
    limit: float | None = None,
    title: str | None = None,
) -> Figure:
    """The cascade in an unstable window: F, one dot per step, coloured by its measured period, above λ_max.

    Periods 1, 2, 4, 8, 16 and chaos each have their own colour; all others share one and an entry in the legend.

    Args:
        step: (S,) steps of the window.
        loss: (S,) dynamical loss F.
        segments: what `detect_periods` found there; black dots without.
        eig_step: (M,) steps of `lambda_max`, for a second panel.
        lambda_max: (M,) largest Hessian eigenvalue.
        limit: the optimizer's stability limit.
        title: a line above everything.

    Raises:
        ValueError: an array whose length differs from its steps'.
        TypeError: an array of anything but real numbers.
    """
    step, eig_step = check_array("step", step, 1), check_array("eig_step", eig_step, 1)
    loss = check_array("loss", loss, 1, len(step))
    lambda_max = check_array("lambda_max", lambda_max, 1, len(eig_step))
    panels = 1 + (len(eig_step) > 0)
    figure = Figure(figsize=(7.2, 2.4 + 1.5 * (panels - 1)), layout="constrained")
    heights = [2.2, 1.0][:panels]
    axes = figure.subplots(panels, 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    dots: dict[str, Any] = {"ls": "", "marker": ".", "ms": 2.2, "mew": 0, "rasterized": True}
    covered = np.zeros(len(step), dtype=bool)
    for segment in segments:
        inside = (step >= segment.start) & (step <= segment.stop)
        covered |= inside
        axes[0].plot(step[inside], loss[inside], color=_period_colour(segment.period), **dots)
    axes[0].plot(step[~covered], loss[~covered], color="#bbbbbb" if segments else "black", **dots)
    axes[0].set_ylabel("dynamical loss $F$")
    names = _period_names({segment.period for segment in segments})
    if names:
        style: dict[str, Any] = {"marker": ".", "ls": ""}
        _legend_above(axes[0], [Line2D([], [], color=colour, label=name, **style) for colour, name in names.items()])
    if panels == 2:
        axes[1].plot(eig_step, lambda_max, color=EIGENVALUE_COLOURS[0], lw=0.9)
        axes[1].set_ylabel(r"$\lambda_{\max}$")
        if limit is not None and math.isfinite(limit):
            label = f"stability limit {limit:.3g}"
            axes[1].axhline(limit, color=STOP_COLOUR, lw=1.2, ls=":", label=label)
            _legend_above(axes[1])
    return _over_steps(figure, axes[:, None], [_span(step)], title)


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
    rows = {name: _finite(check_array(f"spectra[{name!r}]", values, 1)) for name, values in spectra.items()}
    figure = Figure(figsize=(5.6, 1.0 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    lines = _finite(check_array("whole", [] if whole is None else whole, 1))
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


def _over_steps(figure: Figure, axes: Array, spans: Sequence[tuple[float, float]], title: str | None) -> Figure:
    """The figure, finished: each column of panels over its span of steps."""
    for column, (first, last) in enumerate(spans):
        axes[-1, column].set_xlim(first, last)
        axes[-1, column].set_xlabel("step")
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    figure.align_ylabels(axes[:, 0])
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def _steps_around(name: str, ends: Any, step: Array) -> tuple[float, float]:
    """The ends of an interval that holds at least one of the steps."""
    first, last = check_array(name, ends, 1, 2).tolist()
    if not (math.isfinite(first) and math.isfinite(last) and np.any((step >= first) & (step <= last))):
        run = f"{step[0]} to {step[-1]}" if len(step) else "none"
        raise ValueError(f"{name}: expected first <= last around steps of the run ({run}), got ({first}, {last})")
    return first, last


def _span(step: Any) -> tuple[float, float]:
    """Limits of an axis of steps, which matplotlib wants apart even for a single one."""
    first, last = (float(step[0]), float(step[-1])) if len(step) else (0.0, 1.0)
    return (first, last) if first != last else (first - 0.5, last + 0.5)


def _reach(grid: Array, exact: Array) -> tuple[float, float]:
    """Limits that show the whole grid and, with room around their ticks, the exact eigenvalues beyond it."""
    low, high = float(grid.min()), float(grid.max())
    margin = 0.02 * (np.max(exact, initial=high) - np.min(exact, initial=low))
    beyond = exact[(exact < low) | (exact > high)]
    return _span((np.min(beyond - margin, initial=low), np.max(beyond + margin, initial=high)))


def _fits(grid: Any, curves: Array) -> bool:
    return np.shape(grid) in (curves.shape, curves.shape[1:])


def _step_panels(axes: dict[str, Axes], step: Array, rows: dict[str, Array], names: list[str], *, fine: bool) -> None:
    """The panels of per-step quantities.

    The whole run spans decades of loss: logarithmic there, and F alone on a linear scale with a dot per step
    in the zoom (`fine`), where the branches of a period show.
    """
    style: dict[str, Any] = {"rasterized": True, "lw": 0.5}
    if fine:
        style = {"rasterized": True, "lw": 0.2, "marker": ".", "ms": 1.8, "mew": 0}
    if axis := axes.get("weights"):
        for index, name in enumerate(names):
            axis.plot(step, rows["weights"][:, index], label=name, lw=0.9, **_curve_style(CLASS_COLOURS, index))
        axis.set_ylabel(r"class weight $\Gamma_i$")
        if not fine and len(names) <= 10:
            _legend_above(axis, title_left="class", columns=5)  # the column's own title is beside it
    if axis := axes.get("loss"):
        if "loss" in rows and not (fine and "weighted_loss" in rows):
            axis.plot(step, rows["loss"], color="#bbbbbb", label="plain cross-entropy", **style)
        if "weighted_loss" in rows:
            axis.plot(step, rows["weighted_loss"], color="black", label="dynamical loss $F$", **style)
        axis.set_ylabel("loss")
        if not fine:
            if all(_fits_log_scale(rows[name]) for name in ("weighted_loss", "loss") if name in rows):
                axis.set_yscale("log")
            _legend_above(axis)
    if axis := axes.get("change"):
        with np.errstate(invalid="ignore"):  # a diverged run stays infinite
            change = np.diff(rows["weighted_loss"])
        axis.plot(step[1:], change, color="#7b3294", **style)
        strides = set(np.diff(step).tolist()) or {1}
        axis.set_ylabel(f"$F(t)-F(t-{strides.pop():g})$" if len(strides) == 1 else r"$\Delta F$ between records")
        if not fine:
            _scale_changes(axis, change)
    if axis := axes.get("accuracy"):
        axis.plot(step, rows["accuracy"], color="#2c7bb6", **style)
        axis.set_ylabel("accuracy")


def _fits_log_scale(values: Array) -> bool:
    values = _finite(values)
    return bool(np.any(values > 0) and np.all(values >= 0))


def _scale_changes(axis: Axes, change: Array) -> None:
    """Zero in sight, and a logarithmic scale on either side if the changes leave the linear range."""
    reach = float(np.max(np.abs(_finite(change)), initial=0.0))
    if reach > LINEAR_CHANGE:
        axis.set_yscale("symlog", linthresh=LINEAR_CHANGE)
        top = math.floor(math.log10(reach))
        zero = round(math.log10(LINEAR_CHANGE)) - 1  # the linear range is drawn as wide as a decade
        stride = math.ceil((top - zero) / 3)  # one to three ticks a side, and none closer to 0 than to each other
        decades = 10.0 ** np.arange(top, zero + stride - 1, -stride)
        axis.yaxis.set_major_locator(FixedLocator([*-decades, 0.0, *decades]))
    axis.axhline(0, color="#dddddd", lw=0.5, zorder=0.4)
    axis.autoscale_view(scalex=False)  # else the margins of the linear scale stay, thousands of times too wide at 0


def _eigenvalue_panel(axis: Axes, step: Array, values: Array, threshold: float, limit: Any) -> None:
    for index in range(values.shape[1]):  # the largest on top
        style: dict[str, Any] = {**_curve_style(EIGENVALUE_COLOURS, index), "zorder": 2.5 - 0.01 * index}
        axis.plot(step, values[:, index], lw=0.9, label=f"$\\lambda_{{{index + 1}}}$", **style)
    if math.isfinite(threshold):
        axis.axhline(threshold, color="#555555", lw=1.0, ls="--", label=f"threshold {threshold:.2f}", zorder=3)
    style = {"color": STOP_COLOUR, "lw": 1.2, "ls": ":", "zorder": 3}
    if isinstance(limit, tuple):
        axis.plot(*limit, label="stability limit", **style)
    elif limit is not None and math.isfinite(limit):
        axis.axhline(limit, label=f"stability limit {limit:.3g}", **style)
    axis.set_ylabel(r"Hessian $\lambda$")


def _guide(axis: Axes, step: Array, values: Array, eigenvalues: int) -> None:
    """The course of the first eigenvalues, all of which step back in colour: their branches hide everything."""
    for line in axis.get_lines()[:eigenvalues]:
        line.set(alpha=0.35, lw=0.5)
    for index, curve in enumerate(values.T):
        axis.plot(step, curve, color=_guide_colour(index), lw=1.1, ls="--", zorder=3.2)


def _mark_crossings(axis: Axes, crossings: Sequence[Crossing], level: float) -> None:
    """A triangle for each, that points the way it goes, on the side that it comes from."""
    for crossing in crossings:
        colour, marker = _guide_colour(crossing.index), "^" if crossing.upward else "v"
        axis.plot(crossing.step, level, ls="", marker=marker, ms=5, color=colour, mec="white", mew=0.4, zorder=4)


def _mark_changes(axes: dict[str, Axes], changes: Sequence[PeriodChange]) -> None:
    for name, axis in axes.items():
        for change in changes:
            axis.axvline(change.step, color="#666666", lw=0.6, ls=(0, (1, 1.5)), zorder=0.6)
            if name == "loss":
                words = f"{_period_name(change.before)}→{_period_name(change.after)}"
                style: dict[str, Any] = {
                    "fontsize": 5.5,
                    "rotation": 90,
                    "ha": "right",
                    "va": "top",
                    "color": "#444444",
                }
                axis.text(change.step, 0.98, words, transform=axis.get_xaxis_transform(), **style)


def _guide_colour(index: int) -> str:
    return EIGENVALUE_COLOURS[index % len(EIGENVALUE_COLOURS)]


def _period_name(period: int | None) -> str:
    return {1: "smooth", None: "chaos"}.get(period, str(period))


def _period_colour(period: int | None) -> str:
    return PERIOD_COLOURS.get(period, OTHER_PERIOD_COLOUR)


def _period_names(periods: set[int | None]) -> dict[str, str]:
    """Colour -> name, for a legend with one entry a colour: the doublings, the others, chaos."""
    groups: dict[str, list[int | None]] = {}
    for period in sorted(periods, key=lambda period: (period is None, period not in PERIOD_COLOURS, period or 0)):
        groups.setdefault(_period_colour(period), []).append(period)
    names = {1: "smooth", None: "chaos"}
    return {
        colour: names.get(first, f"period {first}") if not more else f"other: {_listed([first, *more])}"
        for colour, (first, *more) in groups.items()
    }


def _listed(periods: Sequence[int | None], limit: int = 12) -> str:
    return ", ".join([str(period) for period in periods[:limit]] + ["…"] * (len(periods) > limit))


def _curve_style(palette: Sequence[str], index: int) -> dict[str, Any]:
    turn, place = divmod(index, len(palette))
    return {"color": palette[place], "ls": LINE_STYLES[turn % len(LINE_STYLES)]}


def _legend_above(axis: Axes, handles: Sequence[Any] = (), *, title_left: str | None = None, columns: int = 6) -> None:
    """A legend on top of the axes, where it hides no data; in rows of `columns` at most, which fit the figure."""
    handles = list(handles) or axis.get_legend_handles_labels()[0]
    if title_left:
        handles = [Line2D([], [], lw=0, label=title_left), *handles]
    rows = max(1, math.ceil(len(handles) / columns))
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.97), "borderpad": 0.1}
    ncols = math.ceil(len(handles) / rows)
    axis.legend(handles=handles, ncols=ncols, handlelength=1.4, columnspacing=1.2, **place)


def _dot_lonely_points(axis: Axes) -> None:
    """Dots for points to which no line leads: each side of them is the end, or not finite."""
    for line in axis.get_lines():
        finite = np.pad(np.isfinite(np.asarray(line.get_ydata(), dtype=float)), 1)
        lonely = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
        if len(lonely) and line.get_marker() in ("None", "", None):
            line.set(marker=".", markevery=lonely.tolist())


def _mark_windows(axis: Axes, instabilities: Sequence[Instability]) -> None:
    for window in instabilities:
        axis.axvline(window.start, color=START_COLOUR, lw=0.6, alpha=0.8, zorder=0.5)
        axis.axvline(window.stop, color=STOP_COLOUR, lw=0.6, alpha=0.8, zorder=0.5)


def _mark_zoom(axes: Array, zoom: tuple[float, float]) -> None:
    for axis in axes[:, 0]:
        axis.axvspan(*zoom, color="#fdae61", alpha=0.25, lw=0, zorder=0.1)
    axes[0, 0].set_title("whole run", loc="left")
    axes[0, 1].set_title(f"steps {zoom[0]:g} to {zoom[1]:g}", loc="left")


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
