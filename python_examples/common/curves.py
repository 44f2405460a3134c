"""Training curves of several runs: accuracy and loss against the epoch, mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dynloss_ext.plot import EIGENVALUE_COLOURS, STYLE

Metrics = Mapping[str, NDArray[Any]]


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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for (label, runs), colour in zip(groups.items(), EIGENVALUE_COLOURS, strict=False):
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
