"""Bifurcations of Myrtle5 on three classes of CIFAR-10 (supplementary Fig. 2): accuracy, loss and λ₁..λ₃.

Full-batch gradient descent under the dynamical loss.  The largest Hessian eigenvalue rises while a class is
raised; where it passes the stability limit 2 / lr the loss starts to jump between branches.

    python python_examples/myrtle5_bifurcations.py --data DATA --out runs/bifurcations
    python python_examples/myrtle5_bifurcations.py --data DATA --preset cpu --out runs/bifurcations

figures/myrtle5_bifurcations_cpu holds the run of `--preset cpu` on CIFAR-10: λ_max passes 2 / lr = 40 between
steps 225 and 250, F and the accuracy split into two branches at step 260; both are smooth again while λ_max is
below 40 (steps 2011 to 2300), and split anew at step 2315.  The steps are those of one run: rounding moves them.

The paper gives the data (3000 images of the first three classes) and the network; A, T, the learning rate and
the batch are not published: the defaults here are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import TrainingConfig, parse_options
from common.data import CLASS_NAMES
from common.distributed import is_main_process
from common.report import Analysis, analyse, trajectory
from common.run import Metrics, RunFolder, in_one_line
from common.training import Record, train

Array = NDArray[Any]

PAPER = TrainingConfig(
    out=Path("runs/myrtle5_bifurcations"),
    classes=3,
    train_images=3000,
    validation_images=1500,
    lr=0.05,
    amplitude=20.0,
    period=500.0,
    epochs=10_000,
    eig_every=10,
    validate_every=50,
    checkpoint_every=250,
)
PRESETS = {
    "paper": PAPER,
    "cpu": replace(
        PAPER,
        preset="cpu",
        width=16,
        train_images=300,
        validation_images=300,
        epochs=2500,
        eig_every=25,
        eig_tol=1e-2,
        channels_last=True,
    ),
    "smoke": replace(
        PAPER,
        preset="smoke",
        width=4,
        train_images=60,
        validation_images=60,
        period=12.0,
        epochs=60,
        eig_images=30,
        eig_tol=1e-2,
        validate_every=20,
    ),
}


@in_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_options(PAPER, __doc__, argv, PRESETS)
    (record,) = train(config)
    return report(config, record) if record.summary["finished"] and is_main_process() else record.summary


def report(config: TrainingConfig, record: Record) -> dict[str, Any]:
    """Finds the instabilities in the finished run, draws the figure and adds both to the folder."""
    folder, metrics, limit = RunFolder(config.out), record.metrics, record.summary["stability_limit"]
    analysis = oscillations(metrics, limit)
    crossings = upward_crossings(metrics["eig_step"], metrics["eigenvalues"], limit, hold=config.period / 5)
    summary = folder.write_summary(record.summary | analysis.summary() | {"limit_crossings": crossings})
    size = f"width {config.width}, {summary['num_training_images']} images"
    title = f"Myrtle5 ({size}), A = {config.amplitude:g}, T = {config.period:g}, learning rate {config.lr:g}"
    names = CLASS_NAMES[: config.classes]
    zoom = _zoom(analysis, config)
    folder.write_figure(trajectory(metrics, analysis, zoom, limit=limit, class_names=names, title=title))
    print(analysis.table())
    print(analysis.comparison(limit))
    print(f"λ_max {rises(limit, crossings)}")
    print(f"final accuracy {summary['accuracy']:.4f}; files in {folder.path}")
    return summary


def oscillations(metrics: Metrics, limit: float | None = None) -> Analysis:
    """Windows in which F jumps to and fro.

    Here F falls by more than the usual 1e-3 a step while it is perfectly smooth; so the jumps are those of
    F(t) - (F(t-1) + F(t+1)) / 2, in which a trend cancels and an alternation stays as it is.
    """
    loss = metrics["weighted_loss"]
    alternating = np.zeros_like(loss)
    alternating[1:-1] = loss[1:-1] - (loss[:-2] + loss[2:]) / 2
    return analyse(metrics, signal=alternating, limit=limit, loss_jump=1e-3, max_gap=10)


def upward_crossings(eig_step: Array, eigenvalues: Array, limit: float, hold: float) -> list[int]:
    """Last records of λ_max below the limit before it rises above, after at least `hold` steps below.

    Without `hold` every second record of an oscillating run would count: the two branches differ in λ_max.
    """
    above = eigenvalues[:, 0] > limit
    crossings = []
    for index in range(len(eig_step) - 1):
        recent = (eig_step > eig_step[index] - hold) & (eig_step <= eig_step[index])
        if above[index + 1] and not above[recent].any():
            crossings.append(int(eig_step[index]))
    return crossings


def rises(limit: float, crossings: Sequence[int]) -> str:
    """What λ_max does, in words."""
    if not crossings:
        return f"never rises through {limit:g}"
    return f"rises through {limit:g} after step {', '.join(map(str, crossings))}"


def _zoom(analysis: Analysis, config: TrainingConfig) -> tuple[float, float] | None:
    """The onset of the first oscillation, where the curve splits into branches."""
    if not analysis.oscillating:
        return None
    start = analysis.oscillating[0].start
    return max(0.0, start - 0.2 * config.period), min(config.epochs - 1.0, start + 0.8 * config.period)


if __name__ == "__main__":
    sys.exit(0 if main()["finished"] else 130)  # 130: the shell's code for Ctrl-C
