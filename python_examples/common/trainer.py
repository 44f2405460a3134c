"""One network in training: what a step computes, what is measured, and all the state that a resume needs.

Row i of the metrics is taken after update i, with the weights of step i + 1: it is what the forward pass of
update i + 1 sees anyway, on that update's batch.  So measuring costs no pass of its own but one at the end.

An ensemble is one network that gives (E, N, C) logits: then a loss is (E,) and a row (E, 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
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
from common.ensemble import Ensemble
from common.recording import Table
from common.tracking import CurvatureTracker
from dynloss_ext import dynamic_cross_entropy

_VALIDATION_BATCH = 1000
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """Trains one network, or several at once; all of its state can be saved, and restored to the bit.

    Args:
        config: the options of the run.
        data: the images.
        world: the processes of the run.
        members: for an ensemble: a configuration each, which may differ from `config` in seed and amplitude.
    """

    def __init__(
        self, config: TrainingConfig, data: Dataset, world: World, members: Sequence[TrainingConfig] = ()
    ) -> None:
        configure_numerics(config)
        self.config, self.world = config, world
        self.shape = (len(members),) if members else ()  # of what is measured per network
        seed = [member.seed for member in members] if members else config.seed
        amplitude = torch.tensor([m.amplitude for m in members], dtype=torch.float64) if members else None
        layout: dict[str, Any] = {"dtype": parameter_dtype(config), "channels_last": config.channels_last}
        train, test = data.train.to(world.device), data.test.to(world.device)
        self.batches = Batches(train, config.batch_size, seed=seed, augment=config.augment, **layout)
        self.validation = Batches(test, min(_VALIDATION_BATCH, len(test)), shuffle=False, **layout)
        self.num_steps = config.epochs * self.batches.per_epoch
        self.shards = self._own_shards()
        self.oscillation = build_oscillation(config, self.batches.per_epoch, amplitude)
        self.schedule = build_schedule(config, self.batches.per_epoch)
        model = Ensemble([build_model(member) for member in members]) if members else build_model(config)
        self.model = self._place(model)
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
        self.seconds = {"training": 0.0, "eigenvalues": 0.0, "validation": 0.0, "cpu": 0.0}  # wall time; all threads
        self.rows = Table("metrics")
        self.newest = self._no_metrics().fill_(torch.nan)
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
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(self.world.device).to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]

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
        metrics = self._no_metrics()
        for shard in self.shards:
            batch = self.batches.get(self.step, shard, self.num_shards)
            if len(batch.labels):
                weighted = self._measure(batch, self.network, total, metrics)
                torch.autograd.backward(self.scaler.scale(weighted))
        if self.parameters[0].grad is None:  # not one image for this process, but it takes part in the sum
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        return metrics

    def _measure(self, batch: Batch, network: Callable[[Tensor], Tensor], total: int, metrics: Tensor) -> Tensor:
        """This batch's share of F = (1 / total) Σ Γ CE; adds those of (F, loss, accuracy) to `metrics`.

        For an ensemble: the sum of the members' F, whose gradient is each member's own.
        """
        with self._autocast():
            logits = network(batch.images)
            share = dynamic_cross_entropy(logits, batch.labels, self.oscillation, self.step, reduction="sum")
            weighted = share / total
        with torch.no_grad():
            plain = _loss_and_correct(logits.to(metrics.dtype), batch.labels)
            metrics += torch.cat([weighted.to(metrics.dtype).unsqueeze(-1), plain / total], dim=-1)
        return weighted.sum()

    def _no_metrics(self) -> Tensor:
        return torch.zeros(*self.shape, 3, dtype=parameter_dtype(self.config), device=self.world.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype) if dtype else contextlib.nullcontext()

    # --- measurements ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_last(self) -> None:
        """The last row: the forward pass of an update that is not made; BatchNorm's statistics stay."""
        if len(self.rows) >= self.step:
            return
        metrics = self._no_metrics()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def network(images: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(self.model, buffers, (images,))
            return logits

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
        sums = torch.zeros(*self.shape, 2, dtype=torch.float64, device=self.world.device)
        for index in range(self.validation.per_epoch):
            batch = self.validation.get(index, self.world.rank, self.world.size)
            if len(batch.labels) == 0:
                continue
            with self._autocast():
                logits = self.network(batch.images)
            sums += _loss_and_correct(logits.to(torch.float64), batch.labels)
        self.model.train()
        self.world.sum_([sums])
        loss, accuracy = (sums / len(self.validation.split)).unbind(-1)
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


def _loss_and_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(Σ cross-entropy, number of right answers) over the images: (2,), or (E, 2) for logits (E, N, C)."""
    labels = labels.expand(logits.shape[:-1])
    loss = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    correct = (logits.argmax(-1) == labels).to(loss.dtype)
    return torch.stack([loss.sum(-1), correct.sum(-1)], dim=-1)
