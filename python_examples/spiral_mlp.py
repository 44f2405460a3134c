"""The paper's Fig. 4 (supplementary Fig. 1): a small network on spirals under the dynamical loss.

Full-batch gradient descent on 300 points; the class weights oscillate with period T and amplitude A; the
largest Hessian eigenvalues are tracked along the way. Writes a run folder, see `common/run.py`. On the CPU steps and
Hessian products are compiled code for this network; on CUDA, or with `--engine autograd`, they are autograd's, on CUDA
one launch each.

    python python_examples/spiral_mlp.py --out runs/spiral
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from common.config import parse_options
from common.records import load_state, state_of
from common.report import Analysis, analyse, trajectory
from common.run import BaseConfig, RunFolder, in_one_line, open_run, resolve_device
from common.spiral import SpiralMLP, load_initial_values, spiral_data
from common.spiral_run import BLOCK, AutogradRun, FusedRun, SpiralRun, Task
from common.stopping import GracefulStop, Stopped
from dynloss_ext import (
    plot,
    stability_limit,
)
from dynloss_ext.perceptron import INITIALISATIONS


@dataclass(frozen=True, kw_only=True)
class SpiralConfig(BaseConfig):
    """The defaults are those of the authors' notebook."""

    out: Path = Path("runs/spiral_mlp")  # run folder: config, metrics, summary, figure, checkpoint
    steps: int = 70_000  # gradient descent steps
    amplitude: float = 70.0  # amplitude A of the oscillation; 1 is plain cross-entropy
    period: int = 5000  # period T of a class's turn, in steps
    closed: bool = True  # a turn lasts T + 1 steps, both ends included
    stop_step: int | None = 65_013  # step from which on A = 1; none for never
    lr: float = 1.0  # learning rate
    init: str = "glorot-normal"  # glorot-normal, lecun-normal, or an .npz with X, y, w1, b1, w2, b2
    width: int = 100  # hidden units (unless --init is a file)
    points: int = 100  # points per class (unless --init is a file)
    classes: int = 3  # classes (unless --init is a file)
    noise: float = 0.2  # noise on the spirals' angle (unless --init is a file)
    data_seed: int = 0  # seed of the spirals
    dtype: Literal["float64", "float32"] = "float64"  # precision of the training
    eig_every: int = 25  # steps between two eigenvalue updates; 0 for none
    num_eigenvalues: int = 3  # largest Hessian eigenvalues to track
    tol: float = 1e-3  # their relative residual
    ntk: bool = False  # track the neural tangent kernel's largest eigenvalue too (first 50 points)
    density_every: int = 0  # steps between two spectral densities, a multiple of --eig-every; 0 for none
    rule: Literal["loss", "lambda", "limit"] = "loss"  # what marks an instability
    engine: Literal["auto", "fused", "autograd"] = "auto"  # fused: compiled steps and products, CPU only; auto: there
    threads: int = 1  # CPU threads (more do not pay for so small a network)
    graphs: bool = True  # on CUDA: replay whole steps and products as CUDA graphs
    checkpoint_every: int = 10_000  # steps between two checkpoints

    MAY_CHANGE = BaseConfig.MAY_CHANGE | {"steps", "rule", "graphs", "checkpoint_every"}

    def __post_init__(self) -> None:
        for name in ("steps", "period", "width", "points", "num_eigenvalues", "threads", "checkpoint_every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("classes", self.classes >= 2, "at least 2")
        self.require("amplitude", 1 <= self.amplitude < math.inf, "a number of at least 1")
        for name in ("eig_every", "density_every", "data_seed", "noise"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("lr", "tol"):
            self.require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        multiple = self.density_every % self.eig_every == 0 if self.eig_every else not self.density_every
        self.require("density_every", multiple, f"a multiple of --eig-every {self.eig_every}")
        needed = self.rule != "loss" or self.ntk
        self.require("eig_every", self.eig_every > 0 or not needed, "more than 0 with --rule lambda or limit, or --ntk")

    def is_fused(self) -> bool:
        """Whether the engine is the fused one."""
        on_cpu = resolve_device(self.device).type == "cpu"
        self.require("engine", on_cpu or self.engine != "fused", "auto or autograd on CUDA")
        return on_cpu and self.engine != "autograd"


def train(run: SpiralRun, folder: RunFolder) -> None:
    """Run to the last step, or to a Ctrl-C or SIGTERM; the folder is left with a checkpoint either way."""
    config = run.config
    with GracefulStop() as stop, tqdm(total=config.steps, initial=len(run.rows), unit="step") as bar:
        while not run.is_complete() and not stop.requested:
            began = time.perf_counter()
            end = min(run.step - run.step % BLOCK + BLOCK, config.steps)
            try:
                while run.step < end and not stop.requested:
                    run.advance(end)
                run.collect()
                if run.step == config.steps:
                    run.measure_last_row()
            except Stopped:
                bar.write("stopped in an eigenvalue update, which --resume repeats", file=sys.stderr)
            run.collect()
            run.seconds += time.perf_counter() - began
            if run.step % config.checkpoint_every < BLOCK:
                save(run, folder)
            _show_progress(bar, run)
        save(run, folder)


def save(run: SpiralRun, folder: RunFolder) -> None:
    folder.write_metrics(run.metrics())
    folder.write_checkpoint(state_of(run, run.STATE))


def finish(run: SpiralRun, folder: RunFolder) -> dict[str, Any]:
    """Analyse what was recorded; write the summary and the figures; print both."""
    config, metrics = run.config, run.metrics()
    limit = stability_limit(torch.optim.SGD([torch.zeros(1)], lr=config.lr))
    analysis = analyse(metrics, rule=config.rule, period=config.period, limit=limit)
    rows, updates = len(metrics["step"]), len(metrics["eig_step"])
    summary = {
        "finished": run.is_complete(),
        "steps": rows,
        **{name: metrics[name][-1] for name in ("accuracy", "loss", "weighted_loss") if rows},
        "stability_limit": limit,
        **analysis.summary(),
        "graph_fallback": run.fallback() if config.graphs else "--no-graphs",
        "seconds": run.seconds,
        "eigen_seconds": run.eigen_seconds,
        "eigen_updates": updates,
        "products_per_update": float(metrics["num_hvp"].mean()) if updates else None,
        "unconverged_updates": int((~metrics["converged"].astype(bool)).any(axis=-1).sum()) if updates else 0,
    }
    folder.write_summary(summary)
    if rows > 1:
        title = f"Spiral, A = {config.amplitude:g}, T = {config.period}, learning rate {config.lr:g}"
        zoom = _second_oscillation(analysis, rows)
        folder.write_figure(trajectory(metrics, analysis, zoom, limit=limit, title=title))
    if config.density_every and len(metrics["density_step"]):
        densities = plot.spectral_density(
            metrics["density_grid"],
            metrics["density"],
            stderr=metrics["density_stderr"],
            step=metrics["density_step"],
        )
        folder.write_figure(densities, "density.png")
    if rows:
        print(analysis.table())
        print(_report(summary, analysis, folder))
    return summary


@in_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_options(SpiralConfig(), __doc__, argv)
    torch.set_num_threads(config.threads)
    try:
        run = (FusedRun if config.is_fused() else AutogradRun)(config, task_of(config))
        folder = RunFolder(config.out).claim() if config.resume else None
        if folder:
            folder.restore(lambda state: load_state(run, state, run.STATE), resolve_device(config.device))
        if run.step > config.steps:
            raise ValueError(
                f"--steps: expected at least the {run.step} of the run in {config.out}, got {config.steps}"
            )
        folder = open_run(config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"spiral_mlp.py: {error}") from None
    train(run, folder)
    return finish(run, folder)


def task_of(config: SpiralConfig) -> Task:
    """The points and the untrained network that the options ask for."""
    if config.init not in INITIALISATIONS:
        return load_initial_values(Path(config.init))
    inputs, target = spiral_data(config.points, config.classes, config.noise, config.data_seed)
    return inputs, target, SpiralMLP.initialised(config.init, 2, config.width, config.classes, config.seed)


def _second_oscillation(analysis: Analysis, rows: int) -> tuple[int, int] | None:
    """What the figure's second column shows: the second window in which F oscillates, or else the first."""
    if not analysis.oscillating:
        return None
    window = analysis.oscillating[:2][-1]
    margin = max(20, round(0.15 * (window.stop - window.start)))
    return max(0, window.start - margin), min(rows - 1, window.stop + margin)


def _show_progress(bar: tqdm[Any], run: SpiralRun) -> None:
    if len(run.rows) == 0:  # stopped in the very first eigenvalue update
        return
    rows = run.rows.arrays()
    bar.update(len(run.rows) - bar.n)
    shown = {"F": f"{rows['weighted_loss'][-1]:.3f}", "accuracy": f"{rows['accuracy'][-1]:.3f}"}
    if math.isfinite(run.curvature.latest):
        shown["λ_max"] = f"{run.curvature.latest:.2f}"
    bar.set_postfix(shown)


def _report(summary: dict[str, Any], analysis: Analysis, folder: RunFolder) -> str:
    state = "finished" if summary["finished"] else "interrupted; --resume continues it"
    lines = [
        f"{summary['steps']} steps in {summary['seconds']:.1f} s, {state}",
        f"final accuracy {summary['accuracy']:.4f}, F {summary['weighted_loss']:.3g}",
        f"{summary['num_instabilities']} instabilities, {summary['num_oscillating']} of them oscillating",
        analysis.comparison(summary["stability_limit"]),
    ]
    if summary["eigen_updates"]:
        lines.append(
            f"{summary['eigen_updates']} eigenvalue updates in {summary['eigen_seconds']:.1f} s of these, "
            f"{summary['products_per_update']:.2f} products each, "
            f"{summary['unconverged_updates']} not converged"
        )
    return "\n".join([*lines, f"files in {folder.path}"])


if __name__ == "__main__":
    sys.exit(0 if main()["finished"] else 130)  # 130: the shell's code for Ctrl-C
