"""Instabilities of a recorded run: where they begin and end, at which curvature, with which period.

Gradient descent with learning rate η on a quadratic of curvature λ oscillates and diverges for λ > 2/η. The
dynamical loss drives the largest Hessian eigenvalue through that limit again and again; the loss then jumps
from step to step with period 2, 4, ... or chaotically until the weights have moved to a flatter region
(Ruiz-Garcia et al., ICML 2021, arXiv:2102.03793, Fig. 4).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dynloss_ext._checks import check_array, check_choice, check_count, check_number
from dynloss_ext._periods import periods_of, shortest
from dynloss_ext.oscillation import Oscillation

__all__ = [
    "Crossing",
    "Instability",
    "PeriodChange",
    "PeriodSegment",
    "branch_means",
    "crossings",
    "detect_instabilities",
    "detect_periods",
    "instability_threshold",
    "period_changes",
]

Array = NDArray[Any]

WHOLE_RUN = 0.9  # the share of a run that a window must not cover alone


@dataclass(frozen=True)
class Instability:
    """One unstable window of a run, ends included.

    Attributes:
        start: last step before the first jump.
        stop: step of the last jump's arrival.
        lambda_start: largest Hessian eigenvalue at `start` (NaN where none was recorded).
        lambda_stop: the same at `stop`.
    """

    start: int
    stop: int
    lambda_start: float
    lambda_stop: float


@dataclass(frozen=True)
class PeriodSegment:
    """A stretch of steps, ends included, in which the loss repeats itself every `period` steps.

    `period` is 1 where the loss moves smoothly and None where no period that was tried fits: chaos.
    """

    start: int
    stop: int
    period: int | None


@dataclass(frozen=True)
class PeriodChange:
    """Where the period of F changes: `step` is the first one of the segment with the period `after`."""

    step: int
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Crossing:
    """A recorded eigenvalue passes through a threshold.

    Attributes:
        step: the record in the middle of the last mean on the old side and the first on the new, the later one of two.
        index: of the eigenvalue: 0 is the largest.
        upward: whether it rises.
    """

    step: int
    index: int
    upward: bool


def detect_instabilities(
    step: Any,
    loss: Any,
    lambda_step: Any,
    lambda_max: Any,
    *,
    rule: str = "loss",
    period: float | None = None,
    limit: float | None = None,
    loss_jump: float | None = None,
    lambda_jump: float = 0.1,
    max_gap: int | None = None,
    min_samples: int | None = None,
) -> list[Instability]:
    """Find the unstable windows of a run.

    A window is a maximal run of jumps, with gaps of up to `max_gap` steps between two of them. A value that
    is not finite counts as a jump.

    * ``rule="loss"``: a jump is \\|F(t) - F(t-1)\\| > `loss_jump`. A fast, smooth descent at the start of
      training satisfies it too; `detect_periods` tells it (period 1) from an oscillation.
    * ``rule="lambda"``: a jump is \\|λ(t) - λ(t-1)\\| > `lambda_jump` between neighbouring records of the
      largest eigenvalue. The paper marks the times where the difference equals 0.1; every harmless rise of λ
      within a cycle counts as well, and the result depends on how often λ was recorded.
    * ``rule="limit"``: a window is a maximal run of records with λ > `limit`.

    Args:
        step: (S,) strictly increasing steps of `loss`.
        loss: (S,) weighted loss F.
        lambda_step: (M,) strictly increasing steps of `lambda_max`; M may be 0 with ``rule="loss"``.
        lambda_max: (M,) largest Hessian eigenvalue.
        rule: "loss", "lambda" or "limit".
        period: T of the oscillation in steps, for the defaults.
        limit: the optimizer's `stability_limit`, for ``rule="limit"``.
        loss_jump: smallest jump of F (in units of F). By default 5/T, but at least 1e-3 and at most 0.5, of its
            spread: the power of ten nearest to the range that holds 98 % of F. Without `period` T is the number of
            records.
        lambda_jump: smallest jump of λ.
        max_gap: steps without a jump that do not yet end a window; by default max(10, T/10), or 500 without `period`.
        min_samples: jumps that a window must contain; by default 10 for "loss" and 1 for the others.

    Returns:
        The windows in order of time. The eigenvalue at a step is the first one recorded there or later (the
        last one recorded, after that).

    Raises:
        ValueError: shapes that differ, steps that do not increase, an unknown rule, a bound that is not
        positive.
        TypeError: values or bounds that are not real numbers; no `limit` for its rule.

    Warns:
        UserWarning: one window covers the whole run, so that its bound told nothing apart.

    Example:
        >>> step = np.arange(3000)
        >>> jumping = (1000 <= step) & (step < 1200)  # F alternates there
        >>> loss = 0.5 + np.where(jumping, 0.1 * (-1.0) ** step, 0)
        >>> detect_instabilities(step, loss, step, np.where(jumping, 2.1, 1.9))
        [Instability(start=999, stop=1200, lambda_start=1.9, lambda_stop=1.9)]
    """
    epsilon = _epsilon(loss)
    step, loss = _series("step", step, "loss", loss)
    lambda_step, lambda_max = _series("lambda_step", lambda_step, "lambda_max", lambda_max)
    check_choice("rule", rule, ("loss", "lambda", "limit"))
    turn = None if period is None else check_number("period", period, 0, open_low=True)
    if loss_jump is None:
        loss_jump = _loss_jump(loss, epsilon, len(loss) if turn is None else turn)
    else:
        loss_jump = check_number("loss_jump", loss_jump, 0, open_low=True)
    lambda_jump = check_number("lambda_jump", lambda_jump, 0, open_low=True)
    if max_gap is None:
        max_gap = 500 if turn is None else max(10, round(turn / 10))
    max_gap = check_count("max_gap", max_gap, 1)
    if min_samples is None:
        min_samples = 10 if rule == "loss" else 1
    min_samples = check_count("min_samples", min_samples, 1)
    if rule == "limit":
        when, bound = lambda_step, check_number("limit", limit, 0)
        above = np.flatnonzero(~(lambda_max <= bound))  # True for NaN, as for the jumps
        first = last = above
    else:
        when, value, bound = (step, loss, loss_jump) if rule == "loss" else (lambda_step, lambda_max, lambda_jump)
        with np.errstate(invalid="ignore"):
            first = np.flatnonzero(~(np.abs(np.diff(value)) <= bound))  # True for NaN: a diverged run is unstable
        last = first + 1
    windows = _windows(when, first, last, max_gap, min_samples)
    if len(windows) == 1 and windows[0][1] - windows[0][0] >= WHOLE_RUN * (when[-1] - when[0]) > 0:
        warnings.warn(
            f"rule={rule!r}: expected calm stretches beside the unstable ones, got one window over the whole run: the "
            f"bound {bound:.3g} or max_gap={max_gap} does not tell them apart",
            stacklevel=2,
        )
    return [
        Instability(start, stop, _value_at(start, lambda_step, lambda_max), _value_at(stop, lambda_step, lambda_max))
        for start, stop in windows
    ]


def instability_threshold(instabilities: Iterable[Instability]) -> float:
    """Mean largest eigenvalue over the starts and stops of all windows; NaN if there is none.

    This is the horizontal line of the paper's Fig. 4, to be compared with `stability_limit`.

    Example:
        >>> instability_threshold([Instability(100, 200, 2.0, 2.5), Instability(300, 400, 1.5, math.nan)])
        2.0
    """
    values = [value for window in instabilities for value in (window.lambda_start, window.lambda_stop)]
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def detect_periods(
    step: Any,
    loss: Any,
    *,
    start: int | None = None,
    stop: int | None = None,
    drive: Oscillation | None = None,
    max_period: int = 16,
    segment: int = 64,
    tolerance: float = 0.15,
    min_amplitude: float = 1e-4,
) -> list[PeriodSegment]:
    """Measure the period of F(t) along a window: a bifurcation cascade reads 1, 2, 4, 8, ..., chaos.

    The window is cut into segments of `segment` steps. What is asked of a step is asked of the best stretch of steps
    around it, which may reach beyond segment and window, and what holds for three quarters of its steps holds for a
    segment: so the kinks and jumps of Γ(t), which are no dynamics, spoil only steps that lie between two of them and
    have no stretch of their own.

    * Smooth (period 1): F bends one way over 5 steps, and by much the same, as on every oscillation slower than six
      steps; or its amplitude \\|Δ⁴F\\|/16 is at most `min_amplitude` or rounding of the dtype that `loss` comes in.
      (Differences of that order do not see the trend of F; for F = a(-1)^t the amplitude is a.) Smooth pieces that
      repeat themselves as they are, kinks and all, every p <= `max_period` steps have period p instead.
    * Period p: let q <= `max_period` be the smallest period whose misfit, the largest
      \\|F(t+q) - 2F(t) + F(t-q)\\| along max(3q, 2q + 7) steps, is at most `tolerance` of \\|Δ²F\\|; then p is the
      smallest of q, 2q, 4q, ... <= `max_period` whose misfit is at most 3 times that of the best of them, or 1e-3. The
      misfit vanishes for every periodic signal whose amplitude and mean drift linearly. Noise adds the same to all of
      them and a true doubling lowers it, however little its branches differ.
    * Otherwise chaotic (None).

    A period above `max_period` reads as its largest part that fits to the tolerance, or as None; so does chaos
    within narrow bands, as their number. A window shorter than `segment` tries the periods up to a third of its
    length that leave 7 steps to compare; None there may also be a longer period.

    Neighbouring segments of one period are joined.

    Args:
        step: (S,) consecutive steps, one apart within the window.
        loss: (S,) loss at each of them.
        start: first step to look at, by default the first recorded.
        stop: last step to look at, by default the last recorded.
        drive: the oscillation whose Γ(step) weighs the loss. What of F is a combination of the class weights is then
            taken out of each segment first, so that a fast drive is no period either.
        max_period: largest period tried.
        segment: steps that are classified together, at least 3 `max_period` and 2 `max_period` + 7.
        tolerance: largest relative deviation from periodicity.
        min_amplitude: oscillations up to it (in units of F) count as smooth; may be 0.

    Returns:
        Segments that tile the window in order of time; none if the window has fewer than 11 steps, too few to
        tell an oscillation from chaos.

    Raises:
        ValueError: bad shapes or bounds, a step that is missing within the window, or a `drive` that is an ensemble.
        TypeError: values or bounds that are not real numbers, or a `max_period` or `segment` that is no integer.

    Example:
        >>> step = np.arange(256)
        >>> loss = np.where(step < 128, 0.1 * (-1.0) ** step, 0.1 * np.cos(step * np.pi / 2))
        >>> segments = detect_periods(step, loss)
        >>> segments
        [PeriodSegment(start=0, stop=127, period=2), PeriodSegment(start=128, stop=255, period=4)]
    """
    epsilon = _epsilon(loss)
    step, loss = _series("step", step, "loss", loss)
    max_period = check_count("max_period", max_period, 1)
    segment = check_count("segment", segment, 1)
    if segment < shortest(max_period):
        raise ValueError(f"segment: expected an int >= {shortest(max_period)} for {max_period=}, got {segment}")
    tolerance = check_number("tolerance", tolerance, 0, open_low=True)
    min_amplitude = check_number("min_amplitude", min_amplitude, 0)
    inside = np.ones(len(step), dtype=bool)
    if start is not None:
        inside &= step >= check_number("start", start, -math.inf)
    if stop is not None:
        inside &= step <= check_number("stop", stop, -math.inf)
    window = np.flatnonzero(inside)
    if np.any(np.diff(step[window]) != 1):
        raise ValueError("step: expected every step within the window, got some where one is missing")
    if len(window) < shortest(2):
        return []
    near = (step >= step[window[0]] - segment) & (step <= step[window[-1]] + segment)
    near &= step - step[window[0]] == np.arange(len(step)) - window[0]  # no step missing in between
    step, loss, window = step[near], loss[near], window - np.flatnonzero(near)[0]
    parts = np.array_split(window, max(1, len(window) // segment))
    if drive is not None:
        loss = _without_drive(step, loss, drive, parts)
    segments: list[PeriodSegment] = []
    for part, period in zip(parts, periods_of(loss, parts, epsilon, max_period, tolerance, min_amplitude), strict=True):
        first, last = int(step[part[0]]), int(step[part[-1]])
        if segments and segments[-1].period == period:
            first = segments.pop().start
        segments.append(PeriodSegment(first, last, period))
    return segments


def period_changes(segments: Iterable[PeriodSegment]) -> list[PeriodChange]:
    """The changes of period along a window, from what `detect_periods` found there.

    A change is known to about the length of the segments that were classified, 64 steps by default.

    Example:
        >>> period_changes([PeriodSegment(0, 127, 2), PeriodSegment(128, 255, 4)])
        [PeriodChange(step=128, before=2, after=4)]
    """
    pairs = itertools.pairwise(segments)
    return [PeriodChange(new.start, old.period, new.period) for old, new in pairs if old.period != new.period]


def branch_means(step: Any, values: Any, *, branches: int = 2) -> tuple[Array, Array]:
    """Means of eigenvalues over the branches of an oscillation: over each `branches` records that follow one another.

    Within an instability λ jumps with F, and with period 2 records an odd number of steps apart lie on both branches.

    Args:
        step: (S,) strictly increasing steps of the records.
        values: (S,) an eigenvalue, or (S, k) several.
        branches: records in a mean: 2, or the period of the oscillation where every step is recorded; 1 for none.

    Returns:
        (M,) steps, each the middle record's (the later one of two), and the (M,) or (M, k) means, with
        M = max(0, S - branches + 1).

    Raises:
        ValueError: shapes that differ, steps that do not increase, `branches` below 1.
        TypeError: values that are not real numbers.

    Example:
        >>> branch_means([0, 25, 50], [1.0, 3.0, 1.0])
        (array([25, 50]), array([2., 2.]))
    """
    values = check_array("values", values, kinds="iuf")
    if values.ndim not in (1, 2):
        raise ValueError(f"values: expected shape (S,) or (S, k), got {values.shape}")
    branches = check_count("branches", branches, 1)
    step, _ = _series("step", step, "values", np.arange(len(values)))
    if len(step) < branches:
        return step[:0], values[:0].astype(np.float64)
    with np.errstate(invalid="ignore"):  # a diverged run has infinities of both signs
        means = sliding_window_view(values.astype(np.float64), branches, axis=0).mean(-1)
    middle = branches // 2
    return step[middle : middle + len(means)], means


def crossings(
    step: Any, values: Any, threshold: float, *, branches: int = 2, margin: float | None = None
) -> list[Crossing]:
    """Where recorded eigenvalues, averaged over the branches of their oscillation, pass through a threshold.

    A crossing counts once the mean of `branch_means` lies beyond the threshold by more than `margin` on the other
    side, and is dated back to where it last passed through: so neither alternation nor noise within the margin makes
    more than one of it. None is found across records that are not finite. Means of two still alternate with period 4:
    where every step is recorded, `branches=8` levels the periods 2, 4 and 8.

    Args:
        step: (S,) strictly increasing steps of the records.
        values: (S,) an eigenvalue, or (S, k) several, each by itself.
        threshold: what they cross, such as the optimizer's `stability_limit`.
        branches: records in a mean.
        margin: in units of `values`; by default a hundredth of the threshold's size.

    Returns:
        The crossings in order of time, and of `index` where they fall on one step.

    Raises:
        ValueError: shapes that differ, steps that do not increase, a bound out of range or not finite.
        TypeError: values or bounds that are not real numbers.

    Example:
        >>> step = np.arange(0, 100, 10)
        >>> crossings(step, 1.5 + step / 80, threshold=2.0, branches=1)
        [Crossing(step=50, index=0, upward=True)]
    """
    threshold = check_number("threshold", threshold, -math.inf, open_low=True)
    margin = abs(threshold) / 100 if margin is None else check_number("margin", margin, 0)
    step, means = branch_means(step, values, branches=branches)
    found: list[Crossing] = []
    for index, mean in enumerate(np.atleast_2d(means.T)):
        above = mean > threshold
        known = np.flatnonzero(~(np.abs(mean - threshold) <= margin))  # NaN too: nothing is found across it
        for old, new in itertools.pairwise(known):
            if np.isfinite(mean[[old, new]]).all() and above[old] != above[new]:
                last = old + np.flatnonzero(above[old:new] == above[old])[-1]
                found.append(Crossing(int(step[last + branches % 2]), index, bool(above[new])))
    return sorted(found, key=lambda crossing: (crossing.step, crossing.index))


def _epsilon(value: Any) -> float:
    """Relative rounding of the numbers as they were recorded: float32's are jagged to float64."""
    if isinstance(value, torch.Tensor):
        return torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    array = np.asarray(value)
    return float(np.finfo(array.dtype).eps) if array.dtype.kind == "f" else 0.0


def _series(step_name: str, step: Any, value_name: str, value: Any) -> tuple[Array, Array]:
    step, value = check_array(step_name, step, 1, kinds="iuf"), check_array(value_name, value, 1, kinds="iuf")
    if len(step) != len(value):
        raise ValueError(f"{value_name}: expected {len(step)} values, as many as in {step_name}, got {len(value)}")
    if step.dtype.kind == "u":  # whose differences are never negative
        step = step.astype(np.int64)
    if not (np.all(np.isfinite(step)) and np.all(np.diff(step) > 0)):
        raise ValueError(f"{step_name}: expected finite, strictly increasing steps, got others")
    return step, value.astype(np.float64)


def _loss_jump(loss: Array, epsilon: float, turn: float) -> float:
    finite = loss[np.isfinite(loss)]
    if len(finite) == 0:
        return 0.0
    low, high = np.quantile(finite, (0.01, 0.99))
    rounding = 2 * epsilon * max(abs(low), abs(high))
    if high - low <= rounding:
        return float(rounding)
    return float(10.0 ** np.round(np.log10(high - low)) * min(max(1e-3, 5 / turn), 0.5))


def _windows(step: Array, first: Array, last: Array, max_gap: int, min_samples: int) -> list[tuple[int, int]]:
    """(first, last) step of every run of jumps, each given by the places of the records that it leaves and reaches."""
    if len(first) == 0:
        return []
    breaks = np.flatnonzero(np.diff(step[first]) > max_gap) + 1
    runs = zip(np.split(first, breaks), np.split(last, breaks), strict=True)
    return [(int(step[left[0]]), int(step[right[-1]])) for left, right in runs if len(left) >= min_samples]


def _value_at(when: int, step: Array, value: Array) -> float:
    if len(step) == 0:
        return math.nan
    return float(value[min(int(np.searchsorted(step, when)), len(step) - 1)])


def _without_drive(step: Array, loss: Array, drive: Oscillation, parts: list[Array]) -> Array:
    """F as it were at Γ = 1: along each segment the class losses that explain most of it are taken to stand still."""
    if not isinstance(drive, Oscillation):
        raise TypeError(f"drive: expected an Oscillation or None, got {type(drive).__name__}")
    if drive.ensemble_size is not None:
        raise ValueError(f"drive: expected a single oscillation, got an ensemble of {drive.ensemble_size}")
    weights: Array = drive.weights(torch.from_numpy(step.astype(np.int64))).numpy()
    plain: Array = loss.copy()
    for part in parts:
        if np.all(np.isfinite(loss[part])):
            class_losses = np.linalg.lstsq(weights[part], loss[part])[0]
            plain[part] -= (weights[part] - 1) @ class_losses
    return plain
