"""Times the examples' training loop beside a plain PyTorch loop, by turns in one process: images per second.

    python tests/benchmarks/compare_training.py --device cuda --json results/training_cuda.json
    python tests/benchmarks/compare_training.py --device cpu --small --json results/training_cpu.json

The plain loop is what one writes first: eager, float32, torch's own switches, `F.cross_entropy`; it gets our batches
from the device, and records nothing.  Ours has the dynamical loss and records F, loss and accuracy of every step;
"fast" adds bfloat16, channels_last, torch.compile and kernels that need not be reproducible.  An ensemble's images
count once per member.  The ratio to the plain loop is taken within each round, and its median counts.  The JSON file is
replaced after every turn of a contender, so that an interrupted comparison leaves what it has measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_examples"))

import myrtle5_cifar10
import wrn28_10_cifar10
from common.config import TrainingConfig
from common.data import Batches, Dataset, Split
from common.distributed import World
from common.run import atomic_write
from common.training import Training, build_model, configure_numerics

NETWORKS: dict[str, tuple[TrainingConfig, TrainingConfig]] = {  # at the paper's size, and small
    "myrtle5": (myrtle5_cifar10.PAPER, replace(myrtle5_cifar10.PAPER, width=16, batch_size=128)),
    "wrn": (wrn28_10_cifar10.PAPER, replace(wrn28_10_cifar10.SMALL, batch_size=128)),
}

#: torch's own switches, before a training has set them.
DEFAULTS = (
    torch.backends.cuda.matmul.allow_tf32,
    torch.backends.cudnn.allow_tf32,
    torch.backends.cudnn.deterministic,
    torch.backends.cudnn.benchmark,
)

Step = Callable[[], None]


@dataclass
class Contender:
    """One training; `step` makes an update, after `prepare` has set torch's process-wide switches."""

    step: Step
    prepare: Step
    images: int  # per step
    steps: int = 0  # per turn
    rates: list[float] = field(default_factory=list)


def plain_loop(config: TrainingConfig, data: Dataset, device: torch.device) -> Contender:
    batches = Batches(data.train.to(device), config.batch_size, augment=config.augment)
    model = build_model(config).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    number = 0

    def step() -> None:
        nonlocal number
        batch = batches.get(number)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(batch.images), batch.labels))
        optimizer.step()
        number += 1

    return Contender(step, set_defaults, batches.batch_size)


def set_defaults() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = DEFAULTS


def our_loop(config: TrainingConfig, data: Dataset, device: torch.device, members: int = 0) -> Contender:
    runs = [replace(config, seed=seed) for seed in range(members)]
    training = Training(config, data, World(device), runs)
    return Contender(training.update, lambda: configure_numerics(config), max(1, members) * training.batches.batch_size)


def contenders(network: str, options: argparse.Namespace, data: Dataset) -> dict[str, Contender]:
    config = replace(NETWORKS[network][options.small], epochs=100_000)
    channels_last = replace(config, channels_last=True)
    fast = replace(channels_last, precision="bfloat16", compile=True, deterministic=False)
    device = torch.device(options.device)
    built = {
        "plain": plain_loop(config, data, device),
        "ours": our_loop(config, data, device),
        "ours, channels_last": our_loop(channels_last, data, device),
    }
    if not options.no_fast:
        built["ours, fast"] = our_loop(fast, data, device)
    if network == "myrtle5":
        name = f"ours, ensemble of {options.members}"
        built[name] = our_loop(channels_last, data, device, options.members)
        if not options.no_fast:
            built[f"{name}, fast"] = our_loop(fast, data, device, options.members)
    return built


def seconds_for(contender: Contender, steps: int, device: str) -> float:
    contender.prepare()
    start = time.perf_counter()
    for _ in range(steps):
        contender.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(built: dict[str, Contender], options: argparse.Namespace, save: Step) -> None:
    """Rounds in which each takes its turn of about `options.seconds`, after it has been warmed up and compiled."""
    for contender in built.values():
        seconds_for(contender, 3, options.device)
        per_step = seconds_for(contender, 2, options.device) / 2
        contender.steps = max(1, math.ceil(options.seconds / per_step))
    for _ in range(options.rounds):
        for contender in built.values():
            images = contender.steps * contender.images
            contender.rates.append(images / seconds_for(contender, contender.steps, options.device))
            save()


def figures(built: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Of every contender that has had a turn; "to_plain" is of the rounds that both have finished."""
    plain, rows = built["plain"].rates, {}
    for name, contender in built.items():
        if rates := contender.rates:
            ratio = statistics.median(rate / other for rate, other in zip(rates, plain, strict=False))
            median = statistics.median(rates)
            rows[name] = {"median": median, "best": max(rates), "worst": min(rates), "to_plain": ratio}
    return rows


def write_report(options: argparse.Namespace, results: dict[str, dict[str, dict[str, float]]]) -> None:
    if options.json is None:
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    report = {
        "machine": {**machine(options.device), "device": device},
        "sizes": "small" if options.small else "paper",
        "images_per_second": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.json) as file:
        file.write(f"{json.dumps(report, indent=2)}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="Myrtle5 of width 16 and WRN-10-1, for a CPU")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--members", type=int, default=6, help="networks in the ensemble")
    parser.add_argument("--no-fast", action="store_true", help="leave out bfloat16 and torch.compile")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="per turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10_000, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(10, (10_000,), generator=generator))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for network in options.networks:
        built = contenders(network, options, Dataset(split, split))

        def save(network: str = network, built: dict[str, Contender] = built) -> None:
            results[network] = figures(built)
            write_report(options, results)

        measure(built, options, save)
        for name, row in results[network].items():
            print(f"{network:10}{name:30}{row['median']:12.0f} images/s{row['to_plain']:8.2f} x plain", flush=True)


if __name__ == "__main__":
    main()
