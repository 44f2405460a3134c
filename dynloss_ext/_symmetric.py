"""What is solved: an operator of this package or a callable, whose products must be symmetric."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._checks import check_count, check_tensor
from dynloss_ext._differences import GradientDifferences
from dynloss_ext._operators import CurvatureOperator, driven
from dynloss_ext._shards import Shards

Operator = CurvatureOperator | Callable[[Tensor], Tensor]


class Options(NamedTuple):
    """What a vector of an operator is made with."""

    dtype: torch.dtype
    device: torch.device


def resolve(
    H: Operator,
    n: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    v0: Tensor | None,
) -> tuple[_C.SymmetricOperator, Options, Shards | None]:
    """The C++ operator, where and in what it computes, and how its vectors are cut over processes."""
    if isinstance(H, CurvatureOperator):
        for name, given, own in (("n", n, H.shape[0]), ("dtype", dtype, H.dtype)):
            if given is not None and given != own:
                raise ValueError(f"{name}: expected {own}, which is known from H, got {given}: leave it out")
        if device is not None and torch.empty(0, device=device).device != H.device:
            raise ValueError(f"device: expected {H.device}, which is known from H, got {device}: leave it out")
        op, shards = driven(H)
        return op, Options(H.dtype, H.device), shards
    if not callable(H):
        raise TypeError(f"H: expected a HessianOperator or a callable v -> H v, got {type(H).__name__}")
    if v0 is not None:
        check_tensor("v0", v0)
    if n is None:
        if v0 is None:
            raise ValueError("n: expected the length of the vectors of a callable H, got None")
        if v0.dim() == 0:
            raise ValueError("v0: expected shape (P,) or (P, m), got ()")
        n = v0.shape[0]
    n = check_count("n", n, 1)
    asked = "dtype" if dtype is not None or v0 is None else "dtype of v0"
    dtype = dtype or (v0.dtype if v0 is not None else torch.get_default_dtype())
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{asked}: expected torch.float32 or torch.float64, got {dtype!r}")
    like = torch.empty(0, dtype=dtype, device=device or (v0.device if v0 is not None else "cpu"))
    return _C.PythonOperator(H, n, like), Options(like.dtype, like.device), None


def check_symmetric(H: Operator, asymmetry: float) -> None:
    """Refuses an operator with an asymmetry that noise does not explain."""
    if asymmetry:
        cause = f": {cause_of_asymmetry(H)}" if isinstance(H, CurvatureOperator) else ""
        raise ValueError(
            "H: expected a symmetric operator, got one that is not symmetric: u · H v and v · H u differ by"
            f" {asymmetry:.1g} of the norm of H{cause}"
        )


def cause_of_asymmetry(H: CurvatureOperator) -> str:
    """Of what kind its products are, and what may be wrong there."""
    if isinstance(H._source, GradientDifferences):
        return "its gradients are those of no function: of a wrong backward, or where what a layer detaches moves"
    suspects = H._source.suspects()
    layers = f", perhaps that of {' or '.join(suspects)}" if suspects else ", e.g. of a custom autograd Function"
    return f"the second derivative of some layer is wrong{layers}"
