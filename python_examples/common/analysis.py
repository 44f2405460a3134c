"""What every run is asked at its end: its instabilities, their periods, a summary, a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dynloss_ext import plot
from dynloss_ext.instability import (
    Instability,
    PeriodSegment,
    detect_instabilities,
    detect_periods,
    instability_threshold,
)

Metrics = Mapping[str, NDArray[Any]]


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


def analyse(
    metrics: Metrics, rule: str = "loss", *, signal: NDArray[Any] | None = None, max_gap: int = 500
) -> Analysis:
    """Detect the instabilities in recorded metrics (`metrics.npz`) and measure their periods.

    Args:
        metrics: the arrays of a run folder.
        rule: what marks an instability, see `detect_instabilities`.
        signal: what is to jump; F itself by default.
        max_gap: steps without a jump that do not yet end a window.
    """
    step, loss = metrics["step"], metrics["weighted_loss"]
    has_eigenvalues = len(metrics["eig_step"]) > 0
    lambda_max = metrics["eigenvalues"][:, 0] if has_eigenvalues else np.empty(0)
    jumping = loss if signal is None else signal
    found = detect_instabilities(step, jumping, metrics["eig_step"], lambda_max, rule=rule, max_gap=max_gap)
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


def figure(metrics: Metrics, analysis: Analysis, limit: Any = None, title: str | None = None) -> Figure:
    """The paper's figure of a run, with a zoom on its second instability."""
    zoom = None
    if analysis.oscillating:
        window = analysis.oscillating[:2][-1]
        margin = max(20, round(0.15 * (window.stop - window.start)))
        last = int(metrics["step"][-1])
        zoom = (max(0, window.start - margin), min(last, window.stop + margin))
    names = ("weights", "weighted_loss", "loss", "accuracy", "eig_step", "eigenvalues")
    recorded: dict[str, Any] = {name: metrics[name] for name in names}
    return plot.trajectory(
        metrics["step"],
        **recorded,
        ntk=metrics.get("ntk"),
        instabilities=analysis.instabilities,
        threshold=analysis.branch_threshold,
        limit=limit,
        zoom=zoom,
        title=title,
    )


def comparison(threshold: float, limit: float, branches: float = math.nan) -> str:
    """The measured threshold beside the theory's, in one line; `branches` is `Analysis.branch_threshold`."""
    measured = f"{threshold:.3f}" if math.isfinite(threshold) else "none measured"
    if math.isfinite(branches):
        measured += f" ({branches:.3f} over oscillating windows and both branches)"
    return f"threshold {measured}, stability limit of the optimizer {limit:.3f}"


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
