"""Problems for the cross-entropy op, and how its derivatives are compared, shared by its tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


# ---- layouts, and what rounding explains


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

#: Relative to the largest entry: a few roundings of the storage type, or of float32 sums.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, terms: int = 1, size: float = 0.01) -> None:
    """Equal to within the dtype's rounding, relative to the largest expected entry.

    A sum of many `terms` rounds more; entries that come of cancellation round as what they are the difference of,
    of the given `size`.
    """
    assert actual.shape == expected.shape
    if expected.numel():
        scale = max(expected.abs().max().item(), size)
        tolerance = max(TOLERANCE[dtype], terms * 2e-10 if dtype == torch.float32 else 0)
        torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=tolerance)


def strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides and storage offsets."""
    if how == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "sliced":
        wide = torch.full([2 * n + 1 for n in x.shape], math.nan if x.is_floating_point() else -7, dtype=x.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if how == "offset":  # rows that no vector load is aligned to
        flat = torch.empty(x.numel() + 3, dtype=x.dtype)
        return flat[3:].view(x.shape).copy_(x)
    if how == "padded_rows":
        return F.pad(x, (0, 1), value=math.nan)[..., :-1]
    if how == "channels_last" and x.dim() >= 3:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "expanded":
        return x[:1].expand_as(x)
    return x


STRIDES = ["contiguous", "transposed", "sliced", "offset", "padded_rows", "channels_last", "expanded"]
SHAPES = [(n, c) for n in (0, 1, 2, 31, 64, 65) for c in (1, 2, 3, 10, 16, 17, 31, 32, 33, 40, 257)]
SHAPES += (
    [(c,) for c in (1, 3, 40)] + [(2, c, 5) for c in (1, 3, 33)] + [(3, 3, 4, 5), (2, 300, 3), (0, 4, 3), (2, 4, 0)]
)
SHAPES += [(e, n, c, "ensemble") for e, n, c in ((1, 5, 3), (3, 70, 3), (2, 3, 40), (3, 0, 4), (4, 1, 1))]
