"""Callbacks for the Trainer of the package ``lightning``."""

from __future__ import annotations

from typing import Any

from dynloss_ext.integrations._periodic import PeriodicTracker
from dynloss_ext.loss import DynamicCrossEntropyLoss

try:
    from lightning import Callback
except ImportError as error:
    raise ImportError("lightning: expected the package, got none that imports: pip install lightning") from error

__all__ = ["EigenvalueCallback", "StepCallback"]


class StepCallback(Callback):  # type: ignore[misc]
    """Sets every `DynamicCrossEntropyLoss` in the LightningModule to the trainer's ``global_step``.

    So Γ goes on with the optimizer's steps, whatever number of batches gradients are accumulated over, and after
    resuming from a checkpoint. The module is not to call ``criterion.step()``. Validation sees Γ of the next step.
    The how-to on Lightning runs it::

        Trainer(callbacks=[StepCallback()]).fit(module, batches)

    Raises:
        ValueError: at the start of a fit, the module has no such criterion.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._set(trainer, pl_module):
            raise ValueError("pl_module: expected one with a DynamicCrossEntropyLoss among its modules, got none")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._set(trainer, pl_module)

    @staticmethod
    def _set(trainer: Any, pl_module: Any) -> int:
        criteria = [module for module in pl_module.modules() if isinstance(module, DynamicCrossEntropyLoss)]
        for criterion in criteria:
            criterion.set_step(trainer.global_step)
        return len(criteria)


class EigenvalueCallback(PeriodicTracker, Callback):  # type: ignore[misc]
    """Eigenvalues of the curvature every n optimizer steps, in the trainer's loggers.

    Measured before a step and logged at its number, as ``eigenvalue/1`` (first of the result's values),
    ``eigenvalue/2``, ... A tracker with ``max_interval`` is updated less often while the largest one rests. The
    state of the tracker is part of checkpoints, and resumed from them, but for sharded parameters: there it starts
    anew, as every process has its part of the vectors::

        def hessian(module):
            return HessianOperator(lambda: module.criterion(module(inputs), labels), module.parameters())

        Trainer(callbacks=[StepCallback(), EigenvalueCallback(hessian, EigenTracker(k=2))]).fit(module, batches)

    Args:
        operator: LightningModule -> the operator, such as ``lambda module: HessianOperator(lambda: module.loss(x, y),
            module.parameters())``, on fixed data. It may call ``module.eval()``: modes are put back. Every process
            calls it, and `HessianOperator.from_batches` with its ``process_group`` is that of all processes' data.
        tracker: an EigenTracker. Its ``result`` has the vectors and residuals of the last update.
        every_n_steps: n, in steps of the optimizers.
        name: of what is logged, and of this callback's state: of several, each needs its own.

    Raises:
        TypeError, ValueError: an argument is not as described; those of the operator and of `EigenTracker.update`.
    """

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}.{self._name}"

    def state_dict(self) -> dict[str, Any]:
        """Without what a checkpoint of one process cannot hold: of sharded parameters each has its part of vectors."""
        state = super().state_dict()
        return {} if state["tracker"]["place"] is not None else state

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if values := self._update(pl_module, trainer.global_step):
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
