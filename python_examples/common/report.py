"""What is said and drawn of a run at its end: its instabilities and their periods, tables, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.run import Metrics
from dynloss_ext import plot
from dynloss_ext.instability import (
    Crossing,
    Instability,
    PeriodChange,
    PeriodSegment,
    branch_means,
    crossings,
    detect_instabilities,
    detect_periods,
    instability_threshold,
    period_changes,
)

BRANCHES = 8  # records in a mean where every step is recorded: it levels the periods 2, 4 and 8


@dataclass(frozen=True)
class Analysis:
    """Instabilities of a run, and for each the periods of F along it.

    Attributes:
        crossed: what `crossings` are of: the optimizer's stability limit, or else `branch_threshold`.
        crossings: where an eigenvalue, averaged over the branches of its oscillation, passes through `crossed`.
        num_eigenvalues: how many were looked at, the largest three at most.
    """

    instabilities: list[Instability]
    periods: list[list[PeriodSegment]]
    threshold: float
    branch_threshold: float
    crossed: float
    crossings: list[Crossing]
    num_eigenvalues: int

    @property
    def changes(self) -> list[list[PeriodChange]]:
        """The changes of period along each window."""
        return [period_changes(parts) for parts in self.periods]

    def nearest_crossings(self, step: int) -> list[Crossing | None]:
        """For each eigenvalue its crossing nearest to a step."""
        return [
            min((c for c in self.crossings if c.index == index), key=lambda c: abs(c.step - step), default=None)
            for index in range(self.num_eigenvalues)
        ]

    @property
    def oscillating(self) -> list[Instability]:
        """The windows in which F goes up and down; not the smooth, fast descent at the start of training."""
        pairs = zip(self.instabilities, self.periods, strict=True)
        return [window for window, parts in pairs if any(part.period != 1 for part in parts)]

    def summary(self) -> dict[str, Any]:
        windows = [
            asdict(window)
            | {"periods": [asdict(part) for part in parts], "changes": [self._beside(change) for change in changes]}
            for window, parts, changes in zip(self.instabilities, self.periods, self.changes, strict=True)
        ]
        return {
            "num_instabilities": len(self.instabilities),
            "num_oscillating": len(self.oscillating),
            "threshold": self.threshold,
            "branch_threshold": self.branch_threshold,
            "crossed": self.crossed,
            "instabilities": windows,
        }

    def _beside(self, change: PeriodChange) -> dict[str, Any]:
        """A change of period, and the nearest crossing of each eigenvalue."""
        nearest = [
            {"eigenvalue": c.index + 1, "step": c.step, "upward": c.upward, "distance": c.step - change.step}
            for c in self.nearest_crossings(change.step)
            if c is not None
        ]
        return asdict(change) | {"nearest_crossings": nearest}

    def table(self) -> str:
        """One line per window: where, at which curvature, through which periods; then one per change of period."""
        lines = ["     start      stop  λ start   λ stop  period of F"]
        if any(self.changes) and self.num_eigenvalues:
            lines[0] += f"; at each change the nearest crossings of {self.crossed:.4g}, and how far they are"
        for window, parts, changes in zip(self.instabilities, self.periods, self.changes, strict=True):
            lines.append(
                f"{window.start:10d}{window.stop:10d}{window.lambda_start:9.2f}{window.lambda_stop:9.2f}  "
                f"{cascade(parts)}"
            )
            for change in changes if self.num_eigenvalues else ():
                name = f"{_name(change.before)} → {_name(change.after)}"
                nearest = "".join(
                    f"  λ{index} {_passage(crossing, change.step):<15}"
                    for index, crossing in enumerate(self.nearest_crossings(change.step), 1)
                )
                lines.append(f"{change.step:20d}  {name:<16}{nearest}".rstrip())
        return "\n".join(lines)

    def comparison(self, limit: float) -> str:
        """The measured threshold beside the theory's, in one line."""
        measured = f"{self.threshold:.3f}" if math.isfinite(self.threshold) else "none measured"
        if math.isfinite(self.branch_threshold):
            measured += f" ({self.branch_threshold:.3f} over oscillating windows and both branches)"
        return f"threshold {measured}, stability limit of the optimizer {limit:.3f}"


def analyse(
    metrics: Metrics, *, signal: NDArray[Any] | None = None, limit: float | None = None, **options: Any
) -> Analysis:
    """Detect the instabilities in recorded metrics (`metrics.npz`), their periods, and crossings of the threshold.

    Args:
        metrics: the arrays of a run folder.
        signal: what is to jump; F itself by default.
        limit: the optimizer's stability limit.
        options: further ones, those of `detect_instabilities`.
    """
    step, loss = metrics["step"], metrics["weighted_loss"]
    has_eigenvalues = len(metrics["eig_step"]) > 0
    lambda_max = metrics["eigenvalues"][:, 0] if has_eigenvalues else np.empty(0)
    jumping = loss if signal is None else signal
    found = detect_instabilities(step, jumping, metrics["eig_step"], lambda_max, limit=limit, **options)
    periods = [detect_periods(step, loss, start=window.start, stop=window.stop) for window in found]
    analysis = Analysis(found, periods, instability_threshold(found), np.nan, np.nan, [], 0)
    threshold = _branch_threshold(analysis.oscillating, metrics["eig_step"], lambda_max)
    crossed = threshold if limit is None else limit
    analysis = replace(analysis, branch_threshold=threshold, crossed=crossed)
    if not (has_eigenvalues and math.isfinite(crossed)):
        return analysis
    values = metrics["eigenvalues"][:, :3]
    passed = crossings(metrics["eig_step"], values, crossed, branches=_branches(metrics["eig_step"]))
    return replace(analysis, crossings=passed, num_eigenvalues=values.shape[1])


def cascade(segments: list[PeriodSegment]) -> str:
    """The sequence of periods in words: "2 → 4 → 8 → chaos → 2"; "too short" for a window without any."""
    return " → ".join(_name(part.period) for part in segments) or "too short"


def trajectory(metrics: Metrics, analysis: Analysis, zoom: tuple[float, float] | None = None, **options: Any) -> Figure:
    """The paper's figure of a run, with a zoom; `options` are those of `plot.trajectory`."""
    names = ("weights", "weighted_loss", "loss", "accuracy", "eig_step", "eigenvalues")
    recorded: dict[str, Any] = {name: metrics[name] for name in names}
    eig_step, values = metrics["eig_step"], metrics["eigenvalues"][:, :2]
    return plot.trajectory(
        metrics["step"],
        **recorded,
        ntk=metrics.get("ntk"),
        instabilities=analysis.instabilities,
        threshold=analysis.branch_threshold,
        guides=branch_means(eig_step, values, branches=_branches(eig_step)),
        crossings=analysis.crossings,
        changes=[change for changes in analysis.changes for change in changes],
        zoom=zoom,
        **options,
    )


def _name(period: int | None) -> str:
    return "chaos" if period is None else "smooth" if period == 1 else str(period)


def _passage(crossing: Crossing | None, step: int) -> str:
    """ "↑ 9173 (-373)" for a rise 373 steps before `step`."""
    return f"{'↑' if crossing.upward else '↓'} {crossing.step} ({crossing.step - step:+d})" if crossing else "never"


def _branches(eig_step: NDArray[Any]) -> int:
    """Records in a mean over branches: two of a sparse record already lie far apart in time."""
    return BRANCHES if np.all(np.diff(eig_step) == 1) else 2


def _branch_threshold(windows: list[Instability], lambda_step: NDArray[Any], lambda_max: NDArray[Any]) -> float:
    """Median over starts and stops of the mean λ of the two records around each.

    Within a window λ jumps with F between the branches of period 2 (at a start say 2.4 and 1.5, either side of
    the limit), so one record is a coin toss, and their mean over 20 of them is uncertain by 0.1. Records an odd
    number of steps apart lie on both branches. The median, because a window may also begin with a leap into chaos
    (λ of 8 in the first record), which says nothing of the threshold.
    """
    edges = [step for window in windows for step in (window.start, window.stop)]
    if not edges or len(lambda_step) == 0:
        return math.nan
    after = np.minimum(np.searchsorted(lambda_step, edges), len(lambda_step) - 1)
    means = (lambda_max[after] + lambda_max[np.maximum(after - 1, 0)]) / 2
    means = means[np.isfinite(means)]  # the last window of a run that diverged has no end
    return float(np.median(means)) if len(means) else math.nan


def training_curves(
    groups: Mapping[str, Sequence[Metrics]],
    steps_per_epoch: int,
    *,
    stop_epoch: float | None = None,
    title: str | None = None,
) -> Figure:
    """Accuracy (top) and plain cross-entropy (bottom): validation in full colour, training behind it.

    Args:
        groups: label -> runs that differ in their seed only; the line is their mean, the band one σ.
        steps_per_epoch: of every run.
        stop_epoch: where the oscillations end: a dotted line.
        title: a line above everything.
    """
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for (label, runs), colour in zip(groups.items(), plot.EIGENVALUE_COLOURS, strict=False):
            _curves(axes[0], "accuracy", label, runs, steps_per_epoch, colour)
            _curves(axes[1], "loss", label, runs, steps_per_epoch, colour)
        for axis, name in zip(axes, ("accuracy", "cross-entropy"), strict=True):
            axis.set_ylabel(name)
            if stop_epoch is not None:
                axis.axvline(stop_epoch, color="0.3", ls=":", lw=0.9)
        axes[1].set_yscale("log")
        axes[1].set_xlabel("epoch")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(groups))  # above the curves
        if title:
            figure.suptitle(title, fontsize=9)
    return figure


def _curves(axis: Axes, name: str, label: str, runs: Sequence[Metrics], steps_per_epoch: int, colour: str) -> None:
    """One group: the validation curve with its band, and the training curve averaged over epochs."""
    epoch = (runs[0]["validation_step"] + 1) / steps_per_epoch
    values = np.stack([run[f"validation_{name}"] for run in runs])
    mean, spread = values.mean(0), values.std(0)
    axis.plot(epoch, mean, color=colour, lw=1.1, label=f"{label}, validation")
    if len(runs) > 1:
        axis.fill_between(epoch, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
    train = np.stack([run[name] for run in runs]).mean(0)
    whole = len(train) // steps_per_epoch
    if whole:
        per_epoch = train[: whole * steps_per_epoch].reshape(whole, steps_per_epoch).mean(1)
        axis.plot(np.arange(1, whole + 1), per_epoch, color=colour, lw=0.6, alpha=0.5, label=f"{label}, training")
