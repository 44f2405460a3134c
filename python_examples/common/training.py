"""A training on CIFAR-10: the loop, its folders, and what is told meanwhile.

What is trained, by which step, and what is measured is in training_state.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray
from tqdm import tqdm

from common.config import TrainingConfig
from common.data import Dataset, load_data
from common.distributed import World, join_world
from common.records import EventLog
from common.run import RunFolder, open_run, resolve_device
from common.stopping import GracefulStop
from common.training_state import Training

_TICK = 1.0  # seconds between two looks at the device, which each wait for it


class Record(NamedTuple):
    """What the training of one network leaves: the contents of summary.json and of metrics.npz."""

    summary: dict[str, Any]
    metrics: dict[str, NDArray[Any]]


def train(config: TrainingConfig, members: Sequence[TrainingConfig] = ()) -> list[Record]:
    """Runs one configuration to its end, or continues it (`config.resume`).

    Args:
        config: the options of the run.
        members: configurations that differ in seed, amplitude and folder only, to be trained as one network, see
            `Ensemble`. Each one's folder holds what it would after a run of its own, but for the checkpoint: that
            of all is in the folder of `config`, whose `resume` counts.

    Returns:
        The record of each network; `finished` is False in its summary after Ctrl-C or SIGTERM. The eigenvalues are
        known to the main process alone.
    """
    with join_world(resolve_device(config.device)) as world:
        training = Training(config, _load_data(config, world), world, members)
        if config.resume:
            folder = RunFolder(config.out)
            if world.is_main:
                folder.claim()
            folder.restore(training.load_state_dict, world.device)
        output = _Output(config, members, len(training.rows)) if world.is_main else None
        _tell(world, training.description())
        with GracefulStop(interrupts=world.size == 1) as stop, _progress_bar(training) as bar:
            if training.step == 0:
                _save(training, output)  # from here on --resume has something to continue
            measured = training.measure()  # what a stop may have cut off
            stopped = False
            while measured and not stopped and training.step < training.num_steps and not training.diverged:
                training.update()
                if reason := training.new_fallback():
                    _tell(world, f"steps are plain calls, not CUDA graphs: {reason}")
                measured = training.measure()
                at_checkpoint = training.step % config.checkpoint_every == 0
                if at_checkpoint:
                    training.diverged = not training.newest()[..., 0].isfinite().any()  # not one network is left
                    _save(training, output)
                if bar.update() and training.step > 1:
                    bar.set_postfix(training.newest_figures(), refresh=False)
                # Several processes vote at checkpoints only, as a vote costs a synchronisation.
                stopped = (world.size == 1 or at_checkpoint) and world.any(stop.requested)
            if stopped or not measured:
                _save(training, output)
                where = "" if measured else " in an eigenvalue update, which will be repeated"
                _tell(world, f"stopped after step {training.step}{where}; --resume continues")
                return [Record({"finished": False}, metrics) for metrics in training.metrics()]
        training.measure_last_row()
        _save(training, output)
        records = [Record(training.summary(metrics), metrics) for metrics in training.metrics()]
        if output:
            records = output.finish(records)
        world.barrier()
        return records


def _load_data(config: TrainingConfig, world: World) -> Dataset:
    """The main process goes first: it may have to download."""
    if not world.is_main:
        world.barrier()
    data = load_data(config)
    if world.is_main:
        world.barrier()
    return data


class _Output:
    """The folders of a run, in the main process: one for the checkpoint, one for the results of each network."""

    def __init__(self, config: TrainingConfig, members: Sequence[TrainingConfig], next_step: int) -> None:
        self.folder = open_run(config)
        self.results = [RunFolder(member.out).claim() for member in members] or [self.folder]
        for member, result in zip(members, self.results, strict=False):
            result.write_config(member.as_dict())
        self.events = EventLog(self.folder.path, next_step) if config.tensorboard else None

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """Writes the summaries; returns the records as a reader of the folders would get them."""
        pairs = zip(self.results, records, strict=True)
        return [Record(result.write_summary(record.summary), record.metrics) for result, record in pairs]


def _save(training: Training, output: _Output | None) -> None:
    """Writes the checkpoint and the metrics so far; all processes take part."""
    training.world.average_buffers_(training.model)
    if output:
        output.folder.write_checkpoint(training.state_dict())
        curves: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        for result, metrics in zip(output.results, training.metrics(), strict=True):
            result.write_metrics(metrics)
            curves |= _curves(metrics, "" if result is output.folder else f"{result.path.name}/")
        if output.events:
            output.events.log(curves, len(training.rows))


def _curves(metrics: dict[str, NDArray[Any]], prefix: str) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """The steps and values of every curve that TensorBoard shows."""
    curves = {name: (metrics["step"], metrics[name]) for name in ("weighted_loss", "loss", "accuracy")}
    for name in ("validation_loss", "validation_accuracy"):
        curves[name] = (metrics["validation_step"], metrics[name])
    for index, values in enumerate(metrics["eigenvalues"].T, start=1):
        curves[f"eigenvalue/{index}"] = (metrics["eig_step"], values)
    return {prefix + name: curve for name, curve in curves.items()}


def _progress_bar(training: Training) -> tqdm[Any]:
    name, quiet = training.config.out.name, not training.world.is_main
    steps = {"total": training.num_steps, "initial": training.step}
    return tqdm(**steps, desc=name, unit="step", mininterval=_TICK, disable=quiet)


def _tell(world: World, text: str) -> None:
    if world.is_main:
        tqdm.write(text, file=sys.stderr)
