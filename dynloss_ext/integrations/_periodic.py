"""What the callbacks share: when a tracker is updated, what is logged of it, and what a resumed training needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dynloss_ext._checks import check_callable, check_count
from dynloss_ext._operators import CurvatureOperator
from dynloss_ext.eigen import EigenTracker


class PeriodicTracker:
    """Updates a tracker every n steps with the operator that a function makes of the model."""

    def __init__(
        self,
        operator: Callable[[Any], CurvatureOperator],
        tracker: EigenTracker,
        *,
        every_n_steps: int = 50,
        name: str = "eigenvalue",
    ) -> None:
        self._operator = check_callable("operator", operator)
        if not isinstance(tracker, EigenTracker):
            raise TypeError(f"tracker: expected an EigenTracker, got {type(tracker).__name__}")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"name: expected a word of letters, digits and underscores, got {name!r}")
        self._tracker, self._name = tracker, name
        self._last: int | None = None
        self._every_n_steps = check_count("every_n_steps", every_n_steps, 1)

    def _update(self, model: nn.Module, step: int) -> dict[str, float]:
        """The eigenvalues before this step by the names they are logged under; empty where no update is due."""
        n, last = self._every_n_steps, self._last
        if last is not None and (step // n == last // n or not self._tracker.due(abs(step - last))):
            return {}
        modes = [(module, module.training) for module in model.modules()]
        try:
            H = self._operator(model)
            if not isinstance(H, CurvatureOperator):
                raise TypeError(f"operator: expected to return an operator of curvature, got {type(H).__name__}")
            self._move_to(H.device)
            values = self._tracker.update(H).values
        finally:
            for module, training in modes:
                module.training = training
        self._last = step
        return {f"{self._name}/{i}": value for i, value in enumerate(values.tolist(), 1)}

    def _move_to(self, device: torch.device) -> None:
        """Takes the tracker's vectors along: those of a checkpoint come back on the CPU."""
        state = self._tracker.state_dict()
        if state["start"] is not None and state["start"].device != device:
            result = state["result"] | {"vectors": state["result"]["vectors"].to(device)}
            self._tracker.load_state_dict(state | {"start": state["start"].to(device), "result": result})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with: the tracker's state, and the step of its last update."""
        return {"tracker": self._tracker.state_dict(), "last_step": self._last}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a `state_dict`; an empty one leaves all as it is."""
        if state_dict:
            self._tracker.load_state_dict(state_dict["tracker"])
            self._last = state_dict["last_step"]
