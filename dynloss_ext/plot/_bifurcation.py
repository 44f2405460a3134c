"""The loss by its period."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dynloss_ext._checks import check_array
from dynloss_ext.instability import PeriodSegment
from dynloss_ext.plot._style import (
    EIGENVALUE_COLOURS,
    OTHER_PERIOD_COLOUR,
    PERIOD_COLOURS,
    STOP_COLOUR,
    STYLE,
    legend_above,
    over_steps,
    span,
)


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
        legend_above(axes[0], [Line2D([], [], color=colour, label=name, **style) for colour, name in names.items()])
    if panels == 2:
        axes[1].plot(eig_step, lambda_max, color=EIGENVALUE_COLOURS[0], lw=0.9)
        axes[1].set_ylabel(r"$\lambda_{\max}$")
        if limit is not None and math.isfinite(limit):
            label = f"stability limit {limit:.3g}"
            axes[1].axhline(limit, color=STOP_COLOUR, lw=1.2, ls=":", label=label)
            legend_above(axes[1])
    return over_steps(figure, axes[:, None], [span(step)], title)


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
