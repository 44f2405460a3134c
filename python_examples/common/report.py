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
    Instability,
    PeriodSegment,
    detect_instabilities,
    detect_periods,
    instability_threshold,
)


@dataclass(frozen=True)
class Analysis:
    """Instabilities of a run, and for each the periods of F along it."""

    instabilities: list[Instability]
    periods: list[list[PeriodSegment]]
    threshold: float
    branch_threshold: float

    @property
    def oscillating(self) -> list[Instability]:
        """The windows in which F goes up and down; not the smooth, fast descent at the start of training."""
        pairs = zip(self.instabilities, self.periods, strict=True)
        return [window for window, parts in pairs if any(part.period != 1 for part in parts)]

    def summary(self) -> dict[str, Any]:
        windows = [
            asdict(window) | {"periods": [asdict(part) for part in parts]}
            for window, parts in zip(self.instabilities, self.periods, strict=True)
        ]
        return {
            "num_instabilities": len(self.instabilities),
            "num_oscillating": len(self.oscillating),
            "threshold": self.threshold,
            "branch_threshold": self.branch_threshold,
            "instabilities": windows,
        }

    def table(self) -> str:
        """One line per window: where, at which curvature, through which periods."""
        lines = ["     start      stop  λ start   λ stop  period of F"]
        for window, parts in zip(self.instabilities, self.periods, strict=True):
            lines.append(
                f"{window.start:10d}{window.stop:10d}{window.lambda_start:9.2f}{window.lambda_stop:9.2f}  "
                f"{cascade(parts)}"
            )
        return "\n".join(lines)

    def comparison(self, limit: float) -> str:
        """The measured threshold beside the theory's, in one line."""
        measured = f"{self.threshold:.3f}" if math.isfinite(self.threshold) else "none measured"
        if math.isfinite(self.branch_threshold):
            measured += f" ({self.branch_threshold:.3f} over oscillating windows and both branches)"
        return f"threshold {measured}, stability limit of the optimizer {limit:.3f}"


def analyse(metrics: Metrics, *, signal: NDArray[Any] | None = None, **options: Any) -> Analysis:
    """Detect the instabilities in recorded metrics (`metrics.npz`) and measure their periods.

    Args:
        metrics: the arrays of a run folder.
        signal: what is to jump; F itself by default.
        options: those of `detect_instabilities`.
    """
    step, loss = metrics["step"], metrics["weighted_loss"]
    has_eigenvalues = len(metrics["eig_step"]) > 0
    lambda_max = metrics["eigenvalues"][:, 0] if has_eigenvalues else np.empty(0)
    jumping = loss if signal is None else signal
    found = detect_instabilities(step, jumping, metrics["eig_step"], lambda_max, **options)
    periods = [detect_periods(step, loss, start=window.start, stop=window.stop) for window in found]
    analysis = Analysis(found, periods, instability_threshold(found), np.nan)
    branches = _branch_threshold(analysis.oscillating, metrics["eig_step"], lambda_max)
    return replace(analysis, branch_threshold=branches)


def cascade(segments: list[PeriodSegment]) -> str:
    """The sequence of periods in words: "2 → 4 → 8 → chaos → 2"; "too short" for a window without any."""
    names = [
        "chaos" if part.period is None else "smooth" if part.period == 1 else str(part.period) for part in segments
    ]
    return " → ".join(names) or "too short"


def trajectory(metrics: Metrics, analysis: Analysis, zoom: tuple[float, float] | None = None, **options: Any) -> Figure:
    """The paper's figure of a run, with a zoom; `options` are those of `plot.trajectory`."""
    names = ("weights", "weighted_loss", "loss", "accuracy", "eig_step", "eigenvalues")
    recorded: dict[str, Any] = {name: metrics[name] for name in names}
    return plot.trajectory(
        metrics["step"],
        **recorded,
        ntk=metrics.get("ntk"),
        instabilities=analysis.instabilities,
        threshold=analysis.branch_threshold,
        zoom=zoom,
        **options,
    )


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
