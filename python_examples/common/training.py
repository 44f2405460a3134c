"""The training loop of the CIFAR-10 examples: runs, watches, records, checkpoints and resumes."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from common.cifar10 import Dataset
from common.cli import as_dict, open_run, resolve_device
from common.config import TrainingConfig, load_data
from common.distributed import World, join_world
from common.models import num_parameters
from common.recording import GracefulStop, RunFolder
from common.trainer import Trainer
from dynloss_ext.instability import stability_limit

_TICK = 1.0  # seconds between two looks at the device, which each wait for it


def train(config: TrainingConfig) -> dict[str, Any]:
    """Runs one configuration to its end, or continues it (`config.resume`).

    Returns:
        What is in summary.json, in every process; `finished` is False after Ctrl-C or SIGTERM.
    """
    return _train(config)


def train_ensemble(config: TrainingConfig, members: Sequence[TrainingConfig]) -> dict[str, Any]:
    """Trains configurations that differ in seed, amplitude and folder only, as one network; see `Ensemble`.

    Each member's folder holds what it would after a run of its own, but for the checkpoint: that of all is in the
    folder of `config`, whose `resume` counts.

    Returns:
        The first member's summary, or `finished` False.
    """
    return _train(config, members)


def _train(config: TrainingConfig, members: Sequence[TrainingConfig] = ()) -> dict[str, Any]:
    with join_world(resolve_device(config.device)) as world:
        folder = open_run(config) if world.is_main else RunFolder(config.out)
        trainer = Trainer(config, _load_data(config, world), world, members)
        if config.resume and folder.has_checkpoint():
            trainer.load_state_dict(folder.read_checkpoint(world.device))
        results = [RunFolder(member.out) for member in members] or [folder]
        if world.is_main:
            for member, result in zip(members, results, strict=False):
                result.write_config(as_dict(member))
        return _Loop(trainer, folder, results).run()


def _load_data(config: TrainingConfig, world: World) -> Dataset:
    """The main process goes first: it may have to download."""
    if not world.is_main:
        world.barrier()
    data = load_data(config)
    if world.is_main:
        world.barrier()
    return data


class _Loop:
    def __init__(self, trainer: Trainer, folder: RunFolder, results: Sequence[RunFolder]) -> None:
        self.trainer, self.folder, self.results = trainer, folder, results
        self.config, self.world = trainer.config, trainer.world
        self.validate_every = self.config.validate_every * trainer.batches.per_epoch
        self.resumed_at = trainer.step
        self.writer: Any = None
        self.logged = len(trainer.rows)  # rows that TensorBoard has
        if self.config.tensorboard and self.world.is_main:
            self.writer = _summary_writer(self.folder, purge_step=self.logged)

    def run(self) -> dict[str, Any]:
        trainer = self.trainer
        self._announce()
        if trainer.step == 0:
            self._checkpoint()  # from here on --resume has something to continue
        with GracefulStop() as stop, self._progress() as progress:
            while trainer.step < trainer.num_steps and not trainer.diverged:
                with self._timed("training"):
                    trainer.update()
                self._after_update()
                if progress.update() and len(trainer.rows):
                    self._tick(progress)
                if self._must_stop(stop):
                    self._checkpoint()
                    self._say(f"stopped after step {trainer.step}; --resume continues")
                    return {"finished": False, "steps": trainer.step}
        trainer.measure_last()
        self._checkpoint()
        if self.world.is_main:
            for result, arrays in zip(self.results, metric_arrays(trainer), strict=True):
                result.write_summary(self._summary(arrays))
        self.world.barrier()
        return self.results[0].read_summary()

    def _after_update(self) -> None:
        trainer, row = self.trainer, self.trainer.step - 1
        last = trainer.step == trainer.num_steps
        if trainer.curvature and (row % self.config.eig_every == 0 or last):
            with self._timed("eigenvalues"):
                trainer.curvature.update(row)
        if self.validate_every and (trainer.step % self.validate_every == 0 or last):
            with self._timed("validation"):
                trainer.validate()
        if trainer.step % self.config.checkpoint_every == 0:
            trainer.diverged = not trainer.newest[..., 0].isfinite().any()  # not one network is left
            self._checkpoint()

    def _must_stop(self, stop: GracefulStop) -> bool:
        """Several processes vote at checkpoints only, as a vote costs a synchronisation."""
        if self.world.size > 1 and self.trainer.step % self.config.checkpoint_every:
            return False
        return self.world.any(stop.requested)

    def _checkpoint(self) -> None:
        self.world.average_buffers_(self.trainer.model)
        if self.world.is_main:
            self.folder.write_checkpoint(self.trainer.state_dict())
            for result, arrays in zip(self.results, metric_arrays(self.trainer), strict=True):
                result.write_metrics(arrays)
                self._log(arrays, "" if result is self.folder else f"{result.path.name}/")
            self.logged = len(self.trainer.rows)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Adds wall and processor time.  CUDA's queue is drained around the rare measurements only, not every step."""
        cuda = self.world.device.type == "cuda"
        if cuda and what != "training":
            start_wait = time.perf_counter()
            torch.cuda.synchronize()
            self.trainer.seconds["training"] += time.perf_counter() - start_wait
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        if cuda and what != "training":
            torch.cuda.synchronize()
        self.trainer.seconds[what] += time.perf_counter() - start
        self.trainer.seconds["cpu"] += time.process_time() - cpu_start

    # --- telling --------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)

    def _announce(self) -> None:
        trainer, config, count = self.trainer, self.config, len(self.results)
        self._say(
            f"{config.model}: {num_parameters(trainer.model) // count:,} parameters; "
            f"{len(trainer.batches.split):,} training and {len(trainer.validation.split):,} validation "
            f"images of {config.classes} classes; {trainer.num_steps:,} steps of "
            f"{trainer.batches.batch_size} images; "
            f"A = {config.amplitude:g}, T = {config.period:g}; {self.world.size} x {self.world.device.type}"
            + (f"; {count} networks at once" if count > 1 else "")
        )
        if trainer.step:
            self._say(f"continuing after step {trainer.step}")

    def _progress(self) -> tqdm[Any]:
        return tqdm(
            total=self.trainer.num_steps,
            initial=self.trainer.step,
            desc=self.config.out.name,
            unit="step",
            mininterval=_TICK,
            disable=not self.world.is_main,
        )

    def _tick(self, progress: tqdm[Any]) -> None:
        """Shows the newest figures."""
        weighted, loss, accuracy = self.trainer.newest.reshape(-1, 3).mean(0).tolist()
        shown = {"F": f"{weighted:.4f}", "loss": f"{loss:.4f}", "acc": f"{accuracy:.3f}"}
        if self.trainer.curvature:
            shown["λ"] = f"{self.trainer.curvature.latest():.2f}"
        if len(self.trainer.validation_rows):
            shown["val"] = f"{self.trainer.validation_rows.arrays()['accuracy'][-1].mean():.3f}"
        images = (self.trainer.step - self.resumed_at) * self.trainer.batches.batch_size * len(self.results)
        shown["images/s"] = f"{images / progress.format_dict['elapsed']:.0f}"
        progress.set_postfix(shown, refresh=False)

    def _log(self, arrays: dict[str, NDArray[Any]], prefix: str) -> None:
        """Sends the rows since the last call to TensorBoard."""
        if self.writer is None:
            return
        columns = {name: (arrays["step"], arrays[name]) for name in ("weighted_loss", "loss", "accuracy")}
        for name in ("validation_loss", "validation_accuracy"):
            columns[name] = (arrays["validation_step"], arrays[name])
        for index in range(arrays["eigenvalues"].shape[1]):
            columns[f"eigenvalue/{index + 1}"] = (arrays["eig_step"], arrays["eigenvalues"][:, index])
        for name, (steps, values) in columns.items():
            for step, value in zip(steps, values, strict=True):
                if step >= self.logged:
                    self.writer.add_scalar(prefix + name, value, int(step))
        self.writer.flush()

    def _summary(self, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Of one network; an ensemble's `seconds` are shared out, its `images_per_second` are those of all."""
        trainer, count = self.trainer, len(self.results)
        images = trainer.step * trainer.batches.batch_size * count
        validation = arrays["validation_accuracy"]
        return {
            "finished": True,
            "diverged": not np.isfinite(arrays["weighted_loss"][-1]),
            "num_parameters": num_parameters(trainer.model) // count,
            "num_training_images": len(trainer.batches.split),
            "num_validation_images": len(trainer.validation.split),
            "data_md5": trainer.batches.split.fingerprint(),
            "steps": trainer.step,
            "steps_per_epoch": trainer.batches.per_epoch,
            "weighted_loss": arrays["weighted_loss"][-1],
            "loss": arrays["loss"][-1],
            "accuracy": arrays["accuracy"][-1],
            "validation_accuracy": validation[-1] if len(validation) else None,
            "largest_eigenvalue": arrays["eigenvalues"][:, 0].max() if len(arrays["eig_step"]) else None,
            "stability_limit": stability_limit(trainer.optimizer),  # at the last learning rate
            "seconds": {what: seconds / count for what, seconds in trainer.seconds.items()},
            "networks_at_once": count,
            "images_per_second": images / trainer.seconds["training"],
            "processes": self.world.size,
            "device": _device_name(self.world.device),
            "torch": torch.__version__,
        }


def metric_arrays(trainer: Trainer) -> list[dict[str, NDArray[Any]]]:
    """Of each network the columns of metrics.npz: those of every run folder, and the validation's."""
    count = math.prod(trainer.shape)
    rows = trainer.rows.arrays()["metrics"].astype(np.float64).reshape(len(trainer.rows), count, 3)
    step = np.arange(len(rows))
    weights = trainer.oscillation.weights(torch.from_numpy(step + 1)).numpy()
    curvature = trainer.curvature.rows.arrays() if trainer.curvature and len(trainer.curvature.rows) else None
    k = trainer.config.num_eigenvalues
    validation = trainer.validation_rows.arrays()
    common = {
        "step": step,
        "eig_step": curvature["step"] if curvature else np.empty(0, np.int64),
        "eigenvalues": curvature["eigenvalues"] if curvature else np.empty((0, k)),
        "residuals": curvature["residuals"] if curvature else np.empty((0, k)),
        "num_hvp": curvature["num_hvp"] if curvature else np.empty(0, np.int64),
        "converged": curvature["converged"] if curvature else np.empty((0, k), bool),
        "validation_step": validation["step"].astype(np.int64),
    }
    columns: dict[str, NDArray[Any]] = {"weights": weights.reshape(len(step), count, trainer.config.classes)}
    columns |= {name: rows[..., index] for index, name in enumerate(("weighted_loss", "loss", "accuracy"))}
    for name in ("loss", "accuracy"):
        columns[f"validation_{name}"] = validation[name].reshape(len(validation["step"]), count)
    return [common | {name: column[:, member] for name, column in columns.items()} for member in range(count)]


def _summary_writer(folder: RunFolder, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard: the package tensorboard is not installed (pip install tensorboard)") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step or None)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
