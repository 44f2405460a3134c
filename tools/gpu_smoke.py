"""Ten seconds that tell whether anything works: the loss, its derivatives and one eigenvalue search against float64.

python tools/gpu_smoke.py --device cuda --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from dynloss_ext import HessianOperator, Oscillation, dynamic_cross_entropy, eigsh

#: One of each kind of kernel: rows in a thread, in a warp and in a block.
SHAPES = ((300, 3), (1000, 100), (40, 3000))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def derivatives(logits: Tensor, target: Tensor, vector: Tensor) -> dict[str, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = dynamic_cross_entropy(logits, target, Oscillation(logits.shape[1], 70, 100), 33)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    (product,) = torch.autograd.grad(gradient, logits, vector)
    return {"loss": loss.detach(), "gradient": gradient.detach(), "product": product}


def largest_eigenvalues(device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 20), (20,), (20, 3), (3,))
    params = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    inputs = torch.randn(60, 2, generator=generator).to(device, dtype)
    logits = torch.tanh(inputs @ params[0] + params[1]) @ params[2] + params[3]
    target = torch.arange(60, device=device) % 3
    loss = dynamic_cross_entropy(logits, target, Oscillation(3, 70, 100), 33)
    return eigsh(HessianOperator(loss, params), 3, tol=1e-5).values


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry."""
    return float((actual.double().cpu() - expected).abs().max() / expected.abs().max())


def check(device: str) -> dict[str, dict[str, float]]:
    """The error of each quantity over its tolerance: at most 1 where it is right."""
    errors: dict[str, dict[str, float]] = {}
    for rows, classes in SHAPES:
        generator = torch.Generator().manual_seed(classes)
        target = torch.randint(classes, (rows,), generator=generator)
        for dtype, tolerance in TOLERANCE.items():
            logits, vector = (torch.randn(rows, classes, generator=generator).to(dtype) for _ in range(2))
            expected = derivatives(logits.double(), target, vector.double())
            actual = derivatives(logits.to(device), target.to(device), vector.to(device))
            name = f"{rows}x{classes}-{str(dtype).removeprefix('torch.')}"
            errors[name] = {what: error(actual[what], expected[what]) / tolerance for what in expected}
    expected_values = largest_eigenvalues("cpu", torch.float64)
    errors["eigsh"] = {"values": error(largest_eigenvalues(device, torch.float32), expected_values) / 1e-4}
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small problems, beside other processes
    errors = check(arguments.device)
    for name, row in errors.items():
        print(f"{name:20}" + "".join(f"{what:>12} {value:.3f}" for what, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(errors, indent=2) + "\n")
    # not (<= 1): what is not a number is wrong, too
    wrong = [f"{name}: {what}" for name, row in errors.items() for what, value in row.items() if not value <= 1]
    if wrong:
        sys.exit(f"gpu_smoke: further from float64 than the tolerance: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
