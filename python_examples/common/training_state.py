"""A training on CIFAR-10: its state, its step, and what is measured.

Row i of the metrics is taken after update i, with the weights of step i + 1: it is what the forward pass of
update i + 1 sees anyway, on that update's batch.  So measuring costs no pass of its own but one at the end.

On CUDA an update is one launch: `Training._advance` is captured in a CUDA graph and replayed, so what changes from step
to step lies on the device: the step, the order of the images, the learning rates, the rows.

An ensemble is one network that gives (E, N, C) logits: then a loss is (E,) and a row (E, 3).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config import TrainingConfig
from common.data import IMAGE_BYTES, Batch, Batches, Dataset, copy_to_device_
from common.distributed import World
from common.models import Ensemble, mlp, myrtle5, num_parameters, wide_resnet
from common.records import Table, load_state, state_of
from common.stopping import Stopped
from common.tracking import CurvatureTracker, full_precision, hessian_of_batches
from dynloss_ext import CapturedStep, DeviceRecords, Oscillation, dynamic_cross_entropy
from dynloss_ext.stability import stability_limit

_VALIDATION_BATCH = 1000
_BLOCK = 512  # steps whose rows, and whose learning rates, lie on the device
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Training:
    """One network in training, or several at once; all of its state can be saved, and restored to the bit.

    Args:
        config: the options of the run.
        data: the images.
        world: the processes of the run.
        members: for an ensemble: a configuration each, which may differ from `config` in seed and amplitude.
    """

    STATE = ("step", "diverged", "model", "optimizer", "scaler", "curvature", "seconds", "rows", "validation_rows")

    def __init__(
        self, config: TrainingConfig, data: Dataset, world: World, members: Sequence[TrainingConfig] = ()
    ) -> None:
        configure_numerics(config)
        self.config, self.world = config, world
        self.shape = (len(members),) if members else ()  # of what is measured per network
        self.num_networks = math.prod(self.shape)
        train, test = data.train.to(world.device), data.test.to(world.device)
        layout: dict[str, Any] = {"dtype": parameter_dtype(config), "channels_last": config.channels_last}
        seed = [member.seed for member in members] if members else config.seed
        self.batches = Batches(train, config.batch_size, seed=seed, augment=config.augment, **layout)
        self.validation = Batches(test, min(_VALIDATION_BATCH, len(test)), shuffle=False, **layout)
        self.num_steps = config.epochs * self.batches.per_epoch
        self.num_shards = config.shards or world.size
        self.shards = self._own_shards()
        amplitude = torch.tensor([m.amplitude for m in members], dtype=torch.float64) if members else config.amplitude
        stop_step = None if config.stop_epoch is None else config.stop_epoch * self.batches.per_epoch
        self.oscillation = Oscillation(
            config.classes, amplitude, config.period, waveform=config.waveform, stop_step=stop_step
        )
        self.learning_rate = learning_rate(config, self.batches.per_epoch)
        model = Ensemble([build_model(member) for member in members]) if members else build_model(config)
        self.model = self._place(model)
        self.network: Callable[[Tensor], Tensor] = torch.compile(self.model) if config.compile else self.model
        self.parameters = list(self.model.parameters())
        # SGD's fused kernel reads its learning rate on the device, in float32.
        on_device = world.device.type == "cuda" and parameter_dtype(config) == torch.float32
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True if on_device else None,
        )
        self._rates = torch.zeros(_BLOCK, device=world.device) if on_device else None
        self._rates_from = -1  # the step of the first of them
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.curvature = CurvatureTracker(config.num_eigenvalues, config.eig_tol, self.oscillation)
        self.hessian_batches = self._hessian_batches() if config.eig_every and world.is_main else []
        self.step = 0
        self.diverged = False
        self.seconds = {"training": 0.0, "eigenvalues": 0.0, "validation": 0.0, "cpu": 0.0}  # wall time; all threads
        self.clock = torch.zeros((), dtype=torch.int64, device=world.device)  # `step`, for the loss and the batches
        self.rows = Table("metrics")
        self.records = DeviceRecords(_BLOCK, (*self.shape, 3), dtype=parameter_dtype(config), device=world.device)
        self._unread = 0  # rows that are in `records` yet
        self._newest = torch.full((*self.shape, 3), torch.nan)
        self.validation_rows = Table("step", "loss", "accuracy")
        self._obstacle = self._obstacle_to_graphs()
        self._captured: dict[int, CapturedStep] = {}  # by the size of the batch
        self._pool = torch.cuda.graph_pool_handle() if self._obstacle is None else None
        self._told = world.device.type != "cuda" or not config.graphs  # whether the user knows why steps are plain

    def _obstacle_to_graphs(self) -> str | None:
        """Why steps cannot be replayed, as far as is known beforehand."""
        if self.world.device.type != "cuda":
            return f"there are no CUDA graphs on a {self.world.device.type}"
        if not self.config.graphs:
            return "--no-graphs"
        if self.world.size > 1:
            return "several processes sum their gradients"
        return "--precision float64 has its learning rate on the host" if self._rates is None else None

    def _own_shards(self) -> range:
        """This process's part of the batch's shards."""
        size = self.world.size
        if self.num_shards % size:
            raise ValueError(f"--shards: expected a multiple of the number of processes, {size}, got {self.num_shards}")
        own = self.num_shards // size
        if self.config.sync_batchnorm and (own > 1 or self.world.device.type != "cuda"):
            raise ValueError(
                "--sync-batchnorm: expected CUDA and one shard per process with it, "
                f"got {self.world.device.type} and {own} shards"
            )
        return range(self.world.rank * own, (self.world.rank + 1) * own)

    def _place(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
                module.momentum /= len(self.shards)  # a step makes that many updates of the running statistics
        if self.config.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(self.world.device).to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]

    def _hessian_batches(self) -> list[Batch]:
        """The images whose Hessian is followed, in parts; with BatchNorm all are one batch."""
        split = self.batches.split.subset(self.config.classes, self.config.eig_images)
        size = self.config.eig_batch or len(split)
        parts = zip(torch.split(split.images, size), torch.split(split.labels, size), strict=True)
        return [self.batches.normalise(images, labels) for images, labels in parts]

    def update(self) -> None:
        """One step of gradient descent on F at the current step's weights."""
        with self._timed("training"):
            self.batches.begin(self.step)
            self._set_rate()
            self._step_on(self.batches.size(self.step)).run()
            self.step += 1
            self._unread += 1
        if self._unread == _BLOCK:
            self.collect()

    def _set_rate(self) -> None:
        """Tells the optimizer its learning rate: as a number, and on the device as one of a block."""
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.step)
        first = self.step - self.step % _BLOCK
        if self._rates is not None and first != self._rates_from:
            copy_to_device_(self._rates, torch.tensor([self.learning_rate(first + i) for i in range(_BLOCK)]))
            self._rates_from = first

    def _step_on(self, size: int) -> CapturedStep:
        """Steps on batches of this size: an epoch may have two sizes, and a graph has one."""
        if size not in self._captured:
            capture, step = self._obstacle is None, partial(self._advance, size)
            warmup = 2 if self._captured else 3  # a second size finds most of what is made once
            self._captured[size] = CapturedStep(
                step, self.world.device, warmup=warmup, capture=capture, pool=self._pool
            )
        return self._captured[size]

    def _advance(self, size: int) -> None:
        """What a graph holds of an update: it neither reads from the device nor writes to it from the host."""
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self._forward_backward(size)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.world.sum_([*gradients, metrics])
        self.records.append(metrics)
        self._descend()
        self.clock.add_(1)

    def _descend(self) -> None:
        (group,) = self.optimizer.param_groups
        number = group["lr"]
        if self._rates is not None:
            place = (self.clock % _BLOCK).view(1)  # without a dimension it would be read by the host
            group["lr"] = self._rates.index_select(0, place).squeeze(0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        group["lr"] = number

    def _forward_backward(self, size: int) -> Tensor:
        """Accumulates this process's part of the gradient; returns its part of (F, loss, accuracy)."""
        metrics = self._no_metrics()
        for shard in self.shards:
            batch = self.batches.get_at(self.clock, size, shard, self.num_shards)
            if len(batch.labels):
                weighted = self._forward(batch, self.network, size, metrics)
                torch.autograd.backward(self.scaler.scale(weighted))
        if self.parameters[0].grad is None:  # not one image for this process, but it takes part in the sum
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        return metrics

    def _forward(self, batch: Batch, network: Callable[[Tensor], Tensor], total: int, metrics: Tensor) -> Tensor:
        """This batch's share of F = (1 / total) Σ Γ CE; adds those of (F, loss, accuracy) to `metrics`.

        For an ensemble: the sum of the members' F, whose gradient is each member's own.
        """
        with self._autocast():
            logits = network(batch.images)
            share = dynamic_cross_entropy(logits, batch.labels, self.oscillation, self.clock, reduction="sum")
            weighted = share / total
        with torch.no_grad():
            plain = _loss_and_correct(logits.to(metrics.dtype), batch.labels)
            metrics += torch.cat([weighted.to(metrics.dtype).unsqueeze(-1), plain / total], dim=-1)
        return weighted.sum()

    def _no_metrics(self) -> Tensor:
        return torch.zeros(*self.shape, 3, dtype=parameter_dtype(self.config), device=self.world.device)

    def collect(self) -> None:
        """Moves the rows that the steps have left on the device into the table; waits for the device."""
        if self._unread:
            with self._timed("training"):
                rows = self.records.read()
            if self.step == self._unread:
                rows = rows[1:]  # step 0 saw the network before any update
            if len(rows):
                self.rows.extend(metrics=rows)
                self._newest = rows[-1]
            self._unread = 0

    def newest(self) -> Tensor:
        """The newest row, (..., 3); NaN before the first."""
        self.collect()
        return self._newest

    def fallback(self) -> str | None:
        """Why steps are plain calls; None where they are replayed."""
        reasons = [step.fallback for step in self._captured.values()]
        return self._obstacle or next(filter(None, reasons), None)

    def new_fallback(self) -> str | None:
        """The same, once, and nothing where nobody would expect a graph."""
        reason = None if self._told else self.fallback()
        self._told = self._told or reason is not None
        return reason

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype) if dtype else contextlib.nullcontext()

    # --- what is measured ---------------------------------------------------------------------------------------

    def measure(self) -> bool:
        """What is due after an update and not measured yet; False where a stop has cut the eigenvalues off."""
        last, validate_every = self.step == self.num_steps, self.config.validate_every * self.batches.per_epoch
        if self.step == 0:
            return True
        due = (self.step - 1) % self.config.eig_every == 0 or last if self.hessian_batches else False
        if due and self.curvature.step != self.step:
            try:
                self.measure_eigenvalues()
            except Stopped:
                return False
        validated = self.validation_rows.arrays()["step"][-1:].tolist() if validate_every else []
        if validate_every and (self.step % validate_every == 0 or last) and validated != [self.step - 1]:
            self.validate()
        return True

    def measure_eigenvalues(self) -> None:
        """Those of the Hessian of F with the weights of the next update; without autocast or TF32."""
        with self._timed("eigenvalues"), full_precision():
            hessian = hessian_of_batches(self.model, self.hessian_batches, self.oscillation, self.step)
            self.curvature.update(self.step - 1, hessian)

    @torch.no_grad()
    def validate(self) -> None:
        """Plain cross-entropy and accuracy on the test images."""
        with self._timed("validation"):
            self.world.average_buffers_(self.model)
            self.model.eval()
            sums = torch.zeros(*self.shape, 2, dtype=torch.float64, device=self.world.device)
            for index in range(self.validation.per_epoch):
                batch = self.validation.get(index, self.world.rank, self.world.size)
                if len(batch.labels):
                    with self._autocast():
                        logits = self.network(batch.images)
                    sums += _loss_and_correct(logits.to(torch.float64), batch.labels)
            self.model.train()
            self.world.sum_([sums])
            loss, accuracy = (sums / len(self.validation.split)).unbind(-1)
            self.validation_rows.append(step=self.step - 1, loss=loss, accuracy=accuracy)

    @torch.no_grad()
    def measure_last_row(self) -> None:
        """The last row: the forward pass of an update that is not made; BatchNorm's statistics stay."""
        self.collect()
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
                self._forward(batch, network, self.batches.size(self.step), metrics)
        self.world.sum_([metrics])
        self.rows.append(metrics=metrics)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Adds wall and processor time.  CUDA's queue is drained around the rare measurements only, not every step."""
        drain = self.world.device.type == "cuda" and what != "training"
        if drain:
            start_wait = time.perf_counter()
            torch.cuda.synchronize()
            self.seconds["training"] += time.perf_counter() - start_wait
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        if drain:
            torch.cuda.synchronize()
        self.seconds[what] += time.perf_counter() - start
        self.seconds["cpu"] += time.process_time() - cpu_start

    # --- what is recorded ---------------------------------------------------------------------------------------

    def description(self) -> str:
        """What is trained, on what, for how long."""
        config, world, count = self.config, self.world, self.num_networks
        return (
            f"{config.model}: {num_parameters(self.model) // count:,} parameters; "
            f"{len(self.batches.split):,} training and {len(self.validation.split):,} validation "
            f"images of {config.classes} classes; {self.num_steps:,} steps of {self.batches.batch_size} images; "
            f"A = {config.amplitude:g}, T = {config.period:g}; {world.size} x {world.device.type}"
            + (f"; {count} networks at once" if count > 1 else "")
            + (f"; continuing after step {self.step}" if self.step else "")
        )

    def newest_figures(self) -> dict[str, str]:
        """For the progress bar; waits for the device."""
        weighted, loss, accuracy = self.newest().reshape(-1, 3).mean(0).tolist()
        figures = {"F": f"{weighted:.4f}", "loss": f"{loss:.4f}", "acc": f"{accuracy:.3f}"}
        if len(self.curvature.rows):
            figures["λ"] = f"{self.curvature.latest:.2f}"
        if len(self.validation_rows):
            figures["val"] = f"{self.validation_rows.arrays()['accuracy'][-1].mean():.3f}"
        figures["images/s"] = f"{self._images() / self.seconds['training']:.0f}"
        return figures

    def _images(self) -> int:
        """Images that the networks have seen."""
        return self.step * self.batches.batch_size * self.num_networks

    def metrics(self) -> list[dict[str, NDArray[Any]]]:
        """Of each network the columns of metrics.npz: those of every run folder, and the validation's."""
        self.collect()
        count, steps = self.num_networks, np.arange(len(self.rows))
        rows = self.rows.arrays()["metrics"].astype(np.float64).reshape(len(steps), count, 3)
        weights = self.oscillation.weights(torch.from_numpy(steps + 1)).numpy()
        validation = self.validation_rows.arrays()
        validation_step = validation["step"].astype(np.int64)
        shared = {"step": steps, **self.curvature.arrays(), "validation_step": validation_step}
        own: dict[str, NDArray[Any]] = {"weights": weights.reshape(len(steps), count, self.config.classes)}
        own |= {name: rows[..., index] for index, name in enumerate(("weighted_loss", "loss", "accuracy"))}
        for name in ("loss", "accuracy"):
            own[f"validation_{name}"] = validation[name].reshape(len(validation["step"]), count)
        return [shared | {name: column[:, member] for name, column in own.items()} for member in range(count)]

    def summary(self, metrics: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Of one network; an ensemble's `seconds` are shared out, its `images_per_second` are those of all."""
        validation, device = metrics["validation_accuracy"], self.world.device
        on_cuda = device.type == "cuda"
        return {
            "finished": True,
            "diverged": not np.isfinite(metrics["weighted_loss"][-1]),
            "num_parameters": num_parameters(self.model) // self.num_networks,
            "num_training_images": len(self.batches.split),
            "num_validation_images": len(self.validation.split),
            "data_md5": self.batches.split.fingerprint(),
            "steps": self.step,
            "steps_per_epoch": self.batches.per_epoch,
            "weighted_loss": metrics["weighted_loss"][-1],
            "loss": metrics["loss"][-1],
            "accuracy": metrics["accuracy"][-1],
            "validation_accuracy": validation[-1] if len(validation) else None,
            "largest_eigenvalue": metrics["eigenvalues"][:, 0].max() if len(metrics["eig_step"]) else None,
            "stability_limit": stability_limit(self.optimizer),  # at the last learning rate
            "seconds": {what: seconds / self.num_networks for what, seconds in self.seconds.items()},
            "networks_at_once": self.num_networks,
            "images_per_second": self._images() / self.seconds["training"],
            "graph_fallback": self.fallback(),
            "processes": self.world.size,
            "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on.  The data order and the learning rate follow from the step."""
        self.collect()
        cuda = self.world.device.type == "cuda"
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None}
        return state_of(self, self.STATE) | {"rng": rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kernels = {name: self.optimizer.param_groups[0][name] for name in ("fused", "foreach")}
        load_state(self, state, self.STATE)
        self.optimizer.param_groups[0].update(kernels)  # those of this device, not of the checkpoint's
        self.clock.fill_(self.step)
        self.records.read()  # of the steps that are forgotten now
        self._unread = 0
        self._captured.clear()  # the optimizer has other tensors now
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if state["rng"]["cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu())


def _loss_and_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(Σ cross-entropy, number of right answers) over the images: (2,), or (E, 2) for logits (E, N, C)."""
    labels = labels.expand(logits.shape[:-1])
    loss = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    correct = (logits.argmax(-1) == labels).to(loss.dtype)
    return torch.stack([loss.sum(-1), correct.sum(-1)], dim=-1)


# --- what the options stand for -------------------------------------------------------------------------------


def configure_numerics(config: TrainingConfig) -> None:
    """Sets torch's process-wide switches for reproducible or for fast kernels."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic


def parameter_dtype(config: TrainingConfig) -> torch.dtype:
    """Parameters are float32 under mixed precision, too."""
    return torch.float64 if config.precision == "float64" else torch.float32


def build_model(config: TrainingConfig) -> nn.Module:
    classes, seed = config.classes, config.seed
    if config.model == "mlp":
        model = mlp(IMAGE_BYTES, (config.width, config.width), classes, bias=config.bias, seed=seed)
    elif config.model == "myrtle5":
        model = myrtle5(classes, width=config.width, bias=config.bias, batchnorm=config.batchnorm, seed=seed)
    else:
        model = wide_resnet(classes, depth=config.depth, widen=config.widen, seed=seed)
    return model.to(parameter_dtype(config))


def learning_rate(config: TrainingConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The rate as a pure function of the step: nothing to save, nothing to restore.

    piecewise: straight lines from 0 to `lr` at the peak and on to `final_lr` at the end.
    cosine: half a cosine from `lr` to 0 at the end (Loshchilov & Hutter, arXiv 1608.03983).
    """
    if config.schedule == "constant":
        return lambda step: config.lr
    if config.schedule == "piecewise":
        epochs, rates = (0, config.peak_epoch, config.epochs), (0.0, config.lr, config.final_lr)
        return lambda step: float(np.interp(step / steps_per_epoch, epochs, rates))
    num_steps = config.epochs * steps_per_epoch
    return lambda step: 0.5 * config.lr * (1.0 + math.cos(math.pi * min(step / num_steps, 1.0)))
