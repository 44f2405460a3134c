"""Extreme eigenpairs of Hessians and other symmetric operators, with residuals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._checks import check_choice, check_count, check_number, check_seed, check_vector
from dynloss_ext._levels import Level, check_level, num_above, solve_to_level
from dynloss_ext._operators import CurvatureOperator, products_with
from dynloss_ext._shards import Shards, agreed, largest_entries
from dynloss_ext._symmetric import Operator, Options, cause_of_asymmetry, check_symmetric, resolve

__all__ = ["ConvergenceWarning", "EigenResult", "EigenTracker", "eigsh"]


class ConvergenceWarning(UserWarning):
    """Eigenvalues are returned that did not reach the tolerance asked for, or of which some may be missing."""


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs and what is known of their errors.

    Attributes:
        values: (k,) float64 on the CPU, descending; NaN where there was no finite product.
        vectors: (P, k), unit columns in the order of ``values``, in the operator's dtype and on its device. Of sharded
            parameters this process's shard of them, which `CurvatureOperator.unflatten` makes DTensors of.
        residuals: (k,) float64 on the CPU, ‖H v − λ v‖. Some eigenvalue lies within this of the value, and
            for a gap g to the other eigenvalues the error is at most about residual² / g. With the noise of products
            that H knows of (`HessianOperator.from_gradients`).
        num_hvp: products spent.
        converged: (k,) bool, whether the residual is within tolerance and the audit, where one was due, was
            completed; all False where H is not symmetric.
        status: why it ended, one of

            ================================= ============================================================
            "converged"                       all residuals are within tolerance, and an audit is through
            "converged, not audited"          the same but for the audit: most updates of an `EigenTracker`
            "converged, audit inconclusive"   ``miss_probability`` is 0.5 or more
            "max_hvp"                         the products are spent
            "max_k"                           all of ``max_k`` values lie above the level: there may be more
            "noise floor"                     the noise of the products, seen in their asymmetry or known of
                                              `from_gradients`, does not let the residuals fall further
            "not symmetric"                   u · H v and v · H u differ by more than the noise: of a
                                              Hessian, the second derivative of some layer is wrong
            "non-finite product"              a product with NaN or infinity
            ================================= ============================================================
        miss_probability: a p-value: of audits that have an eigenvector to find whose value lies beyond the returned
            ones by more than the tolerance and that the other products did not show, at most a share α overlooks it
            and says α or less. An audit stops as soon as it can say less than 0.08, so that audits which do
            overlook up to this share of values barely beyond the tolerance, however small a number they say; or after
            24 products (48 for "LM", which looks beyond both ends) where the spectrum is too crowded for that, or
            fewer where ``max_basis`` leaves it no room. 0 where
            the complement was exhausted, and nothing can be missed; 1 where it found nothing but the noise of the
            products, again and again. NaN where no audit was due.
        asymmetry: where H is not symmetric, the largest ``|u · H v − v · H u|`` of unit vectors that was seen,
            in units of the norm of H; 0 elsewhere.
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    num_hvp: int
    converged: Tensor
    status: str
    miss_probability: float
    asymmetry: float = 0.0


def eigsh(
    H: Operator,
    k: int = 3,
    *,
    which: str = "LA",
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_hvp: int = 1000,
    max_basis: int | None = None,
    seed: int = 0,
    above: float | None = None,
    max_k: int = 20,
    n: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> EigenResult:
    """The k extreme eigenpairs of a symmetric operator by thick-restart Lanczos (Wu & Simon, SIAM J. Matrix Anal. 22).

    A pair counts as converged when ``‖H v − θ v‖ ≤ max(tol·|θ|, ε^(2/3)·max|θ|)``. Before convergence is claimed, the
    complement of the basis is searched from a random vector, since a Krylov space does not show a second
    eigenvector of the same eigenvalue; the result's ``miss_probability`` says how well.

    That H is symmetric is seen in the products, those of the search from a random vector included. Where u · H v and
    v · H u differ by more than rounding does, 1 to 4 more products find out whether those are noisy or H is not
    symmetric, as autograd's Hessian is not where the second derivative of a layer is wrong: that of `weight_norm` on
    the CPU, or of many an autograd Function.

    Vectors stay on their device. What a decision needs is read from there at once: in float64 at most one small matrix
    per product and two besides.

    Peak memory beyond the model is at most (2 · max_basis + max(3, k + 2)) · P numbers: the basis and its products; the
    recorded gradient; a product in two forms or, at the end, the k vectors. To that add what one product alone
    needs besides: the graph of the loss and its backward passes. ``v0`` counts by itself.

    Of `HessianOperator.from_gradients` with parameters that `fully_shard` has cut along one dimension, over a mesh of
    one or two dimensions, every process of their mesh holds its shard of each vector, and makes this call with the same
    arguments: P is then what the process has of the parameters. A sum over the processes of at most 2 · max_basis
    numbers stands for each inner product of a vector with others: five to seven messages with a product.

    Args:
        H: a HessianOperator, or any callable v -> H v on flat vectors of shape (P,); a callable needs ``n``
            (or ``v0``).
        k: number of eigenpairs, 1 to P.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude.
        tol: relative tolerance of the residuals, >= 0.
        v0: (P,) or (P, m): where to start, such as the vectors of a similar problem; random otherwise. Shards of
            them, where the vectors of the result are.
        max_hvp: most products to spend, at least k.
        max_basis: most basis vectors to hold, the knob of memory: see above. From k + 2 (or P) up; by default the
            larger of 24 and 2 · k + 8, of which a restart keeps k + 3; of max_k, with a level.
        seed: of the random vectors; the global random state is neither read nor changed.
        above: a level: all eigenpairs above it are asked for, to within their residuals, and the next one, which shows
            that they are all. The search begins with k; as long as all lie above, it goes on with 2, 4, 8, ... more.
        max_k: most eigenpairs above a level to return.
        n: P, for a callable.
        dtype: of the vectors, for a callable; of ``v0`` or the default dtype otherwise.
        device: of the vectors, for a callable; of ``v0`` or the CPU otherwise.

    Raises:
        TypeError, ValueError: an argument is wrong, or a callable H turns out not to be symmetric.
        RuntimeError: a parameter has changed since the operator was made.

    Warns:
        ConvergenceWarning: not every pair converged, or the audit was inconclusive; ``status`` says why.

    Example:
        >>> spectrum = torch.arange(1.0, 101.0, dtype=torch.float64)
        >>> result = eigsh(lambda v: spectrum * v, k=2, tol=1e-6, n=100, dtype=torch.float64)
        >>> result.values.round(decimals=6)
        tensor([100.,  99.], dtype=torch.float64)
        >>> result.status, bool((result.residuals < 1e-4).all())
        ('converged', True)
        >>> eigsh(lambda v: spectrum * v, above=97.5, n=100, dtype=torch.float64).values.round(decimals=3)
        tensor([100.,  99.,  98.,  97.], dtype=torch.float64)
    """
    op, options, shards = resolve(H, n, dtype, device, v0)

    def check() -> tuple[tuple[Level | None, dict[str, Any], Tensor | None], object]:
        level, size = check_level(above, max_k, which), op.dimension
        settings = _check_settings(k if level is None else min(max_k, size), which, tol, max_hvp, max_basis, size)
        start = None if v0 is None else _check_start(v0, op.size, options, settings["max_basis"])
        settings["k"] = check_count("k", k, 1)
        settings["seed"] = check_seed(seed)
        return (level, settings, start), (level, settings, None if start is None else len(start))

    level, settings, start = agreed(shards, "eigsh", check)
    if start is not None:
        start = _in_range(start, shards)
    result, _ = _solve_all(H, op, level, **settings, v0=start, audit=True)
    _refuse_callable(H, result)
    _warn_unless_converged("eigsh", H, result, level)
    return result


class EigenTracker:
    """The extreme eigenpairs of a Hessian that changes a little from call to call, at fewer products than `eigsh`.

    An update searches the Krylov space of the old eigenvectors' sum and stops by the same residual rule. What that
    space cannot show (an eigenvector that has none of the old ones in it) is looked for by an audit: at the first
    update, every ``audit_every`` updates, and on ``update(H, audit=True)``, which is due when the problem jumps. So is
    an asymmetry, of which few old eigenvectors show nothing: a tracker that has seen one audits every update from then
    on.

    Args:
        k: number of eigenpairs.
        which: "LA" largest, "SA" smallest (the most negative curvature), "LM" largest in magnitude.
        tol: relative tolerance of the residuals, as in `eigsh`.
        audit_every: updates from one audit to the next; 1 audits every update.
        max_basis: most basis vectors to hold, the knob of memory: as for `eigsh`, plus k · P for the last vectors.
        max_hvp: most products to spend on one update, at least k. An audit that it cuts short is not converged, and is
            made up for ``audit_every`` updates later.
        max_interval: `due` lets up to this many steps pass without an update while the eigenvalues rest.
        rest: relative change of the leading eigenvalue from update to update that still counts as rest.
        seed: of the random vectors.
        above: a level, such as 1.5/learning rate: all eigenpairs above it are asked for and the next one, as by
            `eigsh`. Their number follows the problem: an update that finds all of them above looks for more at once, by
            another search with an audit; of those below one is kept. k is where the first search begins.
        max_k: most eigenpairs above a level to follow.

    Attributes:
        result: of the last update, or None.
        identities: (k,) int64: a number for every eigenpair of ``result`` that stays with the eigenvector where
            values cross: pairs are matched by overlap with the last update's, and one that overlaps with none
            (less than 0.5) is given a new number. Its sign stays, too. An update with a product that was not finite
            is passed over: the next one starts from, and is matched with, the one before.
        num_updates: number of updates so far.
        num_hvp: number of products so far.

    Example:
        >>> model, x = torch.nn.Linear(2, 1), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> optimizer, tracker = torch.optim.SGD(model.parameters(), lr=0.1), EigenTracker(k=1)
        >>> for _ in range(5):
        ...     H = HessianOperator(model(x).square().mean(), model.parameters())
        ...     largest = tracker.update(H).values
        ...     for p, gradient in zip(model.parameters(), H.gradients):
        ...         p.grad = gradient.clone()  # no second backward pass
        ...     optimizer.step()
        >>> print(f"{largest[0]:.3f}", tracker.num_updates)
        10.123 5
    """

    def __init__(
        self,
        k: int = 3,
        *,
        which: str = "LA",
        tol: float = 1e-3,
        audit_every: int = 20,
        max_basis: int | None = None,
        max_hvp: int = 1000,
        max_interval: int = 1,
        rest: float = 0.01,
        seed: int = 0,
        above: float | None = None,
        max_k: int = 20,
    ) -> None:
        self._level = check_level(above, max_k, which)
        self._settings = _check_settings(k if self._level is None else max_k, which, tol, max_hvp, max_basis, None)
        self._settings["k"] = check_count("k", k, 1)
        # `update` exchanges what follows as a whole, so that a shallow copy from before it is the tracker of before.
        self._schedule: dict[str, Any] = {
            "audit_every": check_count("audit_every", audit_every, 1),
            "max_interval": check_count("max_interval", max_interval, 1),
            "rest": check_number("rest", rest, 0),
        }
        self._seed = check_seed(seed) % 2**63
        self.result: EigenResult | None = None
        self.identities = torch.arange(k, device="cpu")
        self.num_updates = 0
        self.num_hvp = 0
        self._start: Tensor | None = None  # the vectors of the last update whose products were finite
        self._place: list[int] | None = None  # of their shard, where they are in shards: its number, of how many
        self._next_identity = int(k)
        self._since_audit = 0
        self._num_asymmetric = 0
        self._interval = 1

    def update(
        self,
        H: Operator,
        *,
        audit: bool = False,
        n: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> EigenResult:
        """The eigenpairs of H; ``n``, ``dtype`` and ``device`` are those of `eigsh`, for a callable.

        Raises:
            TypeError, ValueError: H is not an operator of the size, dtype and device of the last update's, or a
                callable that turns out not to be symmetric.
            RuntimeError: a parameter has changed since the operator was made.

        Warns:
            ConvergenceWarning: not every pair converged, or the audit was inconclusive; the result says which and why.
        """
        old = self._start
        op, options, shards = resolve(H, n, dtype, device, old if n is None else None)
        place = None if shards is None else shards.place

        def check() -> tuple[bool, object]:
            if self._level is None:
                check_count("k", self._settings["k"], 1, op.dimension, "the size of H")
            if old is not None and (len(old), old.dtype, old.device) != (op.size, options.dtype, options.device):
                raise ValueError(
                    f"H: expected the size, dtype and device of the last update's, {len(old)}, {old.dtype} on"
                    f" {old.device}, got {op.size}, {options.dtype} on {options.device}: use a new tracker"
                )
            if old is not None and self._place != place:
                raise ValueError(
                    f"H: expected vectors {_shard(self._place)}, as the tracker's are, got {_shard(place)}: every"
                    " process saves a state_dict of its own, and loads that"
                )
            due = self._since_audit + 1 >= self._schedule["audit_every"] or self._num_asymmetric > 0
            audited = bool(audit) or old is None or due
            return audited, (audited, self._all_settings(), self.num_updates, self._seed, old is None)

        audited = agreed(shards, "EigenTracker.update", check)
        result, origins = _solve_all(
            H,
            op,
            self._level,
            **self._settings | {"k": len(self.identities)},
            v0=None if old is None else old.T.contiguous(),
            seed=self._seed + self.num_updates,
            audit=audited,
        )
        self._num_asymmetric += result.asymmetry > 0
        _refuse_callable(H, result)
        self._adapt(result)
        if result.status == "non-finite product":
            self._since_audit = self._schedule["audit_every"]
        else:
            if old is None:
                self._next_identity = len(origins)
                self.identities = torch.arange(self._next_identity, device="cpu")
            else:
                self._identify(origins)
            self._start, self._place = result.vectors, place
            self._since_audit = 0 if audited else self._since_audit + 1
        self.num_updates += 1
        self.num_hvp += result.num_hvp
        self.result = result
        _warn_unless_converged("EigenTracker.update", H, result, self._level)
        return result

    def due(self, steps_since_update: int) -> bool:
        """Whether it is time for an update: after every step while the leading eigenvalue moves by more than ``rest``
        from update to update; while it rests, after 2, 4, ... up to ``max_interval`` steps."""
        return self.result is None or steps_since_update >= self._interval

    def _adapt(self, result: EigenResult) -> None:
        """Makes the interval between updates longer while the leading eigenvalue rests."""
        if self.result is None or self._schedule["max_interval"] == 1:
            return
        before, now = self._leading(self.result), self._leading(result)
        resting = abs(now - before) <= self._schedule["rest"] * max(abs(now), abs(before))
        self._interval = min(2 * self._interval, self._schedule["max_interval"]) if resting else 1

    def _leading(self, result: EigenResult) -> float:
        """The eigenvalue that is wanted most."""
        first, last = result.values[0].item(), result.values[-1].item()
        which = self._settings["which"]
        return last if which == "SA" or (which == "LM" and abs(last) > abs(first)) else first

    def _identify(self, origins: list[int]) -> None:
        """Hands identities on from the old eigenvectors to the new ones that are their continuations."""
        if origins == list(range(len(self.identities))):
            return
        old, identities = self.identities.tolist(), []
        for origin in origins:
            identities.append(old[origin] if origin >= 0 else self._next_identity)
            self._next_identity += origin < 0
        self.identities = torch.tensor(identities, device="cpu")

    def _all_settings(self) -> dict[str, Any]:
        return self._settings | self._schedule | ({} if self._level is None else self._level._asdict())

    def state_dict(self) -> dict[str, Any]:
        """Everything an interrupted run needs to go on with the same numbers; loadable with ``weights_only``.

        Of an operator by sharded parameters it holds this process's shard of the vectors: each process saves its own,
        and loads it again.
        """
        result = None if self.result is None else {f.name: getattr(self.result, f.name) for f in fields(self.result)}
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        settings = self._all_settings()
        return {
            "settings": settings,
            "result": result,
            "start": self._start,
            "place": self._place,
            "identities": self.identities.clone(),
            **counters,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict`.

        Raises:
            TypeError, ValueError: it is no such state, or comes from a tracker with other settings.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a dict from state_dict, got {type(state).__name__}")
        missing = {"settings", "result", "start", "identities", *self._COUNTERS} - state.keys()
        if missing:
            raise ValueError(f"state: expected all entries of a state_dict, got none named {sorted(missing)}")
        settings = self._all_settings()
        if state["settings"] != settings:
            raise ValueError(f"state: expected one of a tracker with {settings}, got one with {state['settings']}")
        names, place = {f.name for f in fields(EigenResult)}, state.get("place")  # in version 0.1 there was none
        expected = {
            "result": state["result"] is None
            or (isinstance(state["result"], Mapping) and state["result"].keys() == names),
            "start": state["start"] is None or isinstance(state["start"], Tensor),
            "place": place is None or (isinstance(place, list) and list(map(type, place)) == [int, int]),
            "identities": isinstance(state["identities"], Tensor)
            and state["identities"].dim() == 1
            and (len(state["identities"]) == settings["k"] or self._level is not None),
            **{name: isinstance(state[name], int) for name in self._COUNTERS},
        }
        wrong = [name for name, good in expected.items() if not good]
        if wrong:
            raise ValueError(f"state: expected one from state_dict, got {state.get(wrong[0])!r} for {wrong[0]}")
        self.result = None if state["result"] is None else EigenResult(**state["result"])
        self._start, self._place = state["start"], place
        self.identities = state["identities"].clone()
        for name in self._COUNTERS:
            setattr(self, name, state[name])

    _COUNTERS = ("num_updates", "num_hvp", "_next_identity", "_since_audit", "_num_asymmetric", "_interval", "_seed")


def _shard(place: list[int] | None) -> str:
    return "that are whole" if place is None else f"of shard {place[0]} of {place[1]}"


def check_basis(max_basis: int | None, k: int, size: int | None) -> int:
    """Room for k pairs and two vectors more, and by default for as many new ones as a restart keeps; size is P."""
    least = k + 2 if size is None else min(size, k + 2)
    return check_count("max_basis", max(24, 2 * k + 8) if max_basis is None else max_basis, least)


def _check_settings(
    k: int, which: str, tol: float, max_hvp: int, max_basis: int | None, size: int | None
) -> dict[str, Any]:
    """The settings of the driver, if they can work; size is P where it is known."""
    k = check_count("k", k, 1, size, "the size of H")
    return {
        "k": k,
        "which": check_choice("which", which, ("LA", "SA", "LM")),
        "tol": check_number("tol", tol, 0, 1),
        "max_hvp": check_count("max_hvp", max_hvp, k),
        "max_basis": check_basis(max_basis, k, size),
    }


def _solve(H: Operator, op: _C.SymmetricOperator, **settings: Any) -> tuple[EigenResult, list[int]]:
    """The result, and the column of v0 that each eigenvector overlaps with, or -1."""
    with products_with(H):
        values, rows, residuals, num_hvp, converged, status, miss, origins, asymmetry = _C.eigsh(op, **settings)
    return EigenResult(values, rows.T, residuals, num_hvp, converged, status, miss, asymmetry), origins


def _solve_all(
    H: Operator, op: _C.SymmetricOperator, level: Level | None, **settings: Any
) -> tuple[EigenResult, list[int]]:
    """The same of as many pairs as lie above a level, if one is given."""
    if level is None:
        return _solve(H, op, **settings)
    own = {name: settings.pop(name) for name in ("k", "v0", "max_hvp", "audit")}
    return solve_to_level(partial(_solve, H, op, **settings), level, size=op.dimension, **own)


def _refuse_callable(H: Operator, result: EigenResult) -> None:
    """Of a Hessian the result's status says so."""
    if not isinstance(H, CurvatureOperator):
        check_symmetric(H, result.asymmetry)


def _warn_unless_converged(name: str, H: Operator, result: EigenResult, level: Level | None) -> None:
    # The same words every time, without numbers: Python shows a warning once for each place and text.
    if result.status in ("converged", "converged, not audited"):
        return
    if result.status == "max_k":
        about = "found all of its max_k eigenvalues above the level: there may be more"
    elif result.status == "converged, audit inconclusive":
        about = "converged, but its audit was inconclusive: eigenpairs may be missing; see miss_probability"
    else:
        about = f"stopped by {result.status} before all of its {len(result.values)} eigenpairs converged; "
        if isinstance(H, CurvatureOperator) and result.status == "not symmetric":
            about += cause_of_asymmetry(H)
        else:
            about += "see residuals and converged of the result"
        if level is not None and num_above(result, level) == len(result.values) < len(result.vectors):
            about += "; all of them lie above the level: there may be more"
    warnings.warn(f"{name} {about}", ConvergenceWarning, stacklevel=3)


def _check_start(v0: Tensor, size: int, options: Options, max_basis: int) -> Tensor:
    """v0 as rows."""
    check_vector("v0", v0, size, *options, columns="m")
    if v0.dim() == 2 and v0.shape[1] > max_basis:
        raise ValueError(f"v0: expected at most max_basis = {max_basis} columns, got {v0.shape[1]}")
    if not bool(torch.isfinite(v0).all()):
        raise ValueError("v0: expected finite numbers, got others")
    return (v0 if v0.dim() == 2 else v0[:, None]).detach().T


def _in_range(rows: Tensor, shards: Shards | None) -> Tensor:
    """None so long or short that its square is out of range."""
    return rows / largest_entries(rows, shards).clamp_min(torch.finfo(rows.dtype).tiny)
