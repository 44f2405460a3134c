"""Times whole steps and Hessian products as plain calls and replayed from CUDA graphs, by turns in one process.

    python tests/benchmarks/compare_graphs.py --device cuda --json results/graphs_cuda.json

Rows: a step of the spiral network (2-100-3, 300 points: forward, dynamical loss, backward, SGD, a recorded loss);
a step of the examples' Myrtle5 as published and with `--fast`; a Hessian product of the spiral network; taking over new
parameters, with a forward and a recorded backward pass; an `EigenTracker` update, as a multiple of as many replayed
products. On a CPU there are no graphs: both sides are plain calls, and their ratio is noise around 1. The JSON file is
replaced after every row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine, write_json
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_examples"))

import myrtle5_cifar10
from common.config import TrainingConfig
from common.data import Dataset, Split
from common.distributed import World
from common.spiral import SpiralMLP, spiral_data
from common.training_state import Training, configure_numerics
from dynloss_ext import (
    CapturedHessian,
    CapturedStep,
    DeviceRecords,
    DynamicCrossEntropyLoss,
    EigenTracker,
    HessianOperator,
    Oscillation,
)

TARGET = 1.15  # an update over as many replayed products
ROUNDS = 3

Row = dict[str, Any]
Run = Callable[[int], object]  # does it so many times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="per turn; every row has three of each kind")
    parser.add_argument("--states", type=int, default=30, help="states of the network that the tracker follows")
    parser.add_argument("--batch-size", type=int, default=512, help="images of a step of Myrtle5")
    parser.add_argument("--small", action="store_true", help="Myrtle5 of width 8, for a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows: dict[str, Row] = {}
    measurements: dict[str, Callable[[], Row]] = {
        "spiral step": lambda: spiral_step(device, options.seconds),
        "spiral product": lambda: spiral_product(device, options.seconds),
        "spiral refresh": lambda: spiral_refresh(device, options.seconds),
        "tracker update": lambda: tracker_update(device, options.states),
        "myrtle5 step": lambda: myrtle5_step(device, options),
        "myrtle5 step, fast": lambda: myrtle5_step(device, options, **TrainingConfig.FAST),
    }
    for name, measure in measurements.items():
        rows[name] = measure()
        print(f"{name:20}" + "".join(f"  {key} {_short(value)}" for key, value in rows[name].items()), flush=True)
        write_report(options, rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(options: argparse.Namespace, rows: dict[str, Row]) -> None:
    if options.json is None:
        return
    write_json(options.json, {"machine": machine(options.device), "rows": rows})


# --- rows -----------------------------------------------------------------------------------------------------


class Spiral:
    """The paper's network and data in a loop whose state lies on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        inputs, target = spiral_data()
        self.inputs, self.target = inputs.to(device, dtype), target.to(device)
        self.model: nn.Module = SpiralMLP.initialised("glorot-normal", 2, 100, 3, 0).to(device, dtype)
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.params, lr=1.0)
        self.criterion = DynamicCrossEntropyLoss(Oscillation(3, 70, 5000, closed=True)).to(device)
        self.records = DeviceRecords(1000, dtype=dtype, device=device)

    def loss(self) -> Tensor:
        loss: Tensor = self.criterion(self.model(self.inputs), self.target)
        return loss

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.criterion.step()
        self.records.append(loss)


def spiral_step(device: torch.device, seconds: float) -> Row:
    plain, replayed = (Spiral(device, torch.float32) for _ in range(2))
    steps = CapturedStep(replayed.step, device)
    return compare(device, seconds, repeated(plain.step), steps.run) | {"fallback": steps.fallback}


def spiral_product(device: torch.device, seconds: float) -> Row:
    spiral = Spiral(device, torch.float64)
    captured = CapturedHessian(spiral.loss, spiral.params)
    plain = HessianOperator(spiral.loss(), spiral.params)
    v = torch.randn(plain.shape[0], dtype=torch.float64, device=device)
    row = compare(device, seconds, repeated(lambda: plain @ v), repeated(lambda: captured @ v))
    return row | {"fallback": captured.fallback}


def spiral_refresh(device: torch.device, seconds: float) -> Row:
    spiral = Spiral(device, torch.float64)
    captured = CapturedHessian(spiral.loss, spiral.params)
    plain = repeated(lambda: HessianOperator(spiral.loss(), spiral.params))
    return compare(device, seconds, plain, repeated(captured.refresh)) | {"fallback": captured.fallback}


def tracker_update(device: torch.device, states: int) -> Row:
    """Medians over states, five steps from one to the next; plain and replayed follow the same trajectory."""
    spiral = Spiral(device, torch.float64)
    captured = CapturedHessian(spiral.loss, spiral.params)
    trackers = {"plain": EigenTracker(3), "replayed": EigenTracker(3)}
    v = torch.randn(captured.shape[0], dtype=torch.float64, device=device)
    products: dict[str, Callable[[], object]] = {"whole": lambda: captured @ v}
    products["bare"] = getattr(captured._source, "_replay", products["whole"])  # the graph alone
    ratios: dict[str, list[float]] = {name: [] for name in products}
    seconds: dict[str, list[float]] = {"plain": [], "replayed": [], "refresh": []}
    counts = []
    for number in range(states + 2):
        repeated(spiral.step)(5)
        spiral.records.read()
        refresh = timed(device, captured.refresh)
        replayed = timed(device, trackers["replayed"].update, captured)
        plain = timed(device, trackers["plain"].update, HessianOperator(spiral.loss(), spiral.params))
        result = trackers["replayed"].result
        if result is None or number < 2:  # the first update searches from scratch
            continue
        counts.append(result.num_hvp)
        for name, value in (("refresh", refresh), ("replayed", replayed), ("plain", plain)):
            seconds[name].append(value)
        for name, product in products.items():
            ratios[name].append(replayed / timed(device, repeated(product), result.num_hvp))
    return {
        "update_over_graphed_products": statistics.median(ratios["bare"]),
        "target": TARGET,
        # These also bring the vector and take the product away, as the driver needs them.
        "update_over_graphed_products_with_copies": statistics.median(ratios["whole"]),
        **{f"{name}_seconds": statistics.median(values) for name, values in seconds.items()},
        "products": statistics.fmean(counts),
        "fallback": captured.fallback,
    }


def myrtle5_step(device: torch.device, options: argparse.Namespace, **changes: Any) -> Row:
    """The examples' training on made-up images."""
    size = options.batch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2 * size, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(10, (2 * size,), generator=generator))
    width = 8 if options.small else 64
    config = replace(myrtle5_cifar10.PAPER, epochs=100_000, batch_size=size, width=width, **changes)
    trainings = []
    for graphs in (False, True):
        trainings.append(Training(replace(config, graphs=graphs), Dataset(split, split), World(device)))
    configure_numerics(config)
    row = compare(device, options.seconds, *(repeated(training.update) for training in trainings))
    rate = size * row["replayed_per_second"]
    return row | {"replayed_images_per_second": rate, "fallback": trainings[1].fallback()}


# --- time -----------------------------------------------------------------------------------------------------


def repeated(work: Callable[[], object]) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            work()

    return run


def timed(device: torch.device, work: Callable[..., object], *arguments: object) -> float:
    """Seconds until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(device: torch.device, seconds: float, plain: Run, replayed: Run) -> Row:
    """Medians of three rounds in which each takes a turn of about so many seconds, after both are warm and captured."""
    runs = {"plain": plain, "replayed": replayed}
    times, rates = {}, {}
    for name, run in runs.items():
        run(5)
        times[name] = max(1, round(seconds / (timed(device, run, 3) / 3)))
        rates[name] = [0.0] * ROUNDS
    for number in range(ROUNDS):
        for name, run in runs.items():
            rates[name][number] = times[name] / timed(device, run, times[name])
    speedup = statistics.median(b / a for a, b in zip(rates["plain"], rates["replayed"], strict=True))
    row: Row = {f"{name}_per_second": statistics.median(values) for name, values in rates.items()}
    return row | {"speedup": speedup}


if __name__ == "__main__":
    main()
