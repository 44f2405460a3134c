"""Problems for the cross-entropy op, and how its derivatives are compared, shared by its tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynloss_ext import Oscillation, dynamic_cross_entropy, reference


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Problem:
    """Arguments of one call; `loss` is the op, `twin` the same from reference.py."""

    logits: Tensor
    target: Tensor
    oscillation: Oscillation
    step: int | Tensor

    def loss(self, logits: Tensor, **options: Any) -> Tensor:
        return dynamic_cross_entropy(logits, self.target, self.oscillation, self.step, **options)

    def twin(self, logits: Tensor, **options: Any) -> Tensor:
        return reference.cross_entropy(logits, self.target, self.oscillation, self.step, **options)

    def gradient(self, **options: Any) -> Tensor:
        return reference.gradient(self.logits, self.target, self.oscillation, self.step, **options)

    def hvp(self, v: Tensor, **options: Any) -> Tensor:
        return reference.hvp(self.logits, self.target, self.oscillation, self.step, v, **options)

    def third(self, u: Tensor, v: Tensor, **options: Any) -> Tensor:
        return reference.third(self.logits, self.target, self.oscillation, self.step, u, v, **options)

    def leaf(self) -> Tensor:
        return self.logits.clone().requires_grad_()


def _with_ignored(target: Tensor) -> Tensor:
    target.view(-1)[1] = -100
    return target


def _problems() -> dict[str, Problem]:
    single = Oscillation(4, 5, 10)
    ensemble = Oscillation(4, torch.tensor([2.0, 5.0, 9.0]), torch.tensor([3, 10, 20]))
    table = Oscillation.from_table(torch.rand(7, 4, generator=torch.Generator().manual_seed(3)))
    ordered = Oscillation(4, 9.5, 7, waveform="sine", class_order=[2, 0, 3, 1], closed=True, start_step=2)
    tables = Oscillation.from_table(torch.rand(3, 7, 4, generator=torch.Generator().manual_seed(4)))
    return {
        "matrix": Problem(normal(6, 4), _with_ignored(labels(4, 6)), single, 3),
        "tensor_step": Problem(normal(6, 4), _with_ignored(labels(4, 6)), single, torch.tensor(13)),
        "unbatched": Problem(normal(4), torch.tensor(2), single, 23),
        "image": Problem(normal(2, 4, 3, 2), _with_ignored(labels(4, 2, 3, 2)), single, 33),
        "ordered": Problem(normal(6, 4), _with_ignored(labels(4, 6)), ordered, 16),
        "table": Problem(normal(6, 4), _with_ignored(labels(4, 6)), table, 12),
        "long_rows": Problem(normal(3, 70), _with_ignored(labels(70, 3)), Oscillation(70, 50, 10), 7),
        "ensemble": Problem(normal(3, 5, 4), _with_ignored(labels(4, 3, 5)), ensemble, 4),
        "shared_target": Problem(normal(3, 5, 4), _with_ignored(labels(4, 5)), ensemble, torch.tensor([1, 2, 30])),
        "tables": Problem(normal(3, 5, 4), _with_ignored(labels(4, 5)), tables, torch.tensor([1, 6, 7])),
    }


PROBLEMS = _problems()

OPTIONS = [
    {"reduction": reduction, "normalization": normalization, "label_smoothing": smoothing}
    for reduction, normalization, smoothing in itertools.product(
        ("none", "mean", "sum"), ("samples", "weights"), (0.0, 0.2)
    )
    if reduction == "mean" or normalization == "samples"
]


def describe(options: Any) -> str:
    return "-".join(str(v) for v in options.values()) if isinstance(options, dict) else str(options)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_double_backward(
    loss: Callable[[Tensor], Tensor], at: Tensor, v: Tensor, gradient: Tensor, hvp: Tensor
) -> None:
    """The check that a gradient cached in the forward pass fails: reverse over reverse against the exact product."""
    x = at.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(x).sum(), x, create_graph=True)
    close(g.detach(), gradient)
    (hv,) = torch.autograd.grad((g * v).sum() + 0.0 * x.sum(), x)
    close(hv, hvp)
