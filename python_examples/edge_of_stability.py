"""Six optimizers at the edge of stability: the curvature that each sees, against its own limit.

Trains a small convolutional network with SGD, momentum, Nesterov's momentum, Adam, AdamW and RMSprop, on all images at
once, in large and in small mini-batches, and follows the largest eigenvalue of the Hessian of the whole loss,
preconditioned by what the optimizer divides by (Cohen et al., arXiv 2103.00065 and 2207.14484). Of SGD in mini-batches
also the batch sharpness (Andreyev and Beneventano, arXiv 2412.20553).

    python python_examples/edge_of_stability.py --out runs/edge_of_stability
    python python_examples/edge_of_stability.py --data DIR --out runs/edge_of_stability_cifar10
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from common.config import parse_options
from common.data import load_cifar10, synthetic_cifar10
from common.records import Table
from common.run import BaseConfig, RunFolder, in_one_line, resolve_device
from dynloss_ext import EigenTracker, HessianOperator, batch_sharpness, plot, preconditioner, stability_limit

Array = NDArray[Any]
Optimizer = torch.optim.Optimizer


class Setting(NamedTuple):
    """An optimizer, and learning rates at which the made-up images take it to its limit."""

    make: Callable[..., Optimizer]
    rate: float
    small_batch_rate: float  # momentum diverges of their noise at the other
    of_hessian: bool = False  # whether it sees the curvature of the loss itself, as none does that divides by √v


SGD = torch.optim.SGD
OPTIMIZERS = {
    "SGD": Setting(SGD, 0.2, 0.4, True),
    "momentum": Setting(partial(SGD, momentum=0.9), 0.3, 0.06, True),
    "Nesterov": Setting(partial(SGD, momentum=0.9, nesterov=True), 0.15, 0.075, True),
    "Adam": Setting(torch.optim.Adam, 0.003, 0.003),
    "AdamW": Setting(partial(torch.optim.AdamW, weight_decay=0.1), 0.003, 0.003),
    "RMSprop": Setting(partial(torch.optim.RMSprop, alpha=0.999), 0.001, 0.003),
}
#: Updates in each kind of batch over --steps: progress by epoch is slower the fewer of them an epoch has.
BATCHES = {"full batch": 1.0, "large batches": 2.5, "small batches": 7.0}


@dataclass(frozen=True, kw_only=True)
class EdgeConfig(BaseConfig):
    """The network has two convolutions and a linear layer; the loss is the mean of squares, as in the papers."""

    preset: Literal["cpu", "smoke"] = "cpu"  # a named set of defaults
    out: Path = Path("runs/edge_of_stability")  # folder: config, metrics, summary, figures
    data: Path | None = None  # folder with CIFAR-10, or the archive itself; none: small made-up images
    images: int = 200  # training images
    width: int = 8  # channels
    large_batch: int = 50  # images of a mini-batch
    small_batch: int = 10  # the same, where there is much noise
    steps: int = 1500  # full-batch updates of each optimizer; 2.5 times as many in large and 7 times in small batches
    records: int = 60  # eigenvalues along each run
    sharpness_batches: int = 40  # mini-batches for the batch sharpness
    rate: float = 1.0  # factor on the learning rate of each optimizer, chosen to come to its limit

    def __post_init__(self) -> None:
        for name in ("images", "width", "large_batch", "small_batch", "steps", "records", "sharpness_batches"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("rate", self.rate > 0, "more than 0")
        for name in ("large_batch", "small_batch"):
            self.require(name, getattr(self, name) <= self.images, "at most --images")
        self.require("records", self.records <= self.steps, "at most --steps")
        self.require("resume", not self.resume, "no --resume: a run takes minutes and is made in one go")

    def batch_size(self, batches: str) -> int:
        """Images of a batch of one of BATCHES."""
        sizes = {"full batch": self.images, "large batches": self.large_batch, "small batches": self.small_batch}
        return sizes[batches]


PRESETS = {
    "cpu": EdgeConfig(),
    "smoke": replace(
        EdgeConfig(),
        preset="smoke",
        images=10,
        width=2,
        large_batch=5,
        small_batch=2,
        steps=4,
        records=2,
        sharpness_batches=2,
    ),
}


@in_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_options(EdgeConfig(), __doc__, argv, PRESETS)
    device = resolve_device(config.device)
    images, labels = (t.to(device) for t in data_of(config))
    folder = RunFolder(config.out).claim()
    folder.write_config(config.as_dict())
    runs = [(name, batches) for name in OPTIMIZERS for batches in BATCHES]
    curves = {(name, batches): train(config, name, batches, images, labels) for name, batches in tqdm(runs)}
    folder.write_metrics(
        {f"{name} {batches} {column}": a for (name, batches), c in curves.items() for column, a in c.items()}
    )
    summary = {name: {batches: ending(curves[name, batches]) for batches in BATCHES} for name in OPTIMIZERS}
    folder.write_figure(figure(curves))
    for name in OPTIMIZERS:
        folder.write_figure(figure_of(name, {batches: curves[name, batches] for batches in BATCHES}), f"{name}.png")
    for name, batches in runs:
        end = summary[name][batches]
        print(f"{name:<9} {batches:<13} loss {end['loss']:9.2e}  λ {end['share']:5.2f} of the limit {end['limit']:.4g}")
    print(f"files in {folder.path}")
    return folder.write_summary(summary)


def data_of(config: EdgeConfig) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) float32 of mean 0 and variance 1, and one-hot labels (N, 10).

    Made-up images have labels at random: only what is hard to learn drives the curvature up to the limit.
    """
    made_up = config.data is None
    data = synthetic_cifar10(-(-config.images // 10), 1, config.seed) if made_up else load_cifar10(config.data)
    split = data.train.subset(10, config.images)
    images, labels = split.images.float(), split.labels.long()
    if made_up:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed))]
    return (images - images.mean()) / images.std(), nn.functional.one_hot(labels, 10).float()


def train(config: EdgeConfig, name: str, batches: str, images: Tensor, labels: Tensor) -> Mapping[str, Array]:
    """One optimizer's run: step, loss of all images, largest eigenvalue that it sees, limit, and batch sharpness, the
    mean over batches and weighted by their gradients."""
    torch.manual_seed(config.seed)
    model = network(config.width).to(images.device)
    params = list(model.parameters())
    setting = OPTIMIZERS[name]
    size = config.batch_size(batches)
    rate = setting.small_batch_rate if batches == "small batches" else setting.rate
    optimizer = setting.make(params, lr=config.rate * rate)
    steps = round(config.steps * BATCHES[batches])
    every = steps // config.records
    measures_sharpness = setting.of_hessian and batches != "full batch"
    tracker = EigenTracker(k=1, tol=1e-2)
    generator = torch.Generator().manual_seed(config.seed)
    table = Table("step", "loss", "eigenvalue", "limit", "sharpness", "weighted_sharpness")

    def loss_of(rows: Tensor) -> tuple[Tensor, int]:
        return (model(images[rows]) - labels[rows]).square().sum() / 2, len(rows)

    def draw() -> Tensor:
        return torch.randperm(len(images), generator=generator)[:size].to(images.device)

    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss, count = loss_of(draw())
        (loss / count).backward()
        optimizer.step()
        if step % every == 0:
            whole, count = loss_of(torch.arange(len(images), device=images.device))
            if not whole / count < 1e3:  # diverged, from less than 1: the curve ends here
                break
            H = HessianOperator(whole / count, params)
            seen = H.preconditioned(preconditioner(optimizer))
            sharpness = [float("nan")] * 2
            if measures_sharpness:
                drawn = [draw() for _ in range(config.sharpness_batches)]
                sharpness = [batch_sharpness(loss_of, params, drawn, weighted=w).value for w in (False, True)]
            table.append(
                step=step,
                loss=float(whole.detach()) / count,
                eigenvalue=float(tracker.update(seen).values[0]),
                limit=stability_limit(optimizer),
                sharpness=sharpness[0],
                weighted_sharpness=sharpness[1],
            )
    return table.arrays()


def network(width: int) -> nn.Module:
    """Smooth, so that the Hessian is all of the curvature."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )


def ending(curve: Mapping[str, Array]) -> dict[str, float]:
    """Medians over the last quarter of the records, in units of the limit: there the eigenvalue goes up and down."""
    shares = {"share": "eigenvalue", "batch sharpness": "sharpness", "weighted batch sharpness": "weighted_sharpness"}
    if not len(curve["step"]):
        return dict.fromkeys(("loss", "limit", *shares), float("nan"))
    last = slice(3 * len(curve["step"]) // 4, None)
    return {"loss": float(curve["loss"][-1]), "limit": float(curve["limit"][-1])} | {
        name: float(np.median(curve[column][last] / curve["limit"][last])) for name, column in shares.items()
    }


@matplotlib.rc_context(plot.STYLE)
def figure(curves: Mapping[tuple[str, str], Mapping[str, Array]]) -> Figure:
    """A panel for each optimizer and way of batching, in units of its limit."""
    drawn = Figure(figsize=(9.6, 1.5 * len(OPTIMIZERS)), layout="constrained")
    axes = drawn.subplots(len(OPTIMIZERS), len(BATCHES), sharex="col", sharey=True)
    for row, name in zip(axes, OPTIMIZERS, strict=True):
        for axis, batches in zip(row, BATCHES, strict=True):
            draw_shares(axis, name, batches, curves[name, batches])
        row[0].set_ylabel(share_of(name))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0, 0].set(ylim=(0, 1.6))
    if axes[0, -1].get_legend_handles_labels()[0]:
        axes[0, -1].legend(loc="upper right")
    return drawn


@matplotlib.rc_context(plot.STYLE)
def figure_of(name: str, curves: Mapping[str, Mapping[str, Array]]) -> Figure:
    """One optimizer's: the loss of all images over the eigenvalue, a column for each way of batching."""
    drawn = Figure(figsize=(9.6, 4.2), layout="constrained")
    above, below = drawn.subplots(2, len(BATCHES), sharex="col", sharey="row")
    for loss, share, batches in zip(above, below, BATCHES, strict=True):
        loss.semilogy(curves[batches]["step"], curves[batches]["loss"], color="black")
        draw_shares(share, name, batches, curves[batches])
        share.set_xlabel("step")
    above[0].set_ylabel("loss")
    below[0].set(ylabel=share_of(name), ylim=(0, 1.6))
    if below[-1].get_legend_handles_labels()[0]:
        below[-1].legend(loc="upper right")
    return drawn


def draw_shares(axis: Axes, name: str, batches: str, curve: Mapping[str, Array]) -> None:
    """The eigenvalue and both batch sharpnesses in units of the limit."""
    axis.plot(curve["step"], curve["eigenvalue"] / curve["limit"], color=plot.EIGENVALUE_COLOURS[1])
    if np.isfinite(curve["sharpness"]).any():
        for column, colour, label in (
            ("sharpness", plot.EIGENVALUE_COLOURS[0], "batch sharpness"),
            ("weighted_sharpness", plot.EIGENVALUE_COLOURS[2], "weighted by $|g|^2$"),
        ):
            axis.plot(curve["step"], curve[column] / curve["limit"], color=colour, lw=0.5, label=label)
    axis.axhline(1.0, color=plot.STOP_COLOUR, ls=":")
    limit = f"limit {curve['limit'][-1]:,.5g}" if len(curve["limit"]) else "diverged at once"
    axis.set_title(f"{name}, {batches}: {limit}", loc="left", fontsize="small")


def share_of(name: str) -> str:
    """What is drawn of an optimizer."""
    kind = "" if OPTIMIZERS[name].of_hessian else "preconditioned\n"
    return f"{kind}$\\lambda_1$ / limit"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
