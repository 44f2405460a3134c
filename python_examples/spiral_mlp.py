"""The paper's Fig. 4 (supplementary Fig. 1): a small network on spirals under the dynamical loss.

Full-batch gradient descent on 300 points; the class weights oscillate with period T and amplitude A; the
largest Hessian eigenvalues are tracked along the way. Writes a run folder, see `common/run.py`. On CUDA a step is one
launch, and so is a Hessian product.

    python python_examples/spiral_mlp.py --out runs/spiral
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from common.config import parse_options
from common.report import Analysis, analyse, trajectory
from common.run import (
    BaseConfig,
    GracefulStop,
    RunFolder,
    Stopped,
    Table,
    in_one_line,
    interruptible,
    load_state,
    open_run,
    resolve_device,
    state_of,
)
from common.spiral import SpiralMLP, load_initial_values, spiral_data
from common.tracking import CurvatureTracker
from dynloss_ext import (
    CapturedHessian,
    CapturedStep,
    DeviceRecords,
    HessianOperator,
    Oscillation,
    dynamic_cross_entropy,
    loss_and_gradient,
    ntk_eigenvalues,
    plot,
    spectral_density,
    stability_limit,
)
from dynloss_ext.perceptron import INITIALISATIONS

Gradients = tuple[Tensor, ...]
Operator = TypeVar("Operator", HessianOperator, CapturedHessian)

BLOCK = 500  # steps between two looks at the metrics: one host synchronisation and one progress update


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


class SpiralRun:
    """The state of one run: network, clock, recorded rows. All of it goes through the checkpoint."""

    STATE = ("step", "seconds", "eigen_seconds", "model", "curvature", "rows", "density_rows")

    def __init__(self, config: SpiralConfig) -> None:
        self.config = config
        device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
        inputs, target, model = _task(config)
        # Samples last in memory, as the network takes them: else a third of the backward pass is one product.
        self.inputs = inputs.t().to(device, dtype).contiguous().t()
        self.target, self.model = target.to(device), model.to(device, dtype)
        self.params: list[Tensor] = list(self.model.parameters())
        classes = self.model.b2.numel()
        self.oscillation = Oscillation(
            classes, config.amplitude, config.period, closed=config.closed, stop_step=config.stop_step
        )
        self.no_oscillation = Oscillation(classes, 1.0, config.period)
        also = ("ntk",) if config.ntk else ()
        self.curvature = CurvatureTracker(config.num_eigenvalues, config.tol, self.oscillation, also)
        self.step = 0  # the next forward pass: parameters after `step` updates, weights Γ(step)
        self.seconds = self.eigen_seconds = 0.0
        self.rows = Table("weighted_loss", "loss", "accuracy")
        self.density_rows = Table("density_step", "density_grid", "density", "density_stderr")
        self._loss: list[Tensor] = []
        self._logits: list[Tensor] = []
        self.on_device = device.type == "cuda" and config.graphs
        self.clock = torch.zeros((), dtype=torch.int64, device=device)  # `step`, for what is captured
        self.records = DeviceRecords(BLOCK, (3,), dtype=dtype, device=device)
        self._unread = 0  # rows that are in `records` yet
        self._replayed = CapturedStep(self._descend, device)
        self._hessian: CapturedHessian | None = None

    def advance(self) -> None:
        """One update; the row before it is measured on the forward pass that the update needs anyway.

        Plain gradient descent, written out: an optimizer object would take a tenth of the step.
        """
        if self.on_device:
            self._advance_on_device()
            return
        logits, gradient, gradients = self._forward()
        if gradients is None:
            gradients = torch.autograd.grad(logits, self.params, gradient)
        with torch.no_grad():
            torch._foreach_add_(self.params, gradients, alpha=-self.config.lr)
        self.step += 1

    def measure_last_row(self) -> None:
        """The row after the last update, which no further update measures."""
        self._forward()
        self.collect()

    def collect(self) -> None:
        """Move the finished rows into the table; accuracy and plain loss are computed for all at once."""
        if self._unread:
            row = self.step - self._unread - 1  # of the first: none at step 0, known already in a run that is extended
            weighted, plain, accuracy = self.records.read()[len(self.rows) - row :].unbind(1)
            self.rows.extend(weighted_loss=weighted, loss=plain, accuracy=accuracy)
            self._unread = 0
        if not self._loss:
            return
        logits = torch.stack(self._logits)  # (rows, N, C)
        rows, samples, classes = logits.shape
        plain = dynamic_cross_entropy(
            logits.view(-1, classes), self.target.repeat(rows), self.no_oscillation, 0, reduction="none"
        )
        self.rows.extend(
            weighted_loss=torch.stack(self._loss),
            loss=plain.view(rows, samples).mean(1),
            accuracy=(logits.argmax(-1) == self.target).double().mean(1),
        )
        self._loss.clear()
        self._logits.clear()

    def metrics(self) -> dict[str, NDArray[Any]]:
        """Everything recorded, as it goes into metrics.npz."""
        steps = torch.arange(len(self.rows))
        weights = self.oscillation.weights(steps + 1).cpu().numpy()
        density = self.density_rows.arrays() if self.config.density_every else {}
        recorded = self.rows.arrays() | self.curvature.arrays() | density
        return {"step": steps.numpy(), "weights": weights, **recorded}

    def _forward(self) -> tuple[Tensor, Tensor, Gradients | None]:
        """Logits, the loss's gradient with respect to them and, from an eigenvalue update, to the parameters.

        The last is what a backward pass from the second gives, bit for bit.
        """
        gradients = None
        logits = self.model(self.inputs)
        loss, gradient = loss_and_gradient(logits, self.target, self.oscillation, self.step)
        row = self.step - 1  # rows are taken after an update, with the weights of the next step
        if row == len(self.rows) + len(self._loss):  # not so at step 0, nor when a finished run is extended
            if self._eigenvalues_due(row):  # a stop may end it: then there is no such row yet
                hessian = self._track_curvature(row, partial(self._hessian_of, logits))
                gradients = cast(Gradients, hessian.gradients)  # none is None: the loss uses every parameter
            self._loss.append(loss)
            self._logits.append(logits.detach())
        return logits, gradient, gradients

    def _advance_on_device(self) -> None:
        """The same in as many launches as there are products, and one more."""
        if self._unread == 0:
            self.clock.fill_(self.step)
        row = self.step - 1
        if row >= len(self.rows) and self._eigenvalues_due(row):
            self._track_curvature(row, self._replayed_hessian)
        self._replayed.run()
        self.step += 1
        self._unread += 1

    def _descend(self) -> None:
        """What a CUDA graph holds of an update: with the row before it, which it measures."""
        logits = self.model(self.inputs)
        loss, gradient = loss_and_gradient(logits, self.target, self.oscillation, self.clock)
        gradients = torch.autograd.grad(logits, self.params, gradient)
        with torch.no_grad():
            torch._foreach_add_(self.params, gradients, alpha=-self.config.lr)
            plain = dynamic_cross_entropy(logits, self.target, self.no_oscillation, 0)
            accuracy = (logits.argmax(-1) == self.target).to(loss.dtype).mean()
            self.records.append(torch.stack([loss, plain, accuracy]))
            self.clock.add_(1)

    def _eigenvalues_due(self, row: int) -> bool:
        return self.config.eig_every > 0 and row % self.config.eig_every == 0

    def _hessian_of(self, logits: Tensor) -> HessianOperator:
        return HessianOperator(dynamic_cross_entropy(logits, self.target, self.oscillation, self.step), self.params)

    def _replayed_hessian(self) -> CapturedHessian:
        def loss() -> Tensor:
            return dynamic_cross_entropy(self.model(self.inputs), self.target, self.oscillation, self.clock)

        if self._hessian is None:
            self._hessian = CapturedHessian(loss, self.params)
        return self._hessian.refresh()

    def fallback(self) -> str | None:
        """Why steps or products are plain calls; None where they are replayed."""
        return self._replayed.fallback or (self._hessian.fallback if self._hessian else None)

    def _track_curvature(self, row: int, make: Callable[[], Operator]) -> Operator:
        config, began = self.config, time.perf_counter()
        hessian = make()
        also = {"ntk": ntk_eigenvalues(self.model, self.inputs[:50], k=1)[0]} if config.ntk else {}
        spectrum = None
        if config.density_every and row % config.density_every == 0:
            with interruptible():
                spectrum = spectral_density(hessian)
        self.curvature.update(row, hessian, **also)
        if spectrum is not None:
            self.density_rows.append(
                density_step=row,
                density_grid=spectrum.grid,
                density=spectrum.density,
                density_stderr=spectrum.stderr,
            )
        self.eigen_seconds += time.perf_counter() - began
        return hessian


def train(run: SpiralRun, folder: RunFolder) -> None:
    """Run to the last step, or to a Ctrl-C or SIGTERM; the folder is left with a checkpoint either way."""
    config = run.config
    with GracefulStop() as stop, tqdm(total=config.steps, initial=len(run.rows), unit="step") as bar:
        while len(run.rows) < config.steps and not stop.requested:
            began = time.perf_counter()
            end = min(run.step - run.step % BLOCK + BLOCK, config.steps)
            try:
                while run.step < end and not stop.requested:
                    run.advance()
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
    limit = stability_limit(torch.optim.SGD(run.params, lr=config.lr))
    analysis = analyse(metrics, rule=config.rule, period=config.period, limit=limit)
    rows, updates = len(metrics["step"]), len(metrics["eig_step"])
    summary = {
        "finished": rows == config.steps,
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
        run = SpiralRun(config)
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


def _task(config: SpiralConfig) -> tuple[Tensor, Tensor, SpiralMLP]:
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
