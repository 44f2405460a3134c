"""Bifurcations of Myrtle5 on three classes of CIFAR-10 (supplementary Fig. 2): accuracy, loss and λ₁..λ₃.

Full-batch gradient descent under the dynamical loss.  The largest Hessian eigenvalue rises while a class is
raised; where it passes the stability limit 2 / lr the loss starts to jump between branches.

    python python_examples/myrtle5_bifurcations.py --data DATA --out runs/bifurcations
    python python_examples/myrtle5_bifurcations.py --data DATA --preset cpu --out runs/bifurcations

The paper gives the data (3000 images of the first three classes) and the network; A, T, the learning rate and
the batch are not published: the defaults here are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from common.analysis import analyse, comparison, figure
from common.cli import parse_config
from common.config import TrainingConfig
from common.distributed import is_main_process
from common.recording import RunFolder
from common.training import train

PAPER: dict[str, Any] = {
    "classes": 3,
    "train_images": 3000,
    "validation_images": 1500,
    "lr": 0.05,
    "amplitude": 20.0,
    "period": 500.0,
    "epochs": 10_000,
    "eig_every": 10,
    "validate_every": 50,
    "checkpoint_every": 250,
}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "width": 16,
        "train_images": 300,
        "validation_images": 300,
        "epochs": 3000,
        "eig_every": 20,
        "channels_last": True,
    },
    "smoke": {
        "width": 4,
        "train_images": 60,
        "validation_images": 60,
        "period": 12.0,
        "epochs": 60,
        "eig_every": 5,
        "validate_every": 20,
    },
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    description = (__doc__ or "").splitlines()[0]
    config = parse_config(TrainingConfig, description, argv, defaults=PAPER, presets=PRESETS)
    summary = train(config)
    if summary["finished"] and is_main_process():
        summary |= report(config)
    return summary


def report(config: TrainingConfig) -> dict[str, Any]:
    """Finds the instabilities in the finished run, draws the figure and adds both to the folder."""
    folder = RunFolder(config.out)
    metrics, summary = folder.read_metrics(), folder.read_summary()
    analysis = analyse(metrics)
    summary |= analysis.summary()
    limit = summary["stability_limit"]
    folder.write_summary(summary)
    size = f"width {config.width}, {summary['num_training_images']} images"
    title = f"Myrtle5 ({size}), A = {config.amplitude:g}, T = {config.period:g}, learning rate {config.lr:g}"
    folder.write_figure(figure(metrics, analysis, limit, title))
    print(analysis.table())
    print(comparison(analysis.threshold, limit))
    print(f"final accuracy {summary['accuracy']:.4f}; files in {folder.path}")
    return summary


if __name__ == "__main__":
    sys.exit(0 if main()["finished"] else 130)  # 130: the shell's code for Ctrl-C
