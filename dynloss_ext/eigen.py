"""Extreme eigenpairs of Hessians and other symmetric operators, with residuals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext.hessian import HessianOperator

__all__ = ["ConvergenceWarning", "EigenResult", "eigsh"]

Operator = HessianOperator | Callable[[Tensor], Tensor]


class ConvergenceWarning(UserWarning):
    """Eigenvalues are returned that did not reach the tolerance asked for."""


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs and what is known of their errors.

    Attributes:
        values: (k,) float64 on the CPU, descending; NaN where there was no finite product.
        vectors: (P, k), unit columns in the order of ``values``, in the operator's dtype and on its device.
        residuals: (k,) float64 on the CPU, ‖H v − λ v‖. Some eigenvalue lies within this of the value, and
            for a gap g to the other eigenvalues the error is at most about residual² / g.
        num_hvp: products spent.
        converged: (k,) bool, whether the residual is within tolerance and the audit found nothing beyond.
        status: "converged", "max_hvp", "noise floor" (the operator's rounding noise does not let the residual
            fall further) or "non-finite product".
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    num_hvp: int
    converged: Tensor
    status: str


def eigsh(
    H: Operator,
    k: int = 3,
    *,
    which: str = "LA",
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_hvp: int | None = None,
    max_basis: int = 24,
    seed: int = 0,
    n: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> EigenResult:
    """The k extreme eigenpairs of a symmetric operator by thick-restart Lanczos (Wu & Simon, SIAM J. Matrix Anal. 22).

    A pair counts as converged when ‖H v − θ v‖ ≤ max(tol·|θ|, ε^(2/3)·max|θ|). Before convergence is claimed, the
    complement of the basis is searched from a random vector, since a Krylov space does not show a second
    eigenvector of the same eigenvalue.

    Args:
        H: a HessianOperator, or any callable v -> H v on flat vectors of shape (P,); a callable needs ``n``
            (or ``v0``).
        k: number of eigenpairs, 1 to P.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude.
        tol: relative tolerance of the residuals, >= 0.
        v0: (P,) or (P, m): where to start, such as the vectors of a similar problem; random otherwise.
        max_hvp: most products to spend; 1000 by default.
        max_basis: most basis vectors to hold; memory is 2 · max_basis · P numbers.
        seed: of the random vectors; the global random state is neither read nor changed.
        n: P, for a callable.
        dtype: of the vectors, for a callable; of ``v0`` or the default dtype otherwise.
        device: of the vectors, for a callable; of ``v0`` or the CPU otherwise.

    Raises:
        TypeError, ValueError: an argument is wrong, or H turns out not to be symmetric.

    Warns:
        ConvergenceWarning: not every pair converged; ``status`` says why.
    """
    op, size, like = _resolve(H, n, dtype, device, v0)
    check_count("k", k, 1, size, "the size of H")
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f'which must be "LA", "SA" or "LM", got {which!r}')
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be in [0, 1), got {tol!r}")
    max_hvp = 1000 if max_hvp is None else max_hvp
    check_count("max_hvp", max_hvp, k, None, "")
    check_count("max_basis", max_basis, min(size, k + 2), None, "")
    start = None if v0 is None else _check_start(v0, size, like, max_basis)
    result = _solve(op, k=k, which=which, tol=tol, v0=start, max_hvp=max_hvp, max_basis=max_basis, seed=seed % 2**64)[0]
    if result.status != "converged":
        reached = f"{int(result.converged.sum())} of {k} eigenpairs"
        warnings.warn(
            f"eigsh stopped by {result.status} after {result.num_hvp} products with {reached} converged; "
            f"residuals {[f'{r:.1e}' for r in result.residuals.tolist()]}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return result


def _solve(
    op: _C.SymmetricOperator, *, k: int, which: str, audit: bool = True, num_guards: int = 0, **settings: Any
) -> tuple[EigenResult, Tensor]:
    """Runs the driver; also returns the Ritz vectors to start the next problem from, (m, P), wanted first."""
    out = _C.eigsh(op, k=k, which=which, audit=audit, num_guards=num_guards, **settings)
    values = torch.tensor(out["values"], dtype=torch.float64)
    order = torch.argsort(values, descending=True, stable=True)
    result = EigenResult(
        values=values[order],
        vectors=out["vectors"][:k][order.to(out["vectors"].device)].T,
        residuals=torch.tensor(out["residuals"], dtype=torch.float64)[order],
        num_hvp=out["num_hvp"],
        converged=torch.tensor(out["converged"], dtype=torch.bool)[order],
        status=out["status"],
    )
    return result, out["vectors"]


def _resolve(
    H: Operator,
    n: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    v0: Tensor | None,
) -> tuple[_C.SymmetricOperator, int, Tensor]:
    """The C++ operator, its size, and an empty tensor with its dtype and device."""
    if isinstance(H, HessianOperator):
        for name, given, own in (("n", n, H.shape[0]), ("dtype", dtype, H.dtype)):
            if given is not None and given != own:
                raise ValueError(f"{name} is known from H to be {own}, got {given}: leave it out")
        if device is not None and torch.empty(0, device=device).device != H.device:
            raise ValueError(f"device is known from H to be {H.device}, got {device}: leave it out")
        return H._op, H.shape[0], torch.empty(0, dtype=H.dtype, device=H.device)
    if not callable(H):
        raise TypeError(f"H must be a HessianOperator or a callable v -> H v, got {type(H).__name__}")
    if v0 is not None and not isinstance(v0, Tensor):
        raise TypeError(f"v0 must be a torch.Tensor, got {type(v0).__name__}")
    if n is None:
        if v0 is None:
            raise ValueError("n must be given with a callable H: the length of its vectors")
        n = v0.shape[0]
    check_count("n", n, 1, None, "")
    dtype = dtype or (v0.dtype if v0 is not None else torch.get_default_dtype())
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    like = torch.empty(0, dtype=dtype, device=device or (v0.device if v0 is not None else "cpu"))
    return _C.PythonOperator(H, n, like), n, like


def _check_start(v0: Tensor, size: int, like: Tensor, max_basis: int) -> Tensor:
    """v0 as rows."""
    if not isinstance(v0, Tensor):
        raise TypeError(f"v0 must be a torch.Tensor, got {type(v0).__name__}")
    if v0.dim() not in (1, 2) or v0.shape[0] != size:
        raise ValueError(f"v0 must have shape ({size},) or ({size}, m), got {tuple(v0.shape)}")
    if v0.dtype != like.dtype or v0.device != like.device:
        raise ValueError(f"v0 must be {like.dtype} on {like.device}, got {v0.dtype} on {v0.device}")
    if v0.dim() == 2 and v0.shape[1] > max_basis:
        raise ValueError(f"v0 must have at most max_basis = {max_basis} columns, got {v0.shape[1]}")
    if not bool(torch.isfinite(v0).all()):
        raise ValueError("v0 must be finite")
    rows = v0.detach().reshape(size, -1).T.contiguous()
    return rows


def check_count(name: str, value: int, low: int, high: int | None, high_name: str) -> None:
    """Refuses what is not an int within bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"between {low} and {high}, {high_name}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
