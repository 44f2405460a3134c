"""A chunk of a sweep over the spiral task: all of its networks trained at once, and what is measured of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.dynamics import dynamics, finite_or_none
from common.spiral import spiral_data
from common.sweep import Member, Row
from dynloss_ext import Oscillation, PerceptronEnsemble

CLASSES = 3


@dataclass(frozen=True)
class SpiralSweep:
    """What all members share. Called with members, which say amplitude, period, lr, width and seed, it returns rows."""

    steps: int
    stop_step: int | None
    points: int
    noise: float
    data_seed: int
    init: str
    dtype: str
    measure: Literal["all", "curves", "end"]
    eig_updates: int = 32

    def __call__(self, members: Sequence[Member]) -> list[Row]:
        inputs, target = spiral_data(self.points, CLASSES, self.noise, self.data_seed)
        made = self.ensemble(members, inputs, target)
        period = max(float(member["period"]) for member in members)
        curvature = self.measure == "all"
        # Through the last whole cycle under the oscillation, with eigenvalues along it.
        end = self.steps if self.stop_step is None else min(self.stop_step, self.steps)
        start = max(0, end - round(CLASSES * (period + 1)))
        every = 1 if self.measure != "end" else max(1, self.steps // 100)
        parts = [made.train(start, record_every=every)]
        lambdas: list[Tensor] = []
        result = None
        stops = np.unique(np.linspace(start, end, self.eig_updates + 1).round().astype(int))
        for stop in stops[1:] if curvature else []:
            parts.append(made.train(int(stop) - made.step, record_every=every))
            result = made.eigenvalues(1, start=result, audit=result is None, vectors=True)
            lambdas.append(result.values[:, 0])
        if made.step < self.steps:
            parts.append(made.train(self.steps - made.step - 1, record_every=every))
            parts.append(made.train(1))  # its row is the last one
        if curvature:
            last = made.eigenvalues(1, start=result, audit=True).values[:, 0]
        held_out = self._held_out(made)
        step, weighted, loss, accuracy = (
            np.concatenate([getattr(part, name).numpy() for part in parts])
            for name in ("step", "weighted_loss", "loss", "accuracy")
        )
        rows: list[Row] = []
        for m in range(len(members)):
            row: Row = {
                "final_accuracy": float(accuracy[-1, m]),
                "best_accuracy": float(np.fmax.reduce(accuracy[:, m])),
                "final_loss": float(loss[-1, m]),
                "lowest_loss": float(np.fmin.reduce(loss[:, m])),
                "validation_accuracy": float(held_out[0][m]),
                "validation_loss": float(held_out[1][m]),
                "diverged": not bool(made.finite[m]),
            }
            if self.measure != "end":
                row |= dynamics(step, weighted[:, m], made.oscillation.member(m), start, end)
            if curvature:
                along = torch.stack([values[m] for values in lambdas])
                row["lambda_end"] = float(last[m])
                row["lambda_cycle"] = float(along.nan_to_num(-torch.inf).max()) if made.finite[m] else float("nan")
            rows.append(finite_or_none(row))
        return rows

    def ensemble(self, members: Sequence[Member], inputs: Tensor, target: Tensor) -> PerceptronEnsemble:
        """The networks of the members, untrained."""

        def column(name: str) -> Tensor:
            return torch.tensor([float(member[name]) for member in members], dtype=torch.float64)

        oscillation = Oscillation(CLASSES, column("amplitude"), column("period"), closed=True, stop_step=self.stop_step)
        return PerceptronEnsemble(
            inputs,
            target,
            oscillation,
            hidden=int(members[0]["width"]),
            lr=column("lr"),
            seeds=[int(member["seed"]) for member in members],
            init=self.init,
            dtype=getattr(torch, self.dtype),
        )

    def _held_out(self, made: PerceptronEnsemble) -> tuple[Tensor, Tensor]:
        """Accuracy and plain loss of each member on points of the same arms with other noise."""
        inputs, target = spiral_data(self.points, CLASSES, self.noise, self.data_seed + 1)
        w1, b1, w2, b2 = (made.parameters[name].double() for name in ("w1", "b1", "w2", "b2"))
        hidden = torch.baddbmm(b1.unsqueeze(1), inputs.expand(len(w1), -1, -1), w1).relu_()
        logits = torch.baddbmm(b2.unsqueeze(1), hidden, w2)
        loss = nn.functional.cross_entropy(logits.mT, target.expand(len(w1), -1), reduction="none").mean(1)
        accuracy = (logits.argmax(-1) == target).double().mean(1)
        finite = made.finite
        return torch.where(finite, accuracy, torch.nan), torch.where(finite, loss, torch.nan)
