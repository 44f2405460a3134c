"""The largest eigenvalues of the Hessian of F along a training run."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.data import Batch
from common.records import Table
from common.stopping import Stopped, interruptible
from dynloss_ext import CurvatureOperator, EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy


class CurvatureTracker:
    """Follows the `k` largest eigenvalues from update to update and records them.

    Args:
        k: how many.
        tol: relative residual at which one counts as found.
        oscillation: of the loss. In a new turn another eigenvector may have overtaken those that are followed, so
            the first update of each audits.
        also: names of further columns that `update` is given values for.
    """

    def __init__(self, k: int, tol: float, oscillation: Oscillation, also: Sequence[str] = ()) -> None:
        self.k, self.oscillation = k, oscillation
        self.tracker = EigenTracker(k, tol=tol, max_hvp=max(1000, 20 * k))
        self.rows = Table("eig_step", "eigenvalues", "residuals", "num_hvp", "converged", *also)
        self.latest = math.nan  # λ_max of the newest row
        self.step = 0  # of the last update
        self._turn = oscillation.turn(0)  # that it belongs to

    def update(self, row: int, hessian: CurvatureOperator, **also: Any) -> None:
        """Records the eigenvalues after update `row`, with the weights of step row + 1; nothing if it is stopped."""
        step, before = row + 1, copy.copy(self.tracker)
        turn = self.oscillation.turn(step)
        try:
            with interruptible():
                result = self.tracker.update(hessian, audit=not torch.equal(turn, self._turn))
        except Stopped:
            self.tracker = before
            raise
        self.rows.append(
            eig_step=row,
            eigenvalues=result.values,
            residuals=result.residuals,
            num_hvp=result.num_hvp,
            converged=result.converged,
            **also,
        )
        self.step, self._turn, self.latest = step, turn, float(result.values[0])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns of metrics.npz, with their types and shapes even before the first row."""
        empty = {
            "eig_step": np.empty(0, np.int64),
            "eigenvalues": np.empty((0, self.k)),
            "residuals": np.empty((0, self.k)),
            "num_hvp": np.empty(0, np.int64),
            "converged": np.empty((0, self.k), bool),
        }
        return self.rows.arrays() if len(self.rows) else empty

    def state_dict(self) -> dict[str, Any]:
        return {"tracker": self.tracker.state_dict(), "rows": self.rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.rows.load_state_dict(state["rows"])
        if len(self.rows):
            arrays = self.rows.arrays()
            self.step, self.latest = int(arrays["eig_step"][-1]) + 1, float(arrays["eigenvalues"][-1, 0])
            self._turn = self.oscillation.turn(self.step)


def hessian_of_batches(
    model: nn.Module, batches: Sequence[Batch], oscillation: Oscillation, step: int
) -> HessianOperator:
    """The Hessian of F over all `batches`, at the weights of `step`; BatchNorm allows one batch only."""

    def loss_and_count(batch: Batch) -> tuple[Tensor, int]:
        loss = dynamic_cross_entropy(model(batch.images), batch.labels, oscillation, step, reduction="sum")
        return loss, len(batch.labels)

    def mean_loss() -> Tensor:
        total, count = loss_and_count(batches[0])
        return total / count

    parameters = list(model.parameters())
    if len(batches) == 1:
        return HessianOperator(mean_loss, parameters)
    return HessianOperator.from_batches(loss_and_count, parameters, batches)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32, whose rounding would drown the smaller eigenvalues."""
    saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved
