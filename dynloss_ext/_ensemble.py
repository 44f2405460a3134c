"""What ensembles of any kind share: their results, and checks of what may be one for all or one a member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._checks import check_number, check_seed
from dynloss_ext._configuration import difference


@dataclass(frozen=True)
class TrainingRecords:
    """What was measured along a training of M members: S rows, each taken after an update.

    Attributes:
        step: (S,) int64: update u, counted from 0. The row belongs to the parameters after it and the weights Γ(u + 1).
        weighted_loss: (S, M) float64: the loss F under these weights.
        loss: (S, M) float64: the plain cross-entropy, Γ = 1.
        accuracy: (S, M) float64, from 0 to 1.

    Members that are not finite have NaN.
    """

    step: Tensor
    weighted_loss: Tensor
    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class EnsembleEigenvalues:
    """The largest eigenvalues of the Hessian of every member.

    Attributes:
        values: (M, k) float64, descending; NaN for members that are not finite.
        residuals: (M, k) float64: ‖H v − λ v‖, within which some eigenvalue lies.
        converged: (M, k) bool: whether the residual is within tolerance, and the audit, where asked for, was completed.
        num_hvp: (M,) int64: products spent on each.
        vectors: (M, P, k) unit columns, if they were asked for.
    """

    values: Tensor
    residuals: Tensor
    converged: Tensor
    num_hvp: Tensor
    vectors: Tensor | None


def per_member(name: str, value: Any, *, high: float = torch.inf, open_low: bool = False) -> Tensor:
    """One number, (), or one a member, (M,); float64."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        return torch.tensor(check_number(name, value, 0, high, open_low=open_low), dtype=torch.float64, device="cpu")
    if not value:
        raise ValueError(f"{name}: expected a number or one a member, got none")
    numbers = [check_number(name, x, 0, high, open_low=open_low) for x in value]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def checked_seeds(seeds: Any) -> list[int]:
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds:
        raise ValueError(f"seeds: expected a sequence of ints, one a member, got {seeds!r}")
    return [check_seed(seed) for seed in seeds]


def number_of_members(**sizes: int | None) -> int:
    """M, in which all that say it must agree."""
    known = {name: size for name, size in sizes.items() if size is not None}
    if not known:
        return 1
    first, members = next(iter(known.items()))
    for name, size in known.items():
        if size != members:
            raise ValueError(f"{name}: expected one or {members}, as many as {first} has, got {size}")
    return members


def of_members(finite: Tensor, like: Tensor) -> Tensor:
    """(M,) with dimensions to be broadcast over the (M, ...) of ``like``."""
    return finite.view(-1, *[1] * (like.dim() - 1))


def only_finite(x: Tensor, finite: Tensor) -> Tensor:
    """x (M, ...) with NaN for the members that are not finite."""
    return x.masked_fill(of_members(~finite, x), torch.nan)


def no_product(like: Tensor) -> _C.SymmetricOperator:
    """The Hessian of a member that is not finite, of parameters (P,): its products are NaN."""
    return _C.PythonOperator(lambda v: torch.full_like(v, torch.nan), len(like), like)


def start_rows(start: Any, flat: Tensor, max_basis: int) -> Tensor:
    """The vectors (M, k, P) of earlier eigenvalues of members with parameters (M, P)."""
    if not isinstance(start, EnsembleEigenvalues) or start.vectors is None:
        raise ValueError("start: expected a result of eigenvalues(vectors=True), got none")
    if start.vectors.shape[:2] != flat.shape or start.vectors.shape[2] > max_basis:
        raise ValueError(
            f"start: expected vectors of shape {tuple(flat.shape)} and at most max_basis columns, got "
            f"{tuple(start.vectors.shape)}"
        )
    return start.vectors.mT.to(flat).contiguous()


def check_state(state: Any, names: set[str], configuration: dict[str, Any]) -> None:
    """Refuses what is no state, of these entries, of an ensemble of this configuration."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict from state_dict, got {type(state).__name__}")
    if state.keys() != names:
        raise ValueError(f"state: expected the entries {sorted(names)}, got {sorted(state)}")
    other = difference(configuration, state["configuration"])
    if other:
        raise ValueError(f"state: expected one of an ensemble like this, got another: {other}")
