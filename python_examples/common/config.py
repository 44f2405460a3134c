"""The options of a training run on CIFAR-10, and the objects that they stand for."""
# ruff: noqa: RUF009 - option() is dataclasses.field with help attached

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from common.cifar10 import IMAGE_BYTES, NUM_CLASSES, Dataset, load_cifar10, synthetic_cifar10
from common.cli import BaseConfig, option
from common.download import download_cifar10
from common.models import mlp, myrtle5, wide_resnet
from common.schedules import Schedule, constant, cosine, piecewise_linear
from dynloss_ext import Oscillation

PRECISIONS = ("float32", "tf32", "float64", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(BaseConfig):
    """Everything that determines a run.  A step is one update; an epoch of a full-batch run is one step."""

    # data
    data: Path | None = option(None, "folder with CIFAR-10, or the archive itself", metavar="DIR", may_change=True)
    download: bool = option(False, "fetch CIFAR-10 into --data first, if it is not there", may_change=True)
    synthetic: bool = option(False, "train on a small made-up data set instead")
    classes: int = option(NUM_CLASSES, "use the first K classes", metavar="K")
    train_images: int | None = option(None, "use at most N training images, balanced", metavar="N")
    validation_images: int | None = option(None, "use at most N test images, balanced", metavar="N")
    augment: bool = option(False, "random flips and crops of the training images")
    # network
    model: str = option("myrtle5", "network", choices=("mlp", "myrtle5", "wrn"))
    width: int = option(64, "channels of Myrtle5, hidden units of the MLP")
    depth: int = option(28, "layers of the wide residual network")
    widen: int = option(10, "widening factor of the wide residual network")
    bias: bool = option(True, "biases in Myrtle5 and the MLP")
    batchnorm: bool = option(False, "BatchNorm in Myrtle5")
    # dynamical loss
    amplitude: float = option(1.0, "amplitude A of the oscillation; 1 is plain cross-entropy", metavar="A")
    period: float = option(100.0, "steps T that each class is raised for", metavar="T")
    waveform: str = option("triangle", "shape of the oscillation", choices=("triangle", "sine", "square"))
    stop_epoch: int | None = option(None, "from this epoch on A = 1", metavar="EPOCH")
    # optimisation
    epochs: int = option(100, "passes over the training images")
    batch_size: int | None = option(None, "images per global batch (default: all of them)")
    shards: int | None = option(
        None, "parts a batch is cut into, each with its own BatchNorm statistics (default: one per process)"
    )
    lr: float = option(0.1, "largest learning rate")
    schedule: str = option("constant", "learning rate over time", choices=("constant", "piecewise", "cosine"))
    peak_epoch: int = option(300, "epoch of the largest rate (piecewise: from 0 to --lr here, then to --final-lr)")
    final_lr: float = option(0.002, "learning rate at the end (piecewise)")
    momentum: float = option(0.0, "momentum")
    nesterov: bool = option(False, "Nesterov's form of the momentum")
    weight_decay: float = option(0.0, "L2 coefficient, as in torch.optim.SGD")
    sync_batchnorm: bool = option(False, "BatchNorm over the batches of all processes (CUDA)")
    # measurements
    validate_every: int = option(1, "epochs between validations; 0: never")
    eig_every: int = option(0, "steps between Hessian eigenvalues; 0: never")
    num_eigenvalues: int = option(3, "how many of the largest eigenvalues to follow")
    eig_images: int | None = option(None, "training images for the Hessian (default: all)", metavar="N")
    eig_batch: int | None = option(None, "images per part of a Hessian-vector product (default: all at once)")
    eig_tol: float = option(1e-3, "relative residual at which an eigenvalue counts as found")
    # speed
    precision: str = option("float32", "of the training; eigenvalues use float32 or float64", choices=PRECISIONS)
    channels_last: bool = option(False, "channels-last memory format")
    compile: bool = option(False, "compile the network with torch.compile")
    deterministic: bool = option(True, "the same bits on every run, also on CUDA (slower there)")
    # running
    checkpoint_every: int = option(1000, "steps between checkpoints", may_change=True)
    tensorboard: bool = option(False, "also write TensorBoard events into --out/tensorboard", may_change=True)

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        for name in ("width", "widen", "epochs", "num_eigenvalues", "checkpoint_every", "peak_epoch"):
            require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("batch_size", "shards", "eig_images", "eig_batch", "train_images", "validation_images"):
            require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("validate_every", "eig_every", "momentum", "weight_decay", "final_lr"):
            require(name, getattr(self, name) >= 0, "0 or more")
        require("classes", 1 < self.classes <= NUM_CLASSES, f"2 to {NUM_CLASSES}")
        require("amplitude", self.amplitude >= 1, "at least 1")
        require("period", self.period > 0, "more than 0")
        require("lr", self.lr > 0, "more than 0")
        require("eig_tol", self.eig_tol > 0, "more than 0")
        require("stop_epoch", self.stop_epoch is None or self.stop_epoch >= 0, "0 or more")
        bounded = self.nesterov or self.momentum < 1
        require("momentum", bounded, "less than 1 without nesterov: plain momentum is stable at no curvature there")
        require("nesterov", not self.nesterov or self.momentum > 0, "a momentum above 0 with it")
        piecewise = self.schedule == "piecewise"
        require("peak_epoch", not piecewise or self.peak_epoch < self.epochs, f"less than epochs ({self.epochs})")
        has_data = self.data is not None and (self.download or self.data.expanduser().exists())
        require("data", self.synthetic or has_data, "an existing folder with CIFAR-10 (or use --synthetic)")
        whole = self.model != "wrn" and not self.batchnorm
        require("eig_batch", self.eig_batch is None or whole, "none with BatchNorm: its batch is the whole set")
        blocked = self.sync_batchnorm and self.eig_every > 0
        require("sync_batchnorm", not blocked, "eig_every 0 with it: only one process computes eigenvalues")


def load_data(config: TrainingConfig) -> Dataset:
    """The chosen classes and counts of the chosen data, on the CPU."""
    if config.synthetic:
        whole = synthetic_cifar10()
    else:
        assert config.data is not None  # __post_init__
        try:
            whole = load_cifar10(config.data)
        except FileNotFoundError:
            if not config.download:
                raise
            download_cifar10(config.data)
            whole = load_cifar10(config.data)
    return Dataset(
        whole.train.subset(config.classes, config.train_images),
        whole.test.subset(config.classes, config.validation_images),
    )


def parameter_dtype(config: TrainingConfig) -> torch.dtype:
    """Parameters are float32 under mixed precision, too."""
    return torch.float64 if config.precision == "float64" else torch.float32


def build_model(config: TrainingConfig) -> nn.Module:
    if config.model == "mlp":
        model = mlp(IMAGE_BYTES, (config.width, config.width), config.classes, bias=config.bias, seed=config.seed)
    elif config.model == "myrtle5":
        model = myrtle5(
            config.classes, width=config.width, bias=config.bias, batchnorm=config.batchnorm, seed=config.seed
        )
    else:
        model = wide_resnet(config.classes, depth=config.depth, widen=config.widen, seed=config.seed)
    return model.to(parameter_dtype(config))


def build_schedule(config: TrainingConfig, steps_per_epoch: int) -> Schedule:
    if config.schedule == "constant":
        return constant(config.lr)
    if config.schedule == "cosine":
        return cosine(config.lr, config.epochs * steps_per_epoch)
    knots = ((0, 0.0), (config.peak_epoch, config.lr), (config.epochs, config.final_lr))
    return piecewise_linear(knots, steps_per_epoch)


def build_oscillation(
    config: TrainingConfig, steps_per_epoch: int, amplitude: torch.Tensor | None = None
) -> Oscillation:
    """Γ of one run, or of an ensemble with these amplitudes (E,)."""
    stop_step = None if config.stop_epoch is None else config.stop_epoch * steps_per_epoch
    amplitudes = config.amplitude if amplitude is None else amplitude
    return Oscillation(config.classes, amplitudes, config.period, waveform=config.waveform, stop_step=stop_step)


def configure_numerics(config: TrainingConfig) -> None:
    """Sets torch's process-wide switches for reproducible or for fast kernels."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic
