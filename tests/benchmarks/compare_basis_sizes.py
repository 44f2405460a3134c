"""Products and time of `eigsh` by `max_basis`, on networks with cheap and dear products.

    python tests/benchmarks/compare_basis_sizes.py --json FILE

The networks of eigensolver_grid.py, one thread; sizes take turns, and the least processor time of the rounds counts.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from eigensolver_grid import SAMPLES, network
from machine import machine, write_json

from dynloss_ext import ConvergenceWarning, HessianOperator, Oscillation, dynamic_cross_entropy, eigsh

#: Product, parameters and pairs.
CASES = (
    [("cheap", 100_000, k) for k in (1, 3, 10)]
    + [("cheap", 1_000_000, k) for k in (1, 3)]
    + [("dear", 10_000, k) for k in (1, 3, 10, 30)]
    + [("dear", 100_000, k) for k in (1, 3)]
)
ROUNDS, STEPS, LR = 5, 20, 0.02


def sizes(k: int) -> dict[str, int | None]:
    """max_basis by what it is called; None is the default."""
    return {"k + 6": k + 6, "k + 12": k + 12, "default": None, "twice": 2 * max(24, 2 * k + 8)}


def measure(cost: str, size: int, k: int, rounds: int) -> dict[str, Any]:
    """After some steps of gradient descent, so that the spectrum has outliers."""
    model, inputs, target = network(size, SAMPLES[cost], torch.float32)
    parameters = list(model.parameters())

    def loss(step: int) -> torch.Tensor:
        return dynamic_cross_entropy(model(inputs), target, Oscillation(10, 10.0, 100), step)

    for step in range(STEPS):
        for p, g in zip(parameters, torch.autograd.grad(loss(step), parameters), strict=True):
            p.data.sub_(g, alpha=LR)
    H = HessianOperator(loss(STEPS), parameters)
    products: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sizes(k)}
    for _ in range(rounds):
        for name, basis in sizes(k).items():
            begin = time.process_time()
            products[name] = eigsh(H, k, max_basis=basis).num_hvp
            seconds[name].append(time.process_time() - begin)
    row = {"product": cost, "parameters": H.shape[0], "k": k, "products": products}
    return row | {"milliseconds": {name: 1e3 * min(of) for name, of in seconds.items()}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    results: dict[str, Any] = {"machine": machine(), "results": []}
    for case in CASES:
        results["results"].append(measure(*case, options.rounds))
        print(results["results"][-1], flush=True)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
