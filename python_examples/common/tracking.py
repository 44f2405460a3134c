"""The largest eigenvalues of the Hessian of F on a fixed set of images, along a training run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.batches import Batch, Batches
from common.config import TrainingConfig
from common.recording import Table
from dynloss_ext import EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy


class CurvatureTracker:
    """Follows the top eigenvalues; leaves parameters, gradients and BatchNorm's statistics as they are.

    The network is in train mode, so with BatchNorm the whole set is one batch.  No autocast, no TF32.
    """

    def __init__(self, config: TrainingConfig, batches: Batches, model: nn.Module, oscillation: Oscillation) -> None:
        split = batches.split.subset(config.classes, config.eig_images)
        size = config.eig_batch or len(split)
        parts = zip(torch.split(split.images, size), torch.split(split.labels, size), strict=True)
        self.batches = [batches.normalise(images, labels) for images, labels in parts]
        self.model, self.oscillation, self.period = model, oscillation, config.period
        self.tracker = EigenTracker(k=config.num_eigenvalues, tol=config.eig_tol)
        self.rows = Table("step", "eigenvalues", "residuals", "num_hvp", "converged")

    def update(self, row: int) -> None:
        """Records the eigenvalues after update `row`, with the weights of step row + 1."""
        step = row + 1

        def loss_and_count(batch: Batch) -> tuple[Tensor, int]:
            logits = self.model(batch.images)
            loss = dynamic_cross_entropy(logits, batch.labels, self.oscillation, step, reduction="sum")
            return loss, len(batch.labels)

        def mean_loss() -> Tensor:
            total, count = loss_and_count(self.batches[0])
            return total / count

        with _full_precision():
            parameters = list(self.model.parameters())
            if len(self.batches) == 1:
                hessian = HessianOperator(mean_loss, parameters)
            else:
                hessian = HessianOperator.from_batches(loss_and_count, parameters, self.batches)
            result = self.tracker.update(hessian, audit=self._class_has_changed(step))
        self.rows.append(
            step=row,
            eigenvalues=result.values,
            residuals=result.residuals,
            num_hvp=result.num_hvp,
            converged=result.converged,
        )

    def _class_has_changed(self, step: int) -> bool:
        """Since the last update: then another eigenvector may have overtaken those that are followed."""
        last = self._last_step()
        return last is not None and math.floor(step / self.period) != math.floor(last / self.period)

    def _last_step(self) -> int | None:
        recorded = self.rows.arrays()["step"]
        return int(recorded[-1]) + 1 if len(recorded) else None

    def latest(self) -> float:
        """λ_max of the newest row, NaN before the first."""
        return float(self.rows.arrays()["eigenvalues"][-1, 0]) if len(self.rows) else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"tracker": self.tracker.state_dict(), "rows": self.rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.rows.load_state_dict(state["rows"])


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved
