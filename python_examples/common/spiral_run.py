"""One run of the spiral experiment: its network in training, and what is recorded of it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.records import Table
from common.run import resolve_device
from common.spiral import SpiralMLP
from common.stopping import interruptible
from common.tracking import CurvatureTracker
from dynloss_ext import (
    CapturedHessian,
    CapturedStep,
    CurvatureOperator,
    DeviceRecords,
    HessianOperator,
    Oscillation,
    Perceptron,
    PerceptronEnsemble,
    dynamic_cross_entropy,
    loss_and_gradient,
    ntk_eigenvalues,
    spectral_density,
)

if TYPE_CHECKING:
    from spiral_mlp import SpiralConfig

Task = tuple[Tensor, Tensor, SpiralMLP]  # inputs, target, network
Gradients = tuple[Tensor, ...]
Operator = TypeVar("Operator", bound=CurvatureOperator)

BLOCK = 500  # steps between two looks at the metrics: one host synchronisation and one progress update


class SpiralRun(ABC):
    """The state of one run: network, clock, recorded rows. All in STATE goes through the checkpoint.

    Attributes:
        step: the next forward pass: parameters after `step` updates, weights Γ(step).
    """

    STATE: tuple[str, ...] = ("step", "seconds", "eigen_seconds", "curvature", "rows", "density_rows")

    def __init__(self, config: SpiralConfig, classes: int) -> None:
        self.config = config
        self.oscillation = Oscillation(
            classes, config.amplitude, config.period, closed=config.closed, stop_step=config.stop_step
        )
        also = ("ntk",) if config.ntk else ()
        self.curvature = CurvatureTracker(config.num_eigenvalues, config.tol, self.oscillation, also)
        self.step = 0
        self.seconds = self.eigen_seconds = 0.0
        self.rows = Table("weighted_loss", "loss", "accuracy")
        self.density_rows = Table("density_step", "density_grid", "density", "density_stderr")

    @abstractmethod
    def advance(self, end: int) -> None:
        """One update or more, up to step `end`."""

    @abstractmethod
    def measure_last_row(self) -> None:
        """What no further update measures."""

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return len(self.rows) >= self.config.steps

    @abstractmethod
    def collect(self) -> None:
        """Move the finished rows into the table."""

    def fallback(self) -> str | None:
        """Why steps or products are plain calls; None where they are replayed as CUDA graphs."""
        return None

    @abstractmethod
    def first_points(self) -> tuple[torch.nn.Module, Tensor]:
        """The network and what its neural tangent kernel is of: the first 50 points, as in the authors' notebook."""

    def metrics(self) -> dict[str, NDArray[Any]]:
        """Everything recorded, as it goes into metrics.npz."""
        steps = torch.arange(len(self.rows))
        weights = self.oscillation.weights(steps + 1).cpu().numpy()
        density = self.density_rows.arrays() if self.config.density_every else {}
        recorded = self.rows.arrays() | self.curvature.arrays() | density
        return {"step": steps.numpy(), "weights": weights, **recorded}

    def _eigenvalues_due(self, row: int) -> bool:
        return self.config.eig_every > 0 and row % self.config.eig_every == 0

    def _track_curvature(self, row: int, make: Callable[[], Operator]) -> Operator:
        config, began = self.config, time.perf_counter()
        hessian = make()
        also = {"ntk": ntk_eigenvalues(*self.first_points(), k=1)[0]} if config.ntk else {}
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


class AutogradRun(SpiralRun):
    """Steps and products by autograd; on CUDA a step is one launch, and so is a product."""

    STATE = (*SpiralRun.STATE, "model")

    def __init__(self, config: SpiralConfig, task: Task) -> None:
        inputs, target, model = task
        super().__init__(config, model.b2.numel())
        device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
        # Samples last in memory, as the network takes them: else a third of the backward pass is one product.
        self.inputs = inputs.t().to(device, dtype).contiguous().t()
        self.target, self.model = target.to(device), model.to(device, dtype)
        self.params: list[Tensor] = list(self.model.parameters())
        self.no_oscillation = Oscillation(model.b2.numel(), 1.0, config.period)
        self._loss: list[Tensor] = []
        self._logits: list[Tensor] = []
        self.on_device = device.type == "cuda" and config.graphs
        self.clock = torch.zeros((), dtype=torch.int64, device=device)  # `step`, for what is captured
        self.records = DeviceRecords(BLOCK, (3,), dtype=dtype, device=device)
        self._unread = 0  # rows that are in `records` yet
        self._replayed = CapturedStep(self._descend, device)
        self._hessian: CapturedHessian | None = None

    def advance(self, end: int) -> None:
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
        self._forward()
        self.collect()

    def collect(self) -> None:
        """Accuracy and plain loss are computed for all finished rows at once."""
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

    def _hessian_of(self, logits: Tensor) -> HessianOperator:
        return HessianOperator(dynamic_cross_entropy(logits, self.target, self.oscillation, self.step), self.params)

    def _replayed_hessian(self) -> CapturedHessian:
        def loss() -> Tensor:
            return dynamic_cross_entropy(self.model(self.inputs), self.target, self.oscillation, self.clock)

        if self._hessian is None:
            self._hessian = CapturedHessian(loss, self.params)
        return self._hessian.refresh()

    def fallback(self) -> str | None:
        return self._replayed.fallback or (self._hessian.fallback if self._hessian else None)

    def first_points(self) -> tuple[torch.nn.Module, Tensor]:
        return self.model, self.inputs[:50]


class FusedRun(SpiralRun):
    """Steps and products by compiled code for this kind of network: on the CPU ten and more times as fast."""

    STATE = (*SpiralRun.STATE, "network")

    def __init__(self, config: SpiralConfig, task: Task) -> None:
        inputs, target, model = task
        super().__init__(config, model.b2.numel())
        dtype = getattr(torch, config.dtype)
        values = {"w1": model.w1.t(), "b1": model.b1[:, 0], "w2": model.w2.t(), "b2": model.b2[:, 0]}
        self.inputs = inputs.to(dtype)
        self.network = PerceptronEnsemble(
            inputs, target, self.oscillation, hidden=model.b1.numel(), lr=config.lr, init=values, dtype=dtype
        )

    def advance(self, end: int) -> None:
        """Up to the next eigenvalue update, the one that is due now made first: a stop may have cut it off."""
        self.measure_last_row()
        end = min(end, self._next_due(self.step) + 1)
        records = self.network.train(end - self.step)
        self.rows.extend(
            weighted_loss=records.weighted_loss[:, 0], loss=records.loss[:, 0], accuracy=records.accuracy[:, 0]
        )
        self.step = end

    def measure_last_row(self) -> None:
        if self._lacks_eigenvalues():
            self._track_curvature(self.step - 1, lambda: self.network.hessian(0))

    def collect(self) -> None:
        """They are there from the beginning."""

    def is_complete(self) -> bool:
        return super().is_complete() and not self._lacks_eigenvalues()

    def _next_due(self, row: int) -> int:
        """The first row from this one on with eigenvalues, or the run's last."""
        every = self.config.eig_every
        return -(-row // every) * every if every else self.config.steps - 1

    def _lacks_eigenvalues(self) -> bool:
        """Of the newest row, where they are due."""
        return self.step > 0 and self._eigenvalues_due(self.step - 1) and self.curvature.step < self.step

    def fallback(self) -> str:
        return "the fused engine is of the CPU"

    def first_points(self) -> tuple[Perceptron, Tensor]:
        return self.network.member(0), self.inputs[:50]


class WindowedRun(FusedRun):
    """The same with eigenvalues at every step of some windows, (first, last) rows in order, and nowhere else."""

    def __init__(self, config: SpiralConfig, task: Task, windows: Sequence[tuple[int, int]]) -> None:
        super().__init__(config, task)
        self.windows = windows

    def _eigenvalues_due(self, row: int) -> bool:
        return any(first <= row <= last for first, last in self.windows)

    def _next_due(self, row: int) -> int:
        return next((max(row, first) for first, last in self.windows if row <= last), self.config.steps - 1)
