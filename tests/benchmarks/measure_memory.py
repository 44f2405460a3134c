"""Peak memory of `eigsh` on WRN-28-10 (36.5 million parameters) with one image, against the documented bound.

    python tests/benchmarks/measure_memory.py --max-basis 6 10 --json FILE

Each measurement is a process of its own, whose peak resident memory (getrusage) is compared with that of one that
stops after a single product. That one holds the graph, and three vectors of P numbers: the gradient and a product in
two forms. So by the docstring's formula `eigsh` may add (2 · max_basis + max(3, k + 2) - 3) · P numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import machine, write_json

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "python_examples")]
from common.models import wide_resnet  # noqa: E402
from dynloss_ext import HessianOperator, Oscillation, dynamic_cross_entropy, eigsh  # noqa: E402


def peak() -> int:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(depth: int, widen: int, k: int, max_basis: int) -> dict[str, Any]:
    """One product, and then, with max_basis > 0, a basis that is filled and restarted once."""
    torch.set_num_threads(1)
    model = wide_resnet(10, depth=depth, widen=widen).eval()
    params = list(model.parameters())
    before = peak()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = dynamic_cross_entropy(model(image), torch.tensor([3]), Oscillation(10, 2.0, 100), 10)
    H = HessianOperator(loss, params)
    del loss
    size = H.shape[0]
    products = 1
    if max_basis:
        products = eigsh(H, k, tol=0.0, max_basis=max_basis, max_hvp=max_basis + 2).num_hvp
    else:
        H @ torch.full((size,), size**-0.5)
    return {"parameters": size, "before": before, "peak": peak(), "products": products}


def measure(depth: int, widen: int, k: int, max_basis: int) -> dict[str, Any]:
    options = {"--depth": depth, "--widen": widen, "--k": k, "--child": max_basis}
    command = [sys.executable, __file__, *(str(part) for pair in options.items() for part in pair)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def compare(depth: int, widen: int, k: int, bases: list[int]) -> dict[str, Any]:
    alone = measure(depth, widen, k, 0)
    row = 4 * alone["parameters"]  # a float32 vector
    figures: dict[str, Any] = {
        "k": k,
        "parameters": alone["parameters"],
        "vector_bytes": row,
        "product_alone_bytes": alone["peak"] - alone["before"],
        "eigsh": [],
    }
    for basis in bases:
        found = measure(depth, widen, k, basis)
        added = found["peak"] - alone["peak"]
        bound = (2 * basis + max(3, k + 2) - 3) * row
        figures["eigsh"].append(
            {
                "max_basis": basis,
                "products": found["products"],
                "peak_bytes": found["peak"] - found["before"],
                "added_bytes": added,
                "added_vectors": added / row,
                "bound_vectors": bound / row,
                "within": added <= bound,
            }
        )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-basis", type=int, nargs="+", default=[6, 10])
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--widen", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.depth, arguments.widen, arguments.k, arguments.child)))
        return 0
    figures = compare(arguments.depth, arguments.widen, arguments.k, arguments.max_basis)
    print(f"P = {figures['parameters']:,}: a vector has {figures['vector_bytes'] / 1e6:.0f} MB;", end=" ")
    print(f"graph and one product: {figures['product_alone_bytes'] / 1e6:.0f} MB beyond the model")
    for row in figures["eigsh"]:
        print(
            f"max_basis {row['max_basis']:3}: {row['products']} products, peak {row['peak_bytes'] / 1e6:.0f} MB;"
            f" eigsh adds {row['added_vectors']:.1f} vectors, bound {row['bound_vectors']:.0f}"
        )
    if arguments.json:
        torch.set_num_threads(1)  # as in the processes
        write_json(arguments.json, {"machine": machine(), **figures})
    return 0 if all(row["within"] for row in figures["eigsh"]) else 1


if __name__ == "__main__":
    sys.exit(main())
