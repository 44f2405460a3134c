"""Measures which routes of torch to a Hessian are right for a layer; docs/concepts/torch_derivatives.md shows it.

    python docs/tables/torch_derivatives.py docs/tables/torch_derivatives.json

The Hessian of a small network's loss in all its parameters, float64, is compared with central differences of its
gradients, and, where reverse over reverse is right, a third derivative with central differences of that. Kept is
the largest error, relative to the largest entry. Takes seconds.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev
from torch.nn.utils.parametrizations import weight_norm

from dynloss_ext import ConvergenceWarning, HessianOperator, eigsh

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "benchmarks"))
from machine import machine

Loss = Callable[[Tensor], Tensor]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "BatchNorm1d, train mode": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "weight_norm": nn.Identity,
}
ROUTES: dict[str, Callable[[Loss], Loss]] = {
    "reverse over reverse": lambda loss: jacrev(grad(loss)),
    "forward over reverse": lambda loss: jacfwd(grad(loss)),
    "forward over forward": lambda loss: jacfwd(jacfwd(loss)),
    "reverse over forward": lambda loss: jacrev(jacfwd(loss)),
}


def network(layer: str) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(4, 6)
    if layer == "weight_norm":
        first = weight_norm(first)
    return nn.Sequential(first, LAYERS[layer](), nn.Tanh(), nn.Linear(6, 3)).double()


def by_differences(of: Loss, at: Tensor, step: float = 1e-5) -> Tensor:
    """The derivative of a function of a vector, a row per direction."""
    return torch.stack([(of(at + step * e) - of(at - step * e)) / (2 * step) for e in torch.eye(len(at)).to(at)])


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def measured(compute: Callable[[], float]) -> float | str:
    """An error, or the exception in its place."""
    try:
        return compute()
    except Exception as problem:
        return type(problem).__name__


def row(layer: str) -> dict[str, float | str]:
    model = network(layer)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    values = {name: p.detach() for name, p in model.named_parameters()}
    at = nn.utils.parameters_to_vector(values.values())

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in values.values()])
        params = {name: part.view_as(p) for (name, p), part in zip(values.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    hessian = by_differences(grad(loss), at)
    found: dict[str, float | str] = {
        name: measured(lambda route=route: error(route(loss)(at), hessian)) for name, route in ROUTES.items()
    }
    v = torch.randn(len(at), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def curvature(flat: Tensor) -> Tensor:  # vᵀ H v, whose gradient is a third derivative
        return torch.autograd.functional.vhp(loss, flat, v, create_graph=True)[1] @ v

    def third() -> float:
        leaf = at.clone().requires_grad_()
        return error(torch.autograd.grad(curvature(leaf), leaf)[0], by_differences(curvature, at))

    right = found["reverse over reverse"]
    found["third, all reverse"] = measured(third) if isinstance(right, float) and right < 1e-6 else "second is wrong"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        operator = HessianOperator(nn.functional.cross_entropy(model(x), y), model.parameters())
        found["dynloss_ext"], found["status"] = error(operator.to_dense(), hessian), eigsh(operator, k=1).status
    return found


if __name__ == "__main__":
    result = {"machine": machine(), "rows": {layer: row(layer) for layer in LAYERS}}
    print(json.dumps(result["rows"], indent=1))
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
