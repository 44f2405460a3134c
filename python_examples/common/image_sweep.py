"""A chunk of a sweep over CIFAR-10: its networks trained one after the other, and what is measured of each."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import TrainingConfig
from common.dynamics import dynamics, finite_or_none
from common.run import RunError
from common.sweep import Member, Row
from common.training import Record, train
from dynloss_ext import Oscillation


@dataclass(frozen=True)
class ImageSweep:
    """What all members share. Called with members, which say amplitude, period, lr, width and seed, it returns rows."""

    config: TrainingConfig

    def __call__(self, members: Sequence[Member]) -> list[Row]:
        return [self._row(member) for member in members]

    def configuration(self, member: Member, out: Path) -> TrainingConfig:
        """The options of a member's run."""
        own: dict[str, Any] = {name: member[name] for name in ("amplitude", "period", "lr", "seed")}
        own["widen" if self.config.model == "wrn" else "width"] = int(member["width"])
        return dataclasses.replace(self.config, **own, out=out, resume=False)

    def _row(self, member: Member) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            config = self.configuration(member, Path(folder))
            (record,) = train(config)
        if not record.summary["finished"]:
            raise RunError("stopped within a chunk; run the sweep again to go on with it")
        return _measured(record, config)


def _measured(record: Record, config: TrainingConfig) -> Row:
    summary, metrics = record.summary, record.metrics
    end = len(metrics["step"])
    if config.stop_epoch is not None:
        end = min(end, config.stop_epoch * summary["steps_per_epoch"])
    start = max(0, end - round(config.classes * config.period))
    validation = metrics["validation_accuracy"]
    drive = Oscillation(config.classes, config.amplitude, config.period, waveform=config.waveform)
    row: Row = {
        "final_accuracy": float(metrics["accuracy"][-1]),
        "best_accuracy": float(np.fmax.reduce(metrics["accuracy"])),
        "final_loss": float(metrics["loss"][-1]),
        "lowest_loss": float(np.fmin.reduce(metrics["loss"])),
        "validation_accuracy": float(validation[-1]) if len(validation) else None,
        "best_validation_accuracy": float(np.fmax.reduce(validation)) if len(validation) else None,
        "validation_loss": float(metrics["validation_loss"][-1]) if len(validation) else None,
        "diverged": bool(summary["diverged"]),
        **dynamics(metrics["step"], metrics["weighted_loss"], drive, start, end),
    }
    if len(metrics["eig_step"]):
        along = (metrics["eig_step"] >= start) & (metrics["eig_step"] < end)
        largest = metrics["eigenvalues"][:, 0]
        row["lambda_end"] = float(largest[-1])
        row["lambda_cycle"] = float(np.fmax.reduce(largest[along], initial=-np.inf)) if along.any() else None
    return finite_or_none(row)
