"""Callbacks for the Trainer of the package ``transformers``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynloss_ext._operators import CurvatureOperator
from dynloss_ext.eigen import EigenTracker
from dynloss_ext.integrations._periodic import PeriodicTracker
from dynloss_ext.loss import DynamicCrossEntropyLoss

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("transformers: expected the package, got none that imports: pip install transformers") from error

__all__ = ["EigenvalueCallback", "StepCallback"]


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Sets a criterion to the Trainer's ``state.global_step``, and moves it to the Trainer's device.

    So Γ goes on with the optimizer's steps, whatever number of batches gradients are accumulated over, and after
    resuming from a checkpoint. Nothing else is to call ``criterion.step()``. Evaluation sees Γ of the next step.

    The Trainer adds up what ``compute_loss_func`` returns for the batches of a step. So that this is their mean, divide
    sums by the number of labels in all of them, which it hands over::

        criterion = DynamicCrossEntropyLoss(oscillation, reduction="sum")

        def compute_loss(outputs, labels, num_items_in_batch):
            return criterion(outputs.logits, labels) / num_items_in_batch

    Args:
        criterion: the loss that ``compute_loss_func``, or the model, calls.

    Raises:
        TypeError: it is no DynamicCrossEntropyLoss.
    """

    def __init__(self, criterion: DynamicCrossEntropyLoss) -> None:
        if not isinstance(criterion, DynamicCrossEntropyLoss):
            raise TypeError(f"criterion: expected a DynamicCrossEntropyLoss, got {type(criterion).__name__}")
        self._criterion = criterion

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._criterion.to(args.device).set_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._criterion.set_step(state.global_step)


class EigenvalueCallback(PeriodicTracker, TrainerCallback):  # type: ignore[misc]
    """Eigenvalues of the curvature every n optimizer steps, by ``trainer.log``; for ``trainer.add_callback``.

    Measured before a step and logged at its number, as ``eigenvalue/1`` (first of the result's values),
    ``eigenvalue/2``, ...: to ``state.log_history`` and all that the Trainer reports to. A tracker with ``max_interval``
    is updated less often while the largest one rests. Its state is a file in each ``checkpoint-N`` of
    ``args.output_dir``, with sharded parameters one of each process, and resumed from there; a checkpoint that lies
    elsewhere starts it anew, with a warning, unless it has been given its state before:
    ``tracker.load_state_dict(torch.load(file)["tracker"])``::

        def hessian(model):
            return HessianOperator(lambda: criterion(model(**inputs).logits, labels), model.parameters())

        trainer.add_callback(StepCallback(criterion))
        trainer.add_callback(EigenvalueCallback(trainer, hessian, EigenTracker(k=2)))

    Args:
        trainer: whose ``log`` is called.
        operator: model -> the operator, such as ``lambda model: HessianOperator(lambda: loss(model(**inputs)),
            model.parameters())``, on fixed data. The model is in train mode, as it is in a step; a random loss, as of
            dropout, is refused, unless the function calls ``model.eval()``. Every process calls it, and
            `HessianOperator.from_batches` with its ``process_group`` is that of all processes' data.
        tracker: an EigenTracker. Its ``result`` has the vectors and residuals of the last update.
        every_n_steps: n, in steps of the optimizer.
        name: of what is logged, and of the file: of several callbacks, each needs its own.

    Raises:
        TypeError, ValueError: an argument is not as described; those of the operator and of `EigenTracker.update`.
    """

    def __init__(
        self,
        trainer: Any,
        operator: Callable[[Any], CurvatureOperator],
        tracker: EigenTracker,
        *,
        every_n_steps: int = 50,
        name: str = "eigenvalue",
    ) -> None:
        super().__init__(operator, tracker, every_n_steps=every_n_steps, name=name)
        if not callable(getattr(trainer, "log", None)):
            raise TypeError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}")
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.train()  # after an evaluation it is not yet
        if values := self._update(model, state.global_step):
            self._trainer.log(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file, tracker = self._file(args, state), self.state_dict()
        if tracker["tracker"]["place"] is not None:  # every process has a shard of the vectors
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tracker, self._of_process(file, args))
        elif args.should_save and file.parent.is_dir():
            torch.save(tracker, file)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        file = self._file(args, state)
        own = self._of_process(file, args)
        file = own if own.is_file() else file
        if file.is_file():
            self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        elif self._tracker.num_updates == 0:
            warnings.warn(f"tracker: expected its state in {file}, got no such file: it starts anew", stacklevel=2)

    def _file(self, args: Any, state: Any) -> Path:
        folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        return Path(args.output_dir) / folder / f"{self._name}_tracker.pt"

    @staticmethod
    def _of_process(file: Path, args: Any) -> Path:
        return file.with_stem(f"{file.stem}_{args.process_index}")
