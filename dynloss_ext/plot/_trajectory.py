"""A run along its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import BboxBase

from dynloss_ext._checks import check_array
from dynloss_ext.instability import Crossing, Instability, PeriodChange, instability_threshold
from dynloss_ext.plot._style import (
    CLASS_COLOURS,
    EIGENVALUE_COLOURS,
    LINEAR_CHANGE,
    START_COLOUR,
    STOP_COLOUR,
    STYLE,
    Array,
    curve_style,
    dot_lonely_points,
    finite,
    legend_above,
    over_steps,
    span,
)


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
    run = _Run.checked(
        step,
        {"weights": weights, "weighted_loss": weighted_loss, "loss": loss, "accuracy": accuracy},
        eig_step,
        {"eigenvalues": eigenvalues, "ntk": ntk},
        class_names,
        threshold,
        limit,
    )
    guide_step = check_array("guides", () if guides is None else guides[0], 1)
    guided = check_array("guides", np.empty((0, 0)) if guides is None else guides[1], 2, len(guide_step))
    everywhere = np.sort(np.concatenate([run.step, run.eig_step]))
    spans = [span(everywhere)]
    if zoom is not None:
        zoom = _steps_around("zoom", zoom, everywhere)
        spans.append(span(zoom))

    drawn = run.panels()
    size = (5.2 * len(spans) if zoom else 7.2, 1.55 * len(drawn) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(drawn), len(spans), squeeze=False, sharex="col")
    for column, (first, last) in enumerate(spans):
        at, part = dict(zip(drawn, axes[:, column], strict=True)), run.between(first, last)
        _step_panels(at, part, fine=column > 0)
        _record_panels(at, part, fine=column > 0)
        for axis in axes[:, column]:
            dot_lonely_points(axis)
            _mark_windows(axis, instabilities)
    if zoom is not None:
        first, last = spans[1]
        if axis := at.get("eigenvalues"):
            near = (guide_step >= first) & (guide_step <= last)
            if guided.size:
                _guide(axis, guide_step[near], guided[near], part.records["eigenvalues"].shape[1])
            level = part.limit if isinstance(part.limit, float) else threshold
            _mark_crossings(axis, [crossing for crossing in crossings if first <= crossing.step <= last], level)
        _mark_zoom(axes, zoom)
    for axis in axes[:, 1:].flat:
        axis.set_ylabel("")
    over_steps(figure, axes, spans, title)
    if zoom is not None and (seen := [change for change in changes if first <= change.step <= last]):
        figure.draw_without_rendering()  # only then it has its layout, which says what names overlap
        _mark_changes(at, seen)
    return figure


@dataclass(frozen=True)
class _Run:
    """What is drawn, checked: quantities per step and per record of eigenvalues, by the names of `trajectory`."""

    step: Array
    rows: dict[str, Array]
    eig_step: Array
    records: dict[str, Array]
    class_names: list[str]
    threshold: float
    limit: Any  # a number, one a step, or None

    @classmethod
    def checked(
        cls,
        step: Any,
        rows: dict[str, Any],
        eig_step: Any,
        records: dict[str, Any],
        class_names: Sequence[str] | None,
        threshold: float,
        limit: Any,
    ) -> _Run:
        """A quantity that is None is left out; so are eigenvalues of which there is none."""
        step, eig_step = check_array("step", step, 1), check_array("eig_step", eig_step, 1)
        if np.size(records["eigenvalues"]) == 0 and len(eig_step) == 0:
            records = {**records, "eigenvalues": None}
        if all(values is None for values in (rows | records).values()):
            raise ValueError(f"{', '.join(rows | records)}: expected at least one, got none")
        given_rows, given_records = (
            {
                name: check_array(name, values, 1 + (name in ("weights", "eigenvalues")), len(at))
                for name, values in given.items()
                if values is not None
            }
            for given, at in ((rows, step), (records, eig_step))
        )
        if limit is not None:
            limit = check_array("limit", limit)
            limit = check_array("limit", limit, 1, len(step)) if limit.ndim else float(limit)
        classes = given_rows["weights"].shape[1] if "weights" in given_rows else 0
        names = list(class_names) if class_names is not None and classes else [str(i) for i in range(classes)]
        if len(names) != classes:
            raise ValueError(f"class_names: expected {classes} names, got {len(names)}")
        return cls(step, given_rows, eig_step, given_records, names, threshold, limit)

    def panels(self) -> list[str]:
        """The names of those that have something to show, from top to bottom."""
        panels = {
            "weights": "weights" in self.rows,
            "loss": "weighted_loss" in self.rows or "loss" in self.rows,
            "change": "weighted_loss" in self.rows,
            "accuracy": "accuracy" in self.rows,
            **dict.fromkeys(self.records, True),
        }
        return [name for name, shown in panels.items() if shown]

    def between(self, first: float, last: float) -> _Run:
        """The part from one step to another."""
        inside, seen = ((at >= first) & (at <= last) for at in (self.step, self.eig_step))
        return replace(
            self,
            step=self.step[inside],
            rows={name: values[inside] for name, values in self.rows.items()},
            eig_step=self.eig_step[seen],
            records={name: values[seen] for name, values in self.records.items()},
            limit=self.limit[inside] if np.ndim(self.limit) else self.limit,
        )


def _steps_around(name: str, ends: Any, step: Array) -> tuple[float, float]:
    """The ends of an interval that holds at least one of the steps."""
    first, last = check_array(name, ends, 1, 2).tolist()
    if not (math.isfinite(first) and math.isfinite(last) and np.any((step >= first) & (step <= last))):
        run = f"{step[0]} to {step[-1]}" if len(step) else "none"
        raise ValueError(f"{name}: expected first <= last around steps of the run ({run}), got ({first}, {last})")
    return first, last


def _step_panels(axes: dict[str, Axes], run: _Run, *, fine: bool) -> None:
    """The panels of per-step quantities.

    The whole run spans decades of loss: logarithmic there, and F alone on a linear scale with a dot per step
    in the zoom (`fine`), where the branches of a period show.
    """
    step, rows, names = run.step, run.rows, run.class_names
    style: dict[str, Any] = {"rasterized": True, "lw": 0.5}
    if fine:
        style = {"rasterized": True, "lw": 0.2, "marker": ".", "ms": 1.8, "mew": 0}
    if axis := axes.get("weights"):
        for index, name in enumerate(names):
            axis.plot(step, rows["weights"][:, index], label=name, lw=0.9, **curve_style(CLASS_COLOURS, index))
        axis.set_ylabel(r"class weight $\Gamma_i$")
        if not fine and len(names) <= 10:
            legend_above(axis, title_left="class", columns=5)  # the column's own title is beside it
    if axis := axes.get("loss"):
        if "loss" in rows and not (fine and "weighted_loss" in rows):
            axis.plot(step, rows["loss"], color="#bbbbbb", label="plain cross-entropy", **style)
        if "weighted_loss" in rows:
            axis.plot(step, rows["weighted_loss"], color="black", label="dynamical loss $F$", **style)
        axis.set_ylabel("loss")
        if not fine:
            if all(_fits_log_scale(rows[name]) for name in ("weighted_loss", "loss") if name in rows):
                axis.set_yscale("log")
            legend_above(axis)
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
    values = finite(values)
    return bool(np.any(values > 0) and np.all(values >= 0))


def _scale_changes(axis: Axes, change: Array) -> None:
    """Zero in sight, and a logarithmic scale on either side if the changes leave the linear range."""
    reach = float(np.max(np.abs(finite(change)), initial=0.0))
    if reach > LINEAR_CHANGE:
        axis.set_yscale("symlog", linthresh=LINEAR_CHANGE)
        top = math.floor(math.log10(reach))
        zero = round(math.log10(LINEAR_CHANGE)) - 1  # the linear range is drawn as wide as a decade
        stride = math.ceil((top - zero) / 3)  # one to three ticks a side, and none closer to 0 than to each other
        decades = 10.0 ** np.arange(top, zero + stride - 1, -stride)
        axis.yaxis.set_major_locator(FixedLocator([*-decades, 0.0, *decades]))
    axis.axhline(0, color="#dddddd", lw=0.5, zorder=0.4)
    axis.autoscale_view(scalex=False)  # else the margins of the linear scale stay, thousands of times too wide at 0


def _record_panels(axes: dict[str, Axes], run: _Run, *, fine: bool) -> None:
    if axis := axes.get("eigenvalues"):
        _eigenvalue_panel(axis, run)
        if not fine:
            legend_above(axis)
    if axis := axes.get("ntk"):
        axis.plot(run.eig_step, run.records["ntk"], color="#5e3c99", lw=0.9)
        axis.set_ylabel(r"NTK $\lambda_{\max}$")


def _eigenvalue_panel(axis: Axes, run: _Run) -> None:
    for index, values in enumerate(run.records["eigenvalues"].T):  # the largest on top
        style: dict[str, Any] = {**curve_style(EIGENVALUE_COLOURS, index), "zorder": 2.5 - 0.01 * index}
        axis.plot(run.eig_step, values, lw=0.9, label=f"$\\lambda_{{{index + 1}}}$", **style)
    if math.isfinite(run.threshold):
        label = f"threshold {run.threshold:.2f}"
        axis.axhline(run.threshold, color="#555555", lw=1.0, ls="--", label=label, zorder=3)
    style = {"color": STOP_COLOUR, "lw": 1.2, "ls": ":", "zorder": 3}
    if np.ndim(run.limit):
        axis.plot(run.step, run.limit, label="stability limit", **style)
    elif run.limit is not None and math.isfinite(run.limit):
        axis.axhline(run.limit, label=f"stability limit {run.limit:.3g}", **style)
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
    for panel in axes.values():
        for change in changes:
            panel.axvline(change.step, color="#666666", lw=0.6, ls=(0, (1, 1.5)), zorder=0.6)
    if axis := axes.get("loss"):
        _name_changes(axis, changes)


def _name_changes(axis: Axes, changes: Sequence[PeriodChange]) -> None:
    """At the left of each line, below the names that are in the way; without a place left below, no name."""
    style: dict[str, Any] = {"fontsize": 5.5, "rotation": 90, "ha": "right", "va": "top", "color": "#444444"}
    placed: list[BboxBase] = []
    for change in sorted(changes, key=lambda change: change.step):
        words = f"{_period_name(change.before)}→{_period_name(change.after)}"
        label = axis.text(change.step, 0.98, words, transform=axis.get_xaxis_transform(), **style)
        while above := [box for box in placed if box.overlaps(label.get_window_extent())]:
            lowest = min(box.y0 for box in above) - 1
            label.set_y(axis.transAxes.inverted().transform((0, lowest))[1])
        box = label.get_window_extent()
        if box.y0 < axis.bbox.y0:
            label.remove()
        else:
            placed.append(box)


def _guide_colour(index: int) -> str:
    return EIGENVALUE_COLOURS[index % len(EIGENVALUE_COLOURS)]


def _mark_windows(axis: Axes, instabilities: Sequence[Instability]) -> None:
    for window in instabilities:
        axis.axvline(window.start, color=START_COLOUR, lw=0.6, alpha=0.8, zorder=0.5)
        axis.axvline(window.stop, color=STOP_COLOUR, lw=0.6, alpha=0.8, zorder=0.5)


def _mark_zoom(axes: Array, zoom: tuple[float, float]) -> None:
    for axis in axes[:, 0]:
        axis.axvspan(*zoom, color="#fdae61", alpha=0.25, lw=0, zorder=0.1)
    axes[0, 0].set_title("whole run", loc="left")
    axes[0, 1].set_title(f"steps {zoom[0]:g} to {zoom[1]:g}", loc="left")


def _period_name(period: int | None) -> str:
    return {1: "smooth", None: "chaos"}.get(period, str(period))
