"""Memory that stays flat, and processes and threads that are no obstacle.

    cd tests && python -m robustness.memory --scale 1 --out robustness/results/memory.json

The resident memory after a tenth of the work is compared with that after all of it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from robustness.record import publish

from dynloss_ext import (
    DynamicCrossEntropyLoss,
    EigenTracker,
    HessianOperator,
    Oscillation,
    PerceptronEnsemble,
    dynamic_cross_entropy,
    eigsh,
)

#: Bytes that the allocator's own holes may cost. One lost tensor of 4 kB a step would be 400 MB in 100,000 steps.
SLACK = 8 << 20


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def op_steps(count: int) -> Callable[[], None]:
    """Forward, backward, and every tenth time the second derivative; all dtypes and kinds of target."""
    criterion = DynamicCrossEntropyLoss(Oscillation(10, 9, 10))
    leaves = [torch.randn(64, 10, dtype=dtype, requires_grad=True) for dtype in (torch.float64, torch.float32)]
    targets = [torch.randint(10, (64,)), torch.randn(64, 10).softmax(1)]

    def step() -> None:
        number = int(criterion.current_step)
        x = leaves[number % 2]
        loss = criterion(x, targets[number // 2 % 2].to(x.dtype) if number // 2 % 2 else targets[0])
        if number % 10:
            loss.backward()
        else:
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            torch.autograd.grad(g, x, x.detach())
        x.grad = None
        criterion.step()

    return step


def tracker_updates(count: int) -> Callable[[], None]:
    """A tracker on operators of a small network that trains."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 2, dtype=torch.float64), torch.arange(20) % 3
    oscillation, tracker, number = Oscillation(3, 9, 10), EigenTracker(k=2), [0]

    def step() -> None:
        number[0] += 1
        H = HessianOperator(dynamic_cross_entropy(model(x), y, oscillation, number[0]), model.parameters())
        tracker.update(H)
        with torch.no_grad():
            for p, gradient in zip(model.parameters(), H.gradients, strict=True):
                p -= 0.01 * gradient

    return step


class _Broken(RuntimeError):
    pass


def broken_operators(count: int) -> Callable[[], None]:
    """Operators, trackers and ensembles that an error ends half-way: in a product, in a closure, in the arguments."""
    number = [0]

    def product(v: torch.Tensor) -> torch.Tensor:
        number[0] += 1
        if number[0] % 7 == 0:
            raise _Broken
        return v * torch.linspace(1, 2, len(v), dtype=v.dtype)

    def closure() -> torch.Tensor:
        loss = leaf.square().sum()
        number[0] += 1
        if number[0] % 2:
            raise _Broken
        return loss

    leaf = torch.randn(1000, dtype=torch.float64, requires_grad=True)

    def step() -> None:
        for attempt in (
            lambda: eigsh(product, 3, n=1000, dtype=torch.float64),
            lambda: EigenTracker(k=3).update(product, n=1000, dtype=torch.float64),
            lambda: HessianOperator(closure, [leaf]),
            lambda: eigsh(HessianOperator(leaf.square().sum(), [leaf]), k=2000),
            lambda: dynamic_cross_entropy(leaf.view(100, 10), torch.full((100,), 10), Oscillation(10, 5, 10), 0),
            lambda: PerceptronEnsemble(
                torch.randn(100, 2), torch.full((100,), 3), Oscillation(3, 5, 10), hidden=100, lr=1.0
            ),
        ):
            try:
                attempt()
            except (_Broken, ValueError, IndexError, RuntimeError):
                continue
            raise AssertionError("expected an error")

    return step


WORKS = {
    "steps of the loss": (op_steps, 100_000),
    "updates of a tracker": (tracker_updates, 10_000),
    "operators that end half-way": (broken_operators, 1_000),
}


def growth(name: str, scale: float, seconds: float = float("inf")) -> dict[str, Any]:
    """Bytes that the work after its first tenth adds; stops early after so many seconds."""
    make, count = WORKS[name]
    count = max(10, round(scale * count))
    end, done, before = time.monotonic() + seconds, 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = make(count)
        for done in range(1, count + 1):
            step()
            if done == count // 10:
                before = resident()
            if time.monotonic() > end:
                break
    return {"steps": done, "grown_bytes": resident() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=1800, help="stop each after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    works = {name: growth(name, options.scale, options.seconds) for name in WORKS}
    publish(options.out, f"python -m robustness.memory --scale {options.scale:g}", bound_bytes=SLACK, works=works)
    if max(work["grown_bytes"] for work in works.values()) > SLACK:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
