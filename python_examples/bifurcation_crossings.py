"""The supplement's first claim: does the period of F change where an eigenvalue crosses the threshold?

Trains the spiral network of `spiral_mlp.py` from many initial values, finds the unstable windows by the loss, trains
once more with the three largest eigenvalues at every step of them, and asks how many changes of period fall near a
crossing of 2 / learning rate, against what chance gives. A seed is a chunk of `common/sweep.py`: the same command goes
on after a stop.

    python python_examples/bifurcation_crossings.py --seeds 50 --out runs/crossings
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tqdm import tqdm

from common.coincidences import Stretch, coincidences
from common.config import parse_options
from common.report import BRANCHES, analyse
from common.run import BaseConfig, RunFolder, in_one_line
from common.spiral_run import FusedRun, SpiralRun, WindowedRun
from common.sweep import Chunk, Member, Row, SweepFolder, chunks_of, run_here
from dynloss_ext import branch_means, crossings, detect_periods, period_changes, plot
from spiral_mlp import SpiralConfig, task_of

Array = NDArray[Any]

MARGIN = 128  # steps before and after a window with eigenvalues too
SEGMENTS = {64: 16, 32: 8}  # steps that are classified together -> largest period tried
WITHIN = (8, 16, 32, 64, 128)  # steps
EIGENVALUES = 3


@dataclass(frozen=True, kw_only=True)
class CrossingsConfig(BaseConfig):
    """Networks and loss are those of `spiral_mlp.py`."""

    out: Path = Path("runs/bifurcation_crossings")  # folder: a chunk a seed, table.parquet, summary.json, figure.png
    seeds: int = 50  # initial values: --seed, --seed + 1, ...
    steps: int = 20_000  # gradient descent steps of each
    period: int = 5000  # period T of a class's turn, in steps
    width: int = 100  # hidden units

    MAY_CHANGE = BaseConfig.MAY_CHANGE | {"seeds"}

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "period", "width"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("resume", not self.resume, "no --resume: the same command always goes on with what is missing")

    def spiral(self, seed: int) -> SpiralConfig:
        return SpiralConfig(seed=seed, steps=self.steps, period=self.period, width=self.width, eig_every=0)

    def configuration(self) -> dict[str, Any]:
        """What a seed's results depend on."""
        return {name: getattr(self, name) for name in ("steps", "period", "width")}

    def __call__(self, members: Sequence[Member]) -> list[Row]:
        return [{"windows": windows_of(self.spiral(int(member["seed"])))} for member in members]


def mean_of_branches(step: Array, values: Array) -> tuple[Array, Array]:
    return branch_means(step, values, branches=BRANCHES)


def upper_branch(step: Array, values: Array) -> tuple[Array, Array]:
    """The largest of `BRANCHES` records, which is what the eye follows in a figure of all records."""
    steps, _ = branch_means(step, values, branches=BRANCHES)
    return steps, sliding_window_view(values, BRANCHES, axis=0).max(-1)


LEVELS = {"mean": mean_of_branches, "upper": upper_branch}  # of an alternating eigenvalue
NAMES = {"mean": "of the mean over branches", "upper": "of the upper branch"}


def windows_of(config: SpiralConfig) -> list[dict[str, Any]]:
    """Each unstable window of a run in which F oscillates: its changes of period, and all crossings there."""
    first = _trained(FusedRun(config, task_of(config)))
    found = analyse(first.metrics(), period=config.period).oscillating
    recorded = [(max(0, w.start - MARGIN), min(config.steps - 1, w.stop + MARGIN)) for w in found]
    metrics = _trained(WindowedRun(config, task_of(config), recorded)).metrics()
    step, loss, eig_step, values = (metrics[name] for name in ("step", "weighted_loss", "eig_step", "eigenvalues"))
    windows = []
    for window, (start, stop) in zip(found, recorded, strict=True):
        inside = (eig_step >= start) & (eig_step <= stop)
        passed = {
            kind: crossings(*level(eig_step[inside], values[inside]), 2 / config.lr, branches=1)
            for kind, level in LEVELS.items()
        }
        changes = {
            f"changes_{segment}": [
                {"step": change.step, "before": change.before, "after": change.after}
                for change in period_changes(
                    detect_periods(
                        step, loss, start=window.start, stop=window.stop, segment=segment, max_period=max_period
                    )
                )
            ]
            for segment, max_period in SEGMENTS.items()
        }
        windows.append(
            {
                **{"start": window.start, "stop": window.stop, "first": start, "last": stop},
                "crossings": [
                    {"of": kind, "step": c.step, "eigenvalue": c.index + 1, "upward": c.upward}
                    for kind, found in passed.items()
                    for c in found
                ],
                **changes,
            }
        )
    return windows


def _trained(run: SpiralRun) -> SpiralRun:
    while run.step < run.config.steps:
        run.advance(run.config.steps)
    run.measure_last_row()
    return run


# ---- which events


def _rises(changes: Iterable[dict[str, Any]]) -> list[int]:
    """Steps where an oscillation goes over to a longer period or to chaos."""
    return [c["step"] for c in changes if c["before"] != 1 and _length(c["after"]) > _length(c["before"])]


def _length(period: int | None) -> float:
    return math.inf if period is None else period


EVENTS: dict[str, Callable[[dict[str, Any], int], list[int]]] = {
    "first bifurcation": lambda window, _: [window["start"]],
    "second bifurcation": lambda window, segment: _rises(window[f"changes_{segment}"])[:1],
    "third bifurcation": lambda window, segment: _rises(window[f"changes_{segment}"])[1:2],
    "any change of period": lambda window, segment: [c["step"] for c in window[f"changes_{segment}"]],
}


def stretches_of(rows: Sequence[Row], events: str, segment: int, eigenvalue: int, of: str) -> list[Stretch]:
    """The windows of all seeds: events, and crossings by the mean or the upper branch of an eigenvalue."""
    return [
        Stretch(
            row["seed"],
            window["first"],
            window["last"],
            tuple(EVENTS[events](window, segment)),
            tuple(c["step"] for c in window["crossings"] if (c["eigenvalue"], c["of"]) == (eigenvalue, of)),
        )
        for row in rows
        for window in row["windows"]
    ]


def is_below(window: dict[str, Any], step: int, eigenvalue: int) -> bool:
    """Whether the mean of an eigenvalue over its branches is below the threshold at a step: its last crossing fell."""
    passed = [c for c in window["crossings"] if (c["eigenvalue"], c["of"]) == (eigenvalue, "mean")]
    before = [c for c in passed if c["step"] <= step]
    if before:
        return not before[-1]["upward"]
    return bool(passed[0]["upward"]) if passed else eigenvalue > 1  # λ₁ is above where it never crosses


# ---- the report


@in_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_options(CrossingsConfig(), __doc__, argv)
    torch.set_num_threads(1)  # more do not pay for so small a network
    members: list[Member] = [{"seed": seed} for seed in range(config.seed, config.seed + config.seeds)]
    folder = SweepFolder(config.out, config.configuration(), 1)
    chunks = chunks_of(config.configuration(), members, 1, ())
    todo = folder.missing(chunks)
    with tqdm(total=len(chunks), initial=len(chunks) - len(todo), unit="seed") as bar:

        def tell(_: Chunk) -> None:
            bar.update()

        run_here(folder, todo, config, tell)
    return report(config, folder.collect(chunks))


def report(config: CrossingsConfig, table: pa.Table) -> dict[str, Any]:
    """The table of coincidences, and the figure."""
    rows, folder = table.to_pylist(), RunFolder(config.out)
    windows = [window for row in rows for window in row["windows"]]
    results = [
        {"events": events, "segment": segment, "eigenvalue": eigenvalue, "of": of}
        | vars(coincidences(stretches_of(rows, events, segment, eigenvalue, of), within, pairings=2000))
        for segment in SEGMENTS
        for of in LEVELS
        for events in EVENTS
        for eigenvalue in range(1, EIGENVALUES + 1)
        for within in WITHIN
    ]
    summary = {
        "seeds": len(rows),
        **config.configuration(),
        "windows": len(windows),
        "recorded_steps": sum(w["last"] - w["first"] + 1 for w in windows),
        "crossings": {
            of: [sum((c["eigenvalue"], c["of"]) == (k, of) for w in windows for c in w["crossings"]) for k in (1, 2, 3)]
            for of in LEVELS
        },
        "below_at_second_bifurcation": [
            sum(is_below(w, step, k) for w in windows for step in EVENTS["second bifurcation"](w, 64))
            for k in (1, 2, 3)
        ],
        "coincidences": results,
    }
    folder.write_figure(figure(rows), dpi=110)
    print(f"{len(rows)} seeds, {len(windows)} windows; crossings of λ1, λ2, λ3: {summary['crossings']}")
    print("periods by segments of 64 steps, crossings within 32    hits  of  by shifts        p  by swaps        p")
    for r in results:
        if (r["segment"], r["within"]) == (64, 32):
            print(
                f"{r['events']:<22}λ{r['eigenvalue']}, {r['of']:<24}{r['hits']:>10}{r['count']:>4}"
                f"{r['by_shifts']:11.1f}{r['p_shifts']:9.1e}{r['by_swaps']:10.1f}{r['p_swaps']:9.1e}"
            )
    print(f"files in {folder.path}")
    return folder.write_summary(summary)


@matplotlib.rc_context(plot.STYLE)
def figure(rows: Sequence[Row], segment: int = 64, reach: int = 200) -> Figure:
    """Share of the events with a crossing at most so far away, beside that of steps chosen at random (dashed)."""
    drawn = Figure(figsize=(7.2, 7.4), layout="constrained")
    axes = drawn.subplots(len(EVENTS), EIGENVALUES, sharex=True, sharey=True)
    within, nothing = np.arange(reach + 1), np.zeros(reach + 1)
    colours = dict(zip(LEVELS, plot.EIGENVALUE_COLOURS, strict=False))
    for row, events in zip(axes, EVENTS, strict=True):
        for axis, eigenvalue in zip(row, range(1, EIGENVALUES + 1), strict=True):
            for of, colour in colours.items():
                stretches = [s for s in stretches_of(rows, events, segment, eigenvalue, of) if s.events]
                distances = [stretch.distances() for stretch in stretches]
                places = [np.array(stretch.events) - stretch.first for stretch in stretches]
                near = [(d[at][:, None] <= within).sum(0) for d, at in zip(distances, places, strict=True)]
                chance = [len(at) * _shares(d, within) for d, at in zip(distances, places, strict=True)]
                count = max(1, sum(map(len, places)))
                axis.plot(within, sum(near, nothing) / count, color=colour, lw=1.3, label=NAMES[of])
                axis.plot(within, sum(chance, nothing) / count, color=colour, ls="--", lw=0.8, alpha=0.7)
            if eigenvalue == 1:
                axis.set_ylabel(f"{events}\n(of {count})")
    for eigenvalue, axis in enumerate(axes[0], 1):
        axis.set_title(f"crossings by $\\lambda_{{{eigenvalue}}}$", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("steps to the nearest crossing")
    axes[0, 0].set(xlim=(0, reach), ylim=(0, 1.03))
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    drawn.suptitle("Share of events within so many steps of a crossing (dashed: of steps chosen at random)", fontsize=9)
    return drawn


def _shares(distances: Array, within: Array) -> Array:
    """Of the distances, those of at most `within`, for each."""
    shares: Array = np.searchsorted(np.sort(distances), within, side="right") / len(distances)
    return shares


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except KeyboardInterrupt:
        print("stopped; finished seeds are kept, and the same command goes on", file=sys.stderr)
        sys.exit(130)
