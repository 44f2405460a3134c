"""The period of a loss, stretch by stretch: what `instability.detect_periods` finds in the values alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]

MIN_COMPARISONS = 7  # so that the shortest default window, 10 jumps in 11 steps, can still read period 2
CLEAN = 0.75  # of a segment's steps that must be alike; kinks and jumps of the drive every 10 steps spoil 0.12 of them
DOUBLING_GAIN = 3.0  # each doubling of a cascade lowers the misfit 3.3 times (√(2/(α⁻² + α⁻⁴)), Feigenbaum's α)
DOUBLING_FLOOR = 1e-3  # of rms(Δ²F): below lie rounding and what is left of a doubling that has decayed


def periods_of(
    loss: Array, parts: list[Array], epsilon: float, max_period: int, tolerance: float, min_amplitude: float
) -> Iterator[int | None]:
    """The period of each segment. A stretch may reach beyond: its steps on this side repeat as well."""
    with np.errstate(invalid="ignore", over="ignore"):
        jagged = _jagged(loss, epsilon, min_amplitude)
        deviations = {p: _deviation(loss, p) for p in range(1, max_period + 1) if shortest(p) <= len(parts[0])}
    around = _least_around(jagged, 5)
    misfits = {p: _misfit(deviation, p) for p, deviation in deviations.items() if p > 1}
    for part in parts:
        first, length = part[0], len(part)
        if not np.all(np.isfinite(loss[part])):
            yield None
        elif np.mean(around[part]) <= 1 - CLEAN:
            exact = {p: float(d[first : first + length - 2 * p].max()) for p, d in deviations.items()}
            kinked = jagged[first : first + length - 4].any() and np.abs(np.diff(loss[part], 4)).max() >= exact[1]
            yield (_fitting(exact, exact.pop(1), tolerance) if kinked else None) or 1
        else:
            misfit = {p: _clean(values[part]) for p, values in misfits.items()}
            yield _fitting(misfit, _clean(deviations[1][first : first + length - 2]), tolerance)


def _fitting(misfit: dict[int, float], size: float, tolerance: float) -> int | None:
    """The smallest period that fits, or that of its doublings that fits better than noise would have it."""
    fitting = next((period for period in misfit if misfit[period] <= tolerance * size), None)
    if fitting is None:
        return None
    doublings = [fitting << times for times in range(len(misfit)) if fitting << times in misfit]
    bound = max(DOUBLING_GAIN * min(misfit[period] for period in doublings), DOUBLING_FLOOR * size)
    return next(period for period in doublings if misfit[period] <= bound)


def _jagged(loss: Array, epsilon: float, min_amplitude: float) -> Array:
    """Whether each 5 steps are more than a piece of a curve, as a float."""
    bends, fourth = sliding_window_view(np.diff(loss, 2), 3), np.abs(np.diff(loss, 4))
    one_way = (bends.min(1) >= 0) | (bends.max(1) <= 0)
    rounding = epsilon * sliding_window_view(np.abs(loss), 5).max(1)
    smooth = one_way & (fourth < np.abs(bends).max(1)) | (fourth / 16 <= np.maximum(min_amplitude, rounding))
    jagged: Array = np.where(smooth, 0.0, 1.0)
    return jagged


def _deviation(loss: Array, period: int) -> Array:
    deviation: Array = np.abs(loss[2 * period :] - 2 * loss[period:-period] + loss[: -2 * period])
    return deviation


def _misfit(deviation: Array, period: int) -> Array:
    """At each step, how far the best `shortest(period)` steps around it are from repeating themselves."""
    width = shortest(period)
    return _least_around(sliding_window_view(deviation, width - 2 * period).max(1), width)


def _least_around(values: Array, width: int) -> Array:
    """For each step the smallest of the values of the stretches of `width` steps that it lies in."""
    padded = np.pad(np.where(np.isnan(values), np.inf, values), width - 1, constant_values=np.inf)
    least: Array = sliding_window_view(padded, width).min(1)
    return least


def _clean(values: Array) -> float:
    return float(np.quantile(values, CLEAN, method="higher"))


def shortest(period: int) -> int:
    """Steps in which a period can be told from chaos, and be it period 2."""
    period = max(period, 2)
    return max(3 * period, 2 * period + MIN_COMPARISONS)
