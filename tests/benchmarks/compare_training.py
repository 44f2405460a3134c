"""Times the examples' training loop beside a plain PyTorch loop, by turns in one process: images per second.

    python tests/benchmarks/compare_training.py --device cuda --json results/training_cuda.json
    python tests/benchmarks/compare_training.py --device cpu --small --json results/training_cpu.json

"plain" is what one writes first: eager, torch's own switches (TF32 in convolutions alone, kernels that need not be
reproducible), `F.cross_entropy`; it gets our batches from the device, and records nothing. Ours has the dynamical loss
and records F, loss and accuracy of every step. Both are measured at the same numerics, NUMERICS: "exact" are ours
without an option. The ratios, to "plain" and to the plain loop of the same numerics ("like"), are taken within each
round, and their medians count. An ensemble's images count once per member. The JSON file is replaced after every turn
of a contender, so that an interrupted comparison leaves what it has measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_examples"))

import myrtle5_cifar10
import wrn28_10_cifar10
from common.config import TrainingConfig
from common.data import Batches, Dataset, Split
from common.distributed import World
from common.training_state import Training, build_model, configure_numerics

NETWORKS: dict[str, tuple[TrainingConfig, TrainingConfig]] = {  # at the paper's size, and small
    "myrtle5": (myrtle5_cifar10.PAPER, replace(myrtle5_cifar10.PAPER, width=16, batch_size=128)),
    "wrn": (wrn28_10_cifar10.PAPER, replace(wrn28_10_cifar10.SMALL, batch_size=128)),
}

FASTEST = "bfloat16 channels_last"
#: The options that set precision, memory format and the choice of kernels.
NUMERICS: dict[str, dict[str, Any]] = {
    "exact": {"precision": "float32", "deterministic": True},
    "tf32": {"precision": "tf32", "deterministic": False},
    FASTEST: {"precision": "bfloat16", "channels_last": True, "deterministic": False},
}
IMAGES = 10_240  # whole batches only: cudnn.benchmark looks for kernels anew where the last one of an epoch is smaller

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
    like: str = "plain"  # the plain loop of the same numerics
    steps: int = 0  # per turn
    rates: list[float] = field(default_factory=list)


def set_defaults() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = DEFAULTS


def plain_loop(config: TrainingConfig, data: Dataset, device: torch.device) -> Contender:
    """At the configuration's numerics, if the switches are not set otherwise."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    batches = Batches(
        data.train.to(device), config.batch_size, augment=config.augment, channels_last=config.channels_last
    )
    model = build_model(config).to(device).to(memory_format=layout)  # type: ignore[call-overload]
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
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = F.cross_entropy(model(batch.images), batch.labels)
        torch.autograd.backward(loss)
        optimizer.step()
        number += 1

    return Contender(step, lambda: configure_numerics(config), batches.batch_size)


def our_loop(
    config: TrainingConfig, data: Dataset, device: torch.device, like: str = "plain", members: int = 0
) -> Contender:
    runs = [replace(config, seed=seed) for seed in range(members)]
    training = Training(config, data, World(device), runs)
    images = max(1, members) * training.batches.batch_size
    return Contender(training.update, lambda: configure_numerics(config), images, like)


def contenders(network: str, options: argparse.Namespace, data: Dataset) -> dict[str, Contender]:
    """By names that say what they are."""
    paper = NETWORKS[network][options.small]
    config = replace(paper, epochs=100_000, shards=None)  # the plain loop has no shards
    device = torch.device(options.device)
    built = {"plain": plain_loop(config, data, device)}
    built["plain"].prepare = set_defaults
    for numerics, chosen in NUMERICS.items():
        if numerics.split()[0] not in options.numerics or (options.compiled and numerics != FASTEST):
            continue
        if numerics == "tf32" and device.type == "cpu":
            continue
        own, like = replace(config, **chosen, compile=options.compiled), f"plain, {numerics}"
        what = f"{numerics} compiled" if options.compiled else numerics
        built[like] = plain_loop(own, data, device)
        built[f"ours, {what}"] = our_loop(own, data, device, like)
        if network == "myrtle5":  # grouped convolutions are at their best in channels_last
            name = f"ours, ensemble of {options.members}, {what}{'' if own.channels_last else ' channels_last'}"
            built[name] = our_loop(replace(own, channels_last=True), data, device, like, options.members)
        if paper.shards and numerics == "tf32":
            built[f"ours, {what}, {paper.shards} shards"] = our_loop(
                replace(own, shards=paper.shards), data, device, like
            )
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
        seconds_for(contender, 5, options.device)  # the graphs of ours included
        per_step = seconds_for(contender, 1, options.device)
        contender.steps = max(1, math.ceil(options.seconds / per_step))
    for _ in range(options.rounds):
        for contender in built.values():
            images = contender.steps * contender.images
            contender.rates.append(images / seconds_for(contender, contender.steps, options.device))
            save()


def figures(built: dict[str, Contender]) -> dict[str, dict[str, float | str]]:
    """Of every contender that has had a turn; the ratios are of the rounds that both have finished."""
    rows: dict[str, dict[str, float | str]] = {}
    for name, contender in built.items():
        if rates := contender.rates:
            rows[name] = {
                "median": statistics.median(rates),
                "best": max(rates),
                "worst": min(rates),
                "to_plain": median_ratio(rates, built["plain"].rates),
                "like": contender.like,
                "to_like": median_ratio(rates, built[contender.like].rates),
            }
    return rows


def median_ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=False))


def write_report(options: argparse.Namespace, results: dict[str, dict[str, dict[str, float | str]]]) -> None:
    if options.json is None:
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    report = {
        "machine": {**machine(options.device), "device": device},
        "sizes": "small" if options.small else "paper",
        "images_per_second": results,
    }
    write_json(options.json, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="Myrtle5 of width 16 and WRN-10-1, for a CPU")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    precisions = [numerics.split()[0] for numerics in NUMERICS]
    parser.add_argument("--numerics", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--members", type=int, default=6, help="networks in the ensemble")
    parser.add_argument("--compiled", action="store_true", help="instead: ours compiled, in bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="per turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(10, (IMAGES,), generator=generator))
    results: dict[str, dict[str, dict[str, float | str]]] = {}
    for network in options.networks:
        built = contenders(network, options, Dataset(split, split))

        def save(network: str = network, built: dict[str, Contender] = built) -> None:
            results[network] = figures(built)
            write_report(options, results)

        measure(built, options, save)
        for name, row in results[network].items():
            ratios = f"{row['to_plain']:8.2f} x plain"
            if row["like"] != "plain":
                ratios += f"{row['to_like']:8.2f} x {row['like']}"
            print(f"{network:10}{name:46}{row['median']:10.0f} images/s{ratios}", flush=True)


if __name__ == "__main__":
    main()
