"""As many eigenpairs as lie above a level: the number of them is found while solving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dynloss_ext._checks import check_count, check_number

if TYPE_CHECKING:
    from dynloss_ext.eigen import EigenResult


_HOPELESS = ("max_hvp", "not symmetric", "non-finite product")


class Level(NamedTuple):
    """Every eigenvalue above it is asked for, but no more than ``max_k``."""

    above: float
    max_k: int


def check_level(above: float | None, max_k: int, which: str) -> Level | None:
    """The level, if one is given."""
    max_k = check_count("max_k", max_k, 1)
    if above is None:
        return None
    if which != "LA":
        raise ValueError(
            f"which: expected 'LA' with above, got {which!r}: what lies below a level lies above its negative for -H"
        )
    return Level(check_number("above", above, float("-inf"), open_low=True), max_k)


def solve_to_level(
    solve: Callable[..., tuple[EigenResult, list[int]]],
    level: Level,
    *,
    k: int,
    size: int,
    v0: Tensor | None,
    max_hvp: int,
    audit: bool,
) -> tuple[EigenResult, list[int]]:
    """The pairs above the level and the next one, which shows that they are all; from k pairs on, 2, 4, 8, ... more
    as long as all lie above. What was found is where the next search starts, which is audited: others are not in it.

    Args:
        solve: (k, v0 as rows, max_hvp, audit) -> a result and, for each pair, its place in v0.
    """
    most, step, left = min(level.max_k, size), 2, max_hvp
    k = min(k, most)
    result, origins = solve(k=k, v0=v0, max_hvp=max(left, k), audit=audit)
    left -= result.num_hvp
    while num_above(result, level) == k < most and result.status not in _HOPELESS:
        k, step = min(k + step, most), 2 * step
        if left < k:
            result = replace(result, status="max_hvp")
            break
        result, places = solve(k=k, v0=result.vectors.T.contiguous(), max_hvp=left, audit=True)
        left -= result.num_hvp
        origins = [origins[place] if place >= 0 else -1 for place in places]
    above = num_above(result, level)
    if above == most < size and result.status.startswith("converged"):
        result = replace(result, status="max_k")
    kept: dict[str, Any] = {
        "values": result.values[: above + 1],
        "vectors": result.vectors[:, : above + 1],
        "residuals": result.residuals[: above + 1],
        "converged": result.converged[: above + 1],
    }
    return replace(result, **kept, num_hvp=max_hvp - left), origins[: above + 1]


def num_above(result: EigenResult, level: Level) -> int:
    return int((result.values > level.above).sum())
