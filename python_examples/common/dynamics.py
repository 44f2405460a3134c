"""What a sweep keeps of a run's dynamics: instabilities, and the periods of the last cycle."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.sweep import Row
from dynloss_ext import Oscillation
from dynloss_ext.instability import detect_instabilities, detect_periods

CHAOS = 0  # how a table says that no period fits


def dynamics(step: NDArray[Any], weighted: NDArray[Any], drive: Oscillation, start: int, end: int) -> Row:
    """How often F was unstable, and which periods it went through in the last cycle, steps [start, end).

    What of F is a combination of the class weights of the drive is no dynamics, and taken out.
    """
    none = np.empty(0)
    windows = []
    if np.isfinite(weighted).all():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of one window over all of a run: there may be such members
            windows = detect_instabilities(step, weighted, none, none, period=drive.period.item())
    segments = detect_periods(step, weighted, start=start, stop=end - 1, drive=drive)
    lengths: dict[int, int] = {}
    for part in segments:
        key = CHAOS if part.period is None else part.period
        lengths[key] = lengths.get(key, 0) + part.stop - part.start + 1
    known = bool(lengths) and bool(np.isfinite(weighted[(step >= start) & (step < end)]).all())
    return {
        "num_instabilities": len(windows),
        "period_found": max(lengths, key=lambda key: lengths[key]) if known else None,
        "richest_period": (CHAOS if CHAOS in lengths else max(lengths)) if known else None,
        "unstable_share": 1 - lengths.get(1, 0) / sum(lengths.values()) if known else None,
    }


def finite_or_none(row: Row) -> Row:
    """As a table with missing values keeps it."""
    return {name: None if isinstance(x, float) and not np.isfinite(x) else x for name, x in row.items()}
