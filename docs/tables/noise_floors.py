"""Measures how far eigenvalues can be trusted in each precision; docs/concepts/lanczos.md shows the table.

    python docs/tables/noise_floors.py docs/tables/noise_floors.json

Each network has parameters and inputs that are float32 numbers. Its λ₁ and v₁ in float64 at tolerance 1e-10 are what
the other precisions of the arithmetic are compared with. Takes half a minute on one core.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynloss_ext import ConvergenceWarning, HessianOperator, eigsh

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "benchmarks"))
from machine import machine

PRECISIONS = ("float64", "float32", "float32, loss in bfloat16 autocast")


class Attention(nn.Module):
    """One block of a transformer that reads (N, 8, 16) and tells 5 classes."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 4, 64, 0.0, activation, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """A network, the shape of its inputs and its classes."""
    return {
        "2-100-3, ReLU": (lambda: nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 3)), (300, 2), 3),
        "784-256-10, tanh": (lambda: nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10)), (128, 784), 10),
        "three convolutions": (
            lambda: nn.Sequential(
                *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
            ),
            (32, 3, 16, 16),
            10,
        ),
        "transformer block, ReLU": (Attention, (32, 8, 16), 5),
    }


def trained(make: Callable[[], nn.Module], shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network after 50 steps of gradient descent: float32 numbers, as float64."""
    torch.manual_seed(0)
    model = make().double()
    x, y = torch.randn(shape).double(), torch.randint(classes, (shape[0],))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.float().double(), x, y


def measure(model: nn.Module, x: Tensor, y: Tensor, precision: str, exact: float, v: Tensor) -> dict[str, Any]:
    """What can be reached: eigsh is asked for a residual of 0, and stops where the noise of the products begins."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    model, x = model.to(dtype), x.to(dtype)
    cast = torch.autocast("cpu", torch.bfloat16) if "bfloat16" in precision else nullcontext()

    def loss() -> Tensor:
        with cast:
            return nn.functional.cross_entropy(model(x), y)

    H = HessianOperator(loss, model.parameters())
    noise = float(((H @ v.to(dtype)).double() - exact * v).norm()) / exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = eigsh(H, k=1, tol=0.0, max_hvp=200)
    value = float(result.values[0])
    return {
        "noise": noise,
        "residual": float(result.residuals[0]) / exact,
        "error": abs(value - exact) / exact,
        "products": result.num_hvp,
        "status": result.status,
    }


def main(path: Path) -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (make, shape, classes) in networks().items():
        model, x, y = trained(make, shape, classes)
        H = HessianOperator(lambda m=model, x=x, y=y: nn.functional.cross_entropy(m(x), y), model.parameters())
        top = eigsh(H, k=1, tol=1e-10)
        exact, v = float(top.values[0]), top.vectors[:, 0]
        for precision in PRECISIONS:
            row = measure(model, x, y, precision, exact, v)
            model.double()
            rows.append({"network": name, "parameters": H.shape[0], "precision": precision, "lambda": exact, **row})
            print(rows[-1])
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
