"""Measures what Hessian products by differences of gradients are worth; docs/concepts/differences.md shows the table.

    python docs/tables/differences.py docs/tables/differences.json

The networks of noise_floors.py, and its transformer block without a kink. The error of products is the largest of those
with v₁ and three random vectors, against products by double backward in float64; all errors are relative to λ₁. Takes
two minutes on one core.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from noise_floors import PRECISIONS, Attention, machine, networks, trained
from torch import Tensor, nn

from dynloss_ext import ConvergenceWarning, EigenResult, HessianOperator, eigsh


def measure(
    model: nn.Module, x: Tensor, y: Tensor, precision: str, order: int, exact: HessianOperator, top: EigenResult
) -> dict[str, Any]:
    """The error of products and what the operator says of it; what eigsh makes of them at its own tolerance."""
    largest = float(top.values[0])
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(exact.shape[0], 3, dtype=torch.float64, generator=generator)
    V = torch.cat([top.vectors[:, :1], random / random.norm(dim=0)], dim=1)
    products = exact @ V
    dtype = torch.float64 if precision == "float64" else torch.float32
    model, x, calls = model.to(dtype), x.to(dtype), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        with torch.autocast("cpu", torch.bfloat16) if "bfloat16" in precision else nullcontext():
            return nn.functional.cross_entropy(model(x), y)

    H = HessianOperator.from_gradients(loss, model.parameters(), order=order)
    made = calls
    error = float(((H @ V.to(dtype)).double() - products).norm(dim=0).max())
    noise, calls = H.noise, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = eigsh(H, k=1)
    return {
        "error": error / largest,
        "noise": noise / largest,
        "eigenvalue": abs(float(result.values[0]) - largest) / largest,
        "residual": float(result.residuals[0]) / largest,
        "status": result.status,
        "gradients": [made, calls],
    }


def main(path: Path) -> None:
    torch.set_num_threads(1)
    rows = []
    smooth = {"transformer block, GELU": (partial(Attention, "gelu"), (32, 8, 16), 5)}
    for name, (make, shape, classes) in (networks() | smooth).items():
        model, x, y = trained(make, shape, classes)
        exact = HessianOperator(lambda m=model, x=x, y=y: nn.functional.cross_entropy(m(x), y), model.parameters())
        top = eigsh(exact, k=1, tol=1e-10)
        same = {"network": name, "parameters": exact.shape[0]}
        for precision in PRECISIONS:
            for order in (2, 4):
                row = measure(copy.deepcopy(model), x, y, precision, order, exact, top)
                rows.append({**same, "precision": precision, "order": order, **row})
                print(rows[-1], flush=True)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
