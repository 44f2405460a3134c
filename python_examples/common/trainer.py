"""One network in training: what a step computes, what is measured, and all the state that a resume needs.

Row i of the metrics is taken after update i, with the weights of step i + 1: it is what the forward pass of
update i + 1 sees anyway, on that update's batch.  So measuring costs no pass of its own but one at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batches import Batch, Batches
from common.cifar10 import Dataset
from common.config import (
    TrainingConfig,
    build_model,
    build_oscillation,
    build_schedule,
    configure_numerics,
    parameter_dtype,
)
from common.distributed import World
from common.recording import Table
from common.tracking import CurvatureTracker
from dynloss_ext import dynamic_cross_entropy

_VALIDATION_BATCH = 1000
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """Trains one network; all of its state can be saved, and restored to the bit."""

    def __init__(self, config: TrainingConfig, data: Dataset, world: World) -> None:
        configure_numerics(config)
        self.config, self.world = config, world
        layout: dict[str, Any] = {"dtype": parameter_dtype(config), "channels_last": config.channels_last}
        train, test = data.train.to(world.device), data.test.to(world.device)
        self.batches = Batches(train, config.batch_size, seed=config.seed, augment=config.augment, **layout)
        self.validation = Batches(test, min(_VALIDATION_BATCH, len(test)), shuffle=False, **layout)
        self.num_steps = config.epochs * self.batches.per_epoch
        self.shards = self._own_shards()
        self.oscillation = build_oscillation(config, self.batches.per_epoch)
        self.schedule = build_schedule(config, self.batches.per_epoch)
        self.model = self._place(build_model(config))
        self.network: Callable[[Tensor], Tensor] = torch.compile(self.model) if config.compile else self.model
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.curvature = None
        if config.eig_every and world.is_main:
            self.curvature = CurvatureTracker(config, self.batches, self.model, self.oscillation)
        self.step = 0
        self.diverged = False
        self.seconds = {"training": 0.0, "eigenvalues": 0.0, "validation": 0.0}
        self.rows = Table("metrics")
        self.newest = torch.full((3,), torch.nan)
        self.validation_rows = Table("step", "loss", "accuracy")

    # --- building -------------------------------------------------------------------------------------------

    def _own_shards(self) -> range:
        """This process's part of the batch's shards."""
        num_shards, size = self.num_shards, self.world.size
        if num_shards % size:
            raise ValueError(f"shards: got {num_shards}, expected a multiple of the number of processes, {size}")
        own = num_shards // size
        if self.config.sync_batchnorm and (own > 1 or self.world.device.type != "cuda"):
            raise ValueError("sync_batchnorm: expected CUDA and one shard per process")
        return range(self.world.rank * own, (self.world.rank + 1) * own)

    @property
    def num_shards(self) -> int:
        return self.config.shards or self.world.size

    def _place(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
                module.momentum /= len(self.shards)  # a step makes that many updates of the running statistics
        if self.config.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(self.world.device, memory_format=memory_format)

    # --- one step -------------------------------------------------------------------------------------------

    def update(self) -> None:
        """One step of gradient descent on F at the current step's weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self._forward_backward()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.world.sum_([*gradients, metrics])
        if self.step > 0:
            self._append(metrics)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1

    def _forward_backward(self) -> Tensor:
        """Accumulates this process's part of the gradient; returns its part of (F, loss, accuracy)."""
        total = self.batches.size(self.step)
        metrics = torch.zeros(3, dtype=parameter_dtype(self.config), device=self.world.device)
        for shard in self.shards:
            batch = self.batches.get(self.step, shard, self.num_shards)
            if len(batch.labels):
                weighted = self._measure(batch, self.network, total, metrics)
                self.scaler.scale(weighted).backward()
        if self.parameters[0].grad is None:  # not one image for this process, but it takes part in the sum
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        return metrics

    def _measure(self, batch: Batch, network: Callable[[Tensor], Tensor], total: int, metrics: Tensor) -> Tensor:
        """This batch's share of F = (1 / total) Σ Γ CE; adds those of (F, loss, accuracy) to `metrics`."""
        with self._autocast():
            logits = network(batch.images)
            share = dynamic_cross_entropy(logits, batch.labels, self.oscillation, self.step, reduction="sum")
            weighted = share / total
        with torch.no_grad():
            loss = F.cross_entropy(logits.to(metrics.dtype), batch.labels, reduction="sum")
            correct = (logits.argmax(1) == batch.labels).sum(dtype=metrics.dtype)
            metrics += torch.stack([weighted.to(metrics.dtype), loss / total, correct / total])
        return weighted

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype) if dtype else contextlib.nullcontext()

    # --- measurements ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_last(self) -> None:
        """The last row: the forward pass of an update that is not made; BatchNorm's statistics stay."""
        if len(self.rows) >= self.step:
            return
        metrics = torch.zeros(3, dtype=parameter_dtype(self.config), device=self.world.device)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def network(images: Tensor) -> Tensor:
            return torch.func.functional_call(self.model, buffers, (images,))

        for shard in self.shards:
            batch = self.batches.get(self.step, shard, self.num_shards)
            if len(batch.labels):
                self._measure(batch, network, self.batches.size(self.step), metrics)
        self.world.sum_([metrics])
        self._append(metrics)

    def _append(self, metrics: Tensor) -> None:
        self.newest = metrics
        self.rows.append(metrics=metrics)

    @torch.no_grad()
    def validate(self) -> None:
        """Plain cross-entropy and accuracy on the test images."""
        self.world.average_buffers_(self.model)
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for index in range(self.validation.per_epoch):
            batch = self.validation.get(index, self.world.rank, self.world.size)
            if len(batch.labels) == 0:
                continue
            with self._autocast():
                logits = self.network(batch.images).to(torch.float64)
            sums[0] += F.cross_entropy(logits, batch.labels, reduction="sum")
            sums[1] += (logits.argmax(1) == batch.labels).sum()
        self.model.train()
        self.world.sum_([sums])
        loss, accuracy = (sums / len(self.validation.split)).tolist()
        self.validation_rows.append(step=self.step - 1, loss=loss, accuracy=accuracy)

    # --- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on.  The data order and the learning rate follow from the step."""
        cuda = self.world.device.type == "cuda"
        return {
            "step": self.step,
            "diverged": self.diverged,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "curvature": self.curvature.state_dict() if self.curvature else None,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None},
            "seconds": self.seconds,
            "rows": self.rows.state_dict(),
            "validation_rows": self.validation_rows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.diverged, self.seconds = state["step"], state["diverged"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.curvature:
            self.curvature.load_state_dict(state["curvature"])
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if state["rng"]["cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu())
        self.rows.load_state_dict(state["rows"])
        self.validation_rows.load_state_dict(state["validation_rows"])
