"""WRN-28-10 on CIFAR-10 under the dynamical loss (the training of supplementary Fig. 4).

    python python_examples/wrn28_10_cifar10.py --data DATA --out runs/wrn
    python python_examples/wrn28_10_cifar10.py --data DATA --out runs/wrn --device cuda --fast
    torchrun --nproc-per-node 8 python_examples/wrn28_10_cifar10.py --data DATA --out runs/wrn
    python python_examples/wrn28_10_cifar10.py --data DATA --preset cpu --out runs/wrn

The batch of 1024 is cut into 8 shards of 128 with their own BatchNorm statistics, as in the paper, on
however many devices there are.  Not published, so ours: weight decay 5e-4, Nesterov's momentum.  A = 1 is the
baseline of 95.5 %; the paper's figure varies --amplitude at T = 200.

figures/wrn28_10_cifar10_cpu holds the run of `--preset cpu`: WRN-10-1, 10 epochs of the 50,000 images, A = 1,
validation accuracy 0.78 on 2000 images.  It shows that the training works, and nothing about oscillations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import TrainingConfig, parse_options
from common.distributed import is_main_process
from common.report import training_curves
from common.run import RunFolder, in_one_line
from common.training import Record, train

PAPER = TrainingConfig(
    out=Path("runs/wrn28_10_cifar10"),
    model="wrn",
    depth=28,
    widen=10,
    augment=True,
    amplitude=1.0,
    period=200.0,
    epochs=200,
    batch_size=1024,
    shards=8,
    lr=0.1,
    schedule="cosine",
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    channels_last=True,
)
SMALL = replace(PAPER, depth=10, widen=1, shards=2)
PRESETS = {
    "paper": PAPER,
    "cpu": replace(SMALL, preset="cpu", validation_images=2000, batch_size=128, epochs=10),
    "smoke": replace(SMALL, preset="smoke", train_images=200, validation_images=100, batch_size=64, epochs=2),
}


@in_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_options(PAPER, __doc__, argv, PRESETS)
    (record,) = train(config)
    if record.summary["finished"] and is_main_process():
        report(config, record)
    return record.summary


def report(config: TrainingConfig, record: Record) -> None:
    """Draws the training curves and prints where they end."""
    folder, summary = RunFolder(config.out), record.summary
    name = f"WRN-{config.depth}-{config.widen}"
    label = f"A = {config.amplitude:g}" + (f", T = {config.period:g}" if config.amplitude > 1 else "")
    if summary["validation_accuracy"] is not None:
        title = f"{name}, {summary['num_training_images']:,} images"
        folder.write_figure(training_curves({label: [record.metrics]}, summary["steps_per_epoch"], title=title))
        print(f"{name}, {label}: validation accuracy {summary['validation_accuracy']:.4f}")
    print(f"{summary['images_per_second']:.0f} images/s; files in {folder.path}")


if __name__ == "__main__":
    sys.exit(0 if main()["finished"] else 130)  # 130: the shell's code for Ctrl-C
