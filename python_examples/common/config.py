"""The command line, and the options of a training on CIFAR-10; a script's presets are instances of its options."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from common.run import BaseConfig, Config, refuse_changes, resumed

_READERS = tyro.constructors.ConstructorRegistry()


def parse_options(
    default: Config,
    description: str | None,
    argv: Sequence[str] | None = None,
    presets: Mapping[str, Config] | None = None,
) -> Config:
    """Reads the command line; a bad value ends the program with a usage error.

    With `--resume` the options default to those of the run in `--out`, so none has to be repeated; giving one
    a value that would change the trajectory is an error.

    Args:
        default: what counts for an option that is not given.
        description: `--help` shows its first line.
        argv: the arguments; None: those of the program.
        presets: instances that `--preset` puts in the place of `default`; options given beside it win, and beside
            `--fast`, which stands for `FAST` of the options.
    """
    program, arguments = Path(sys.argv[0]).name, list(sys.argv[1:] if argv is None else argv)
    first = _what_decides_on_defaults(arguments)
    preset = (presets or {}).get(first.preset, default)
    if first.fast:
        preset = dataclasses.replace(preset, **preset.FAST)
    try:
        start = preset
        if first.resume:
            own = {name: value for name, value in vars(preset).items() if value != getattr(default, name)}
            start = dataclasses.replace(resumed(default, first.out or preset.out), **own)
        options = tyro.cli(
            type(default),
            prog=program,
            description=(description or "").partition("\n")[0],
            default=start,
            args=arguments,
            registry=_READERS,
        )
        if options.resume:
            refuse_changes(options)
        options.check_data()
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    return options


def _what_decides_on_defaults(arguments: Sequence[str]) -> argparse.Namespace:
    """`--preset`, `--fast`, `--resume`, `--out`: read before tyro knows the defaults of all options."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--preset")
    reader.add_argument("--fast", action=argparse.BooleanOptionalAction)
    reader.add_argument("--resume", action=argparse.BooleanOptionalAction)
    reader.add_argument("--out", type=Path)
    return reader.parse_known_args(arguments)[0]


@_READERS.primitive_rule
def _none(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[None] | None:
    """Lets `none` in any spelling stand for None; tyro alone knows only `None`."""
    if info.type is not types.NoneType:
        return None

    def read(words: list[str]) -> None:
        if words[0].lower() != "none":
            raise ValueError(f"expected none, got {words[0]}")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="none",
        instance_from_str=read,
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: ["none"],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(BaseConfig):
    """Everything that determines a run.  A step is one update; an epoch of a full-batch run is one step."""

    preset: Literal["paper", "cpu", "smoke"] = "paper"  # a named set of defaults
    # data
    data: Path | None = None  # folder with CIFAR-10, or the archive itself
    download: bool = False  # fetch CIFAR-10 into --data first, if it is not there
    synthetic: bool = False  # train on a small made-up data set instead
    classes: int = 10  # use the first K classes
    train_images: int | None = None  # use at most N training images, balanced
    validation_images: int | None = None  # use at most N test images, balanced
    augment: bool = False  # random flips and crops of the training images
    # network
    model: Literal["mlp", "myrtle5", "wrn"] = "myrtle5"  # network
    width: int = 64  # channels of Myrtle5, hidden units of the MLP
    depth: int = 28  # layers of the wide residual network
    widen: int = 10  # widening factor of the wide residual network
    bias: bool = True  # biases in Myrtle5 and the MLP
    batchnorm: bool = False  # BatchNorm in Myrtle5
    # dynamical loss
    amplitude: float = 1.0  # amplitude A of the oscillation; 1 is plain cross-entropy
    period: float = 100.0  # steps T that each class is raised for
    waveform: Literal["triangle", "sine", "square"] = "triangle"  # shape of the oscillation
    stop_epoch: int | None = None  # from this epoch on A = 1
    # optimisation
    epochs: int = 100  # passes over the training images
    batch_size: int | None = None  # images per global batch; none: all of them
    shards: int | None = None  # parts of a batch with BatchNorm statistics of their own; none: one per process
    lr: float = 0.1  # largest learning rate
    schedule: Literal["constant", "piecewise", "cosine"] = "constant"  # learning rate over time
    peak_epoch: int = 300  # epoch of the largest rate (piecewise: from 0 to --lr here, then to --final-lr)
    final_lr: float = 0.002  # learning rate at the end (piecewise)
    momentum: float = 0.0  # momentum
    nesterov: bool = False  # Nesterov's form of the momentum
    weight_decay: float = 0.0  # L2 coefficient, as in torch.optim.SGD
    sync_batchnorm: bool = False  # BatchNorm over the batches of all processes (CUDA)
    # measurements
    validate_every: int = 1  # epochs between validations; 0: never
    eig_every: int = 0  # steps between Hessian eigenvalues; 0: never
    num_eigenvalues: int = 3  # how many of the largest eigenvalues to follow
    eig_images: int | None = None  # training images for the Hessian; none: all
    eig_batch: int | None = None  # images per part of a Hessian-vector product; none: all at once
    eig_tol: float = 1e-3  # relative residual at which an eigenvalue counts as found
    # speed
    precision: Literal["float32", "tf32", "float64", "bfloat16", "float16"] = "float32"  # training; λ: at least float32
    channels_last: bool = False  # channels-last memory format
    compile: bool = False  # compile the network with torch.compile
    deterministic: bool = True  # the same bits on every run, also on CUDA (slower there)
    graphs: bool = True  # on CUDA: replay whole steps as CUDA graphs
    fast: bool = False  # other defaults for these: bfloat16, channels-last, not deterministic
    # running
    checkpoint_every: int = 1000  # steps between checkpoints
    tensorboard: bool = False  # also write TensorBoard events into --out/tensorboard

    MAY_CHANGE = BaseConfig.MAY_CHANGE | {"data", "download", "graphs", "checkpoint_every", "tensorboard"}
    FAST: ClassVar[Mapping[str, object]] = {"precision": "bfloat16", "channels_last": True, "deterministic": False}

    def __post_init__(self) -> None:
        for name in ("width", "widen", "epochs", "num_eigenvalues", "checkpoint_every", "peak_epoch"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("batch_size", "shards", "eig_images", "eig_batch", "train_images", "validation_images"):
            self.require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or none")
        for name in ("validate_every", "eig_every", "momentum", "weight_decay", "final_lr"):
            self.require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("period", "lr", "eig_tol"):
            self.require(name, getattr(self, name) > 0, "more than 0")
        self.require("classes", 1 < self.classes <= 10, "2 to 10")
        self.require("amplitude", self.amplitude >= 1, "at least 1")
        self.require("stop_epoch", self.stop_epoch is None or self.stop_epoch >= 0, "0 or more, or none")
        bounded = self.nesterov or self.momentum < 1
        self.require("momentum", bounded, "less than 1 without --nesterov: no curvature is stable there")
        self.require("momentum", not self.nesterov or self.momentum > 0, "more than 0 with --nesterov")
        piecewise = self.schedule == "piecewise"
        self.require("peak_epoch", not piecewise or self.peak_epoch < self.epochs, f"less than --epochs {self.epochs}")
        whole = self.model != "wrn" and not self.batchnorm
        self.require("eig_batch", self.eig_batch is None or whole, "none with BatchNorm: its batch is the whole set")
        blocked = self.sync_batchnorm and self.eig_every > 0
        self.require("eig_every", not blocked, "0 with --sync-batchnorm: only one process computes eigenvalues")

    def check_data(self) -> None:
        exists = self.data is not None and (self.download or self.data.expanduser().exists())
        self.require("data", self.synthetic or exists, "an existing folder with CIFAR-10 (or use --synthetic)")
