"""Phase diagrams (main Figs. 1 and 2, supp. Fig. 4): accuracy, curvature and dynamics over amplitude A and period T.

    python python_examples/phase_diagram.py --experiment spiral --out runs/diagram
    python python_examples/phase_diagram.py --amplitudes log:1:100:12 --periods log:10:5000:12 --seeds 50 --workers 2
    python python_examples/phase_diagram.py --experiment wrn --data DATA --amplitudes 1:100:10 --periods 200 --seeds 50

Members, one training each, are computed in chunks; any number of processes fill one folder, see `common/sweep.py`, and
whoever starts again computes what is missing. The last to finish writes table.parquet (a row a member), summary.json
and the figures. On one machine `--workers n` starts n processes, `--cluster tcp://...` takes yours, and job arrays give
each job a part by `--shard i/n` and gather with `--collect`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

import myrtle5_cifar10
import wrn28_10_cifar10
from common import diagrams
from common.config import TrainingConfig, parse_options
from common.data import load_data
from common.image_sweep import ImageSweep
from common.run import BaseConfig, RunFolder, in_one_line
from common.spiral_sweep import SpiralSweep
from common.sweep import Chunk, Member, SweepFolder, Work, chunks_of, read_values, run_here, run_on_dask

PARAMETERS = 8  # bytes of a member beside its records
CHUNK_SECONDS = 60.0  # how long a chunk may take, about


@dataclass(frozen=True, kw_only=True)
class DiagramConfig(BaseConfig):
    """Which members there are, how long each is trained, who computes them."""

    out: Path = Path("runs/phase_diagram")  # folder of the sweep: chunks, table, summary, figures
    experiment: Literal["spiral", "myrtle5", "wrn"] = "spiral"  # task and network
    # members: every combination, and A = 1 once for every learning rate, width and seed
    amplitudes: tuple[str, ...] = ("log:2:100:6",)  # A: numbers, LOW:HIGH:COUNT, log:LOW:HIGH:COUNT
    periods: tuple[str, ...] = ("log:10:1000:6",)  # T in steps, likewise, rounded to whole ones
    learning_rates: tuple[str, ...] = ()  # likewise; left out: the experiment's own
    widths: tuple[str, ...] = ()  # hidden units, channels or widening factors; left out: the experiment's own
    seeds: int = 3  # initial values for every combination: --seed, --seed + 1, ...
    # the spiral's training
    steps: int = 20_000  # gradient descent steps
    stop: float = 0.93  # share of the training after which A = 1; 1: never
    init: Literal["glorot-normal", "lecun-normal"] = "glorot-normal"  # initial values
    points: int = 100  # points per class
    noise: float = 0.2  # noise on the spirals' angle
    data_seed: int = 0  # seed of the spirals; held-out points come from the next one
    dtype: Literal["float64", "float32"] = "float64"  # precision of the training
    measure: Literal["all", "curves", "end"] = "all"  # curves: no eigenvalues; end: no dynamics either
    # the training on CIFAR-10
    preset: Literal["paper", "cpu", "smoke"] = "paper"  # of the experiment's own script
    data: Path | None = None  # folder with CIFAR-10, or the archive itself
    synthetic: bool = False  # a small made-up data set instead
    epochs: int | None = None  # none: the preset's; others keep the shares of its course: of lr, of the oscillation
    eig_every: int = 0  # steps between Hessian eigenvalues; 0: never
    eig_images: int | None = None  # training images for the Hessian; none: all
    # who computes
    workers: int = 0  # processes on this machine; 0: this one alone
    cluster: str | None = None  # or the address of a Dask scheduler, whose workers see --out
    shard: str | None = None  # i/n: only every n-th chunk, from the i-th on (1 to n)
    collect: bool = False  # compute nothing: write the table and the figures of a finished sweep
    chunk_members: int | None = None  # members of a chunk; none: by memory and speed
    slices: tuple[float, ...] = ()  # the figure of accuracy over A has the periods T next to these; left out: three
    against: Path | None = None  # table.parquet of another sweep over the same members, whose accuracy is subtracted

    MAY_CHANGE = BaseConfig.MAY_CHANGE | {
        *("data", "workers", "cluster", "shard", "collect", "chunk_members", "slices", "against"),
    }
    OF_IMAGES: ClassVar[tuple[str, ...]] = ("preset", "synthetic", "epochs", "eig_every", "eig_images")
    OF_SPIRALS: ClassVar[tuple[str, ...]] = (
        *("steps", "stop", "init", "points", "noise", "data_seed", "dtype", "measure"),
    )

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "points"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("workers", "seed", "data_seed", "noise", "eig_every"):
            self.require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("epochs", "eig_images", "chunk_members"):
            self.require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or none")
        self.require("stop", 0 <= self.stop <= 1, "a share from 0 to 1")
        self.require("resume", not self.resume, "no --resume: a sweep always goes on with what is missing")
        self.require("cluster", not (self.cluster and self.workers), "none with --workers")
        self.shard_of()
        self.members()

    def shard_of(self) -> tuple[int, int]:
        """The place of the first chunk, counted from 0, and the distance to the next."""
        if self.shard is None:
            return 0, 1
        index, _, count = self.shard.partition("/")
        good = index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)
        self.require("shard", good, "i/n with 1 <= i <= n")
        return int(index) - 1, int(count)

    @property
    def rival(self) -> str:
        """What figures call the sweep in --against."""
        place = self.against or Path()
        return place.parent.name if place.name == "table.parquet" else place.stem

    def training(self) -> TrainingConfig:
        """The options of a run on CIFAR-10, but for what its member says."""
        script: Any = {"myrtle5": myrtle5_cifar10, "wrn": wrn28_10_cifar10}[self.experiment]
        preset = script.PRESETS[self.preset]
        own = {field.name: getattr(preset, field.name) for field in dataclasses.fields(TrainingConfig)}
        own |= {name: getattr(self, name) for name in ("data", "synthetic", "device", "eig_every", "eig_images")}
        if self.epochs is not None:
            course = {name: own[name] for name in ("peak_epoch", "stop_epoch") if own[name] is not None}
            own |= {name: max(1, round(epoch / preset.epochs * self.epochs)) for name, epoch in course.items()}
            own["epochs"] = self.epochs
        return TrainingConfig(**own)

    def check_data(self) -> None:
        if self.experiment != "spiral":
            self.training().check_data()

    def members(self) -> list[Member]:
        """All members, A = 1 first."""
        own: dict[str, float] = {"lr": 1.0, "width": 100}
        if self.experiment != "spiral":
            training = self.training()
            own = {"lr": training.lr, "width": training.widen if self.experiment == "wrn" else training.width}
        amplitudes = read_values("--amplitudes", self.amplitudes)
        self.require("amplitudes", bool(amplitudes) and amplitudes[0] >= 1, "numbers of at least 1")
        periods = sorted({round(period) for period in read_values("--periods", self.periods)})
        self.require("periods", bool(periods) and periods[0] >= 1, "numbers of at least 1")
        rates = read_values("--learning-rates", self.learning_rates) or [own["lr"]]
        self.require("learning_rates", rates[0] > 0, "numbers of more than 0")
        widths = sorted({round(width) for width in read_values("--widths", self.widths) or [own["width"]]})
        self.require("widths", widths[0] >= 1, "numbers of at least 1")
        oscillations = [(1.0, periods[-1]), *((a, t) for t in periods for a in amplitudes if a != 1)]
        return [
            {"amplitude": amplitude, "period": period, "lr": rate, "width": width, "seed": seed}
            for width in widths
            for rate in rates
            for amplitude, period in oscillations
            for seed in range(self.seed, self.seed + self.seeds)
        ]

    def configuration(self) -> dict[str, Any]:
        """What results depend on beside the members' own values."""
        names = self.OF_SPIRALS if self.experiment == "spiral" else self.OF_IMAGES
        return {"experiment": self.experiment, **{name: getattr(self, name) for name in names}}

    def work(self) -> Work:
        """Computes the rows of members."""
        if self.experiment != "spiral":
            return ImageSweep(self.training())
        return SpiralSweep(
            steps=self.steps,
            stop_step=None if self.stop == 1 else round(self.stop * self.steps),
            points=self.points,
            noise=self.noise,
            data_seed=self.data_seed,
            init=self.init,
            dtype=self.dtype,
            measure=self.measure,
        )


@in_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_options(DiagramConfig(), __doc__, argv)
    members, configuration, work = config.members(), config.configuration(), config.work()
    other = None if config.against is None else other_columns(config, members)
    size = config.chunk_members
    if size is None and not config.collect and not (config.out / "sweep.json").exists():
        size = _chunk_members(config, members, work)
    folder = SweepFolder(config.out, configuration | {"grid": _grid(config)}, size)
    configuration = configuration | {"grid": _grid(config)}
    chunks = chunks_of(config.configuration(), members, folder.chunk_members, ("width", "period"))
    if not config.collect:
        first, distance = config.shard_of()
        _compute(config, folder, configuration, chunks[first::distance], work)
        missing = folder.missing(chunks)
        if missing:
            print(f"{len(chunks) - len(missing)} of {len(chunks)} chunks are finished; other shards have the rest")
            return {"finished": False}
    return report(config, folder.collect(chunks), other)


def other_columns(config: DiagramConfig, members: Sequence[Member]) -> dict[str, Any]:
    """The table --against names, if it has these members: what differs between the sweeps is something else."""
    try:
        columns = _columns(config, pq.read_table(config.against))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = "no column " * isinstance(error, KeyError) + str(error).partition("\n")[0]
        raise ValueError(f"--against: expected the table.parquet of a sweep, got {config.against}: {reason}") from error
    names = ("width", "lr", "amplitude", "period", "seed")
    theirs = set(zip(*(columns[name].tolist() for name in names if name in columns), strict=True))
    absent = {tuple(float(member[name]) for name in names) for member in members} - theirs
    if absent:
        example = ", ".join(f"{name} {value:g}" for name, value in zip(names, min(absent), strict=True))
        raise ValueError(
            f"--against: expected all of this sweep's {len(members)} members, {len(absent)} are not in "
            f"{config.against}: {example}, ..."
        )
    return columns


def _grid(config: DiagramConfig) -> dict[str, Any]:
    names = ("amplitudes", "periods", "learning_rates", "widths")
    return {name: list(getattr(config, name)) for name in names} | {"seeds": config.seeds, "seed": config.seed}


def _chunk_members(config: DiagramConfig, members: Sequence[Member], work: Work) -> int:
    """So many that a chunk takes a minute, by the speed measured here, and a quarter of the free memory at most."""
    if not isinstance(work, SpiralSweep):
        return 1
    short = dataclasses.replace(work, steps=max(1, min(200, config.steps)), stop_step=None, measure="end")
    began = time.perf_counter()
    short(members[-2:])
    seconds = (time.perf_counter() - began) / len(members[-2:]) * config.steps / short.steps
    rows = config.steps if config.measure != "end" else 100
    free = _free_memory() / 4 / max(1, config.workers, os.cpu_count() or 1)
    by_memory = free / (rows * 3 * PARAMETERS * 3)  # records, their parts, and what is made of them
    return max(1, min(4096, math.ceil(CHUNK_SECONDS / seconds), int(by_memory)))


def _free_memory() -> float:
    """Bytes, of this machine."""
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _compute(
    config: DiagramConfig, folder: SweepFolder, configuration: dict[str, Any], chunks: Sequence[Chunk], work: Work
) -> None:
    """With a bar over members; chunks that are there already count at once."""
    missing = {chunk.name for chunk in folder.missing(chunks)}
    total = sum(len(chunk.members) for chunk in chunks)
    done = sum(len(chunk.members) for chunk in chunks if chunk.name not in missing)
    todo = [chunk for chunk in chunks if chunk.name in missing]
    if not todo:
        return
    if isinstance(work, ImageSweep):
        load_data(work.config)  # once, before several processes do
    steps = config.steps if config.experiment == "spiral" else 1
    unit = "step" if steps > 1 else "member"
    with tqdm(total=total * steps, initial=done * steps, unit=unit, unit_scale=True, smoothing=0.1) as bar:

        def tell(chunk: Chunk) -> None:
            bar.update(len(chunk.members) * steps)

        if config.workers or config.cluster:
            resources = {"GPU": 1.0} if config.device == "cuda" else None
            run_on_dask(
                folder,
                configuration,
                todo,
                work,
                tell,
                workers=config.workers or None,
                address=config.cluster,
                resources=resources,
            )
        else:
            run_here(folder, todo, work, tell)


def report(config: DiagramConfig, table: pa.Table, other: dict[str, Any] | None = None) -> dict[str, Any]:
    """The figures and the summary of a finished sweep; beside another one, if its columns are given."""
    folder = RunFolder(config.out)
    columns = _columns(config, table)
    accuracies = {"final_accuracy": "training accuracy", "validation_accuracy": "held-out accuracy"}
    names = {name: label for name, label in accuracies.items() if np.isfinite(columns[name]).any()}
    parts: dict[str, Any] = {}
    kinds = sorted(set(zip(columns["width"].tolist(), columns["lr"].tolist(), strict=True)))
    for width, rate in kinds:
        chosen = (columns["width"] == width) & (columns["lr"] == rate)
        grid = diagrams.Grid.of({name: values[chosen] for name, values in columns.items()})
        label = f"width{width:g}_lr{rate:g}"
        title = f"{config.experiment}, width {width:g}, learning rate {rate:g}"
        parts[label] = {"members": int(chosen.sum()), "diverged": int(columns["diverged"][chosen].sum())}
        if len(grid.amplitudes) == 0:
            continue
        if len(grid.amplitudes) * len(grid.periods) > 4000:
            for name, what in (names | {"lowest_loss": "lowest loss"}).items():
                folder.write_figure(diagrams.fine_map(grid, name, what, title), f"{name}_{label}.png", dpi=200)
            continue
        figure, parts[label]["gain"] = diagrams.mean_and_gain(grid, names, title)
        folder.write_figure(figure, f"accuracy_{label}.png", dpi=150)
        if other is not None:
            chosen = (other["width"] == width) & (other["lr"] == rate)
            theirs = diagrams.Grid.of({name: values[chosen] for name, values in other.items()})
            figure, parts[label]["against"] = diagrams.mean_and_gain(grid, names, title, (theirs, config.rival))
            folder.write_figure(figure, f"against_{label}.png", dpi=150)
        if "richest_period" in columns:
            missing = {"relative_lambda": np.full_like(columns["seed"], np.nan)}
            all_of = missing | columns
            whole = diagrams.Grid.of({name: values[chosen] for name, values in all_of.items()})
            folder.write_figure(diagrams.dynamics_maps(whole, title), f"dynamics_{label}.png")
        periods = config.slices or tuple(np.quantile(grid.periods, (0.1, 0.5, 0.9), method="nearest"))
        if len(grid.amplitudes) > 1:
            folder.write_figure(diagrams.slices(grid, names, periods, title), f"slices_{label}.png")
    results = {"finished": True, "members": table.num_rows, **config.configuration(), "parts": parts}
    summary = folder.write_summary(results)
    for label, part in parts.items():
        print(f"{label}: {part['members']} members, {part['diverged']} diverged")
        for kind, rival in (("gain", "A = 1"), ("against", config.rival)):
            for name, gain in part.get(kind, {}).items():
                print(f"  {name}: {rival} {gain_in_words(gain)}")
    print(f"files in {folder.path}")
    return summary


def gain_in_words(gain: dict[str, Any]) -> str:
    """What the plain members reach and the others gain; with standard errors and tests where seeds allow them."""

    def error(name: str) -> str:
        return f" ± {gain[name]:.4f}" if math.isfinite(gain[name]) else ""

    if gain["cells"]:
        cells = f"of {gain['cells']} cells {gain['significant_gains']} gain and {gain['significant_losses']} lose"
        tests = f"{cells} significantly"
    else:
        tests = "significance needs two seeds"
    return (
        f"{gain['plain']:.4f}{error('plain_standard_error')}; largest gain {gain['largest_gain']:+.4f}"
        f"{error('its_standard_error')} at A = {gain['at_amplitude']:g}, T = {gain['at_period']:g}; {tests}"
    )


def _columns(config: DiagramConfig, table: pa.Table) -> dict[str, Any]:
    columns = {name: _numbers(table.column(name)) for name in table.column_names}
    if "lambda_cycle" in columns:
        columns["relative_lambda"] = columns["lambda_cycle"] * columns["lr"] / 2
    _count_diverged_as_chance(config, columns)
    return columns


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _count_diverged_as_chance(config: DiagramConfig, columns: dict[str, Any]) -> None:
    """A diverged member guesses: left out, a learning rate that mostly diverges would look as good as its best runs."""
    classes = 3 if config.experiment == "spiral" else config.training().classes
    for name in ("final_accuracy", "validation_accuracy"):
        columns[name] = np.where(columns["diverged"] == 1, 1 / classes, columns[name])


if __name__ == "__main__":
    try:
        sys.exit(0 if main()["finished"] else 3)  # 3: chunks are missing
    except KeyboardInterrupt:
        print("stopped; finished chunks are kept, and the same command goes on", file=sys.stderr)
        sys.exit(130)
