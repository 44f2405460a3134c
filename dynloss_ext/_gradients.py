"""Gradients of a loss at displaced parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, distributed, nn

from dynloss_ext._batches import (
    all_alike,
    check_answer,
    check_batches,
    check_process_group,
    check_sums,
    fingerprint,
    fingerprint_of,
    listed,
    message_device,
    reduce_over,
    tally,
    weight_of,
)
from dynloss_ext._checks import Parameters, Params, check_callable, check_loss, check_params, is_sharded
from dynloss_ext._evaluation import (
    BuffersOf,
    buffers_kept,
    check_reached,
    graph_nodes,
    random_state_kept,
    relative_rounding,
    uses_batch_statistics,
    warn_of_unreached,
)
from dynloss_ext._shards import Shards, layout_of, mesh_groups, norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Gradients:
    """Gradients of Σ loss_sum / Σ weight_sum over batches and processes, at displaced parameters, as flat vectors.

    Every evaluation of a batch starts from the same random numbers. Parameters, their ``.grad``, buffers and random
    state are afterwards as they were, to the bit, also where the closure raises. Of sharded parameters (DTensor) each
    process moves its part.

    Args:
        closure, params, batches, process_group, seed: see `HessianOperator.from_gradients`.

    Attributes:
        like: an empty tensor of the dtype and on the device of flat vectors.
        layout: of flat vectors, in shards or whole.
        norm: the length of the parameters.
        rounding: ε of the coarsest dtype among them.
        at_origin: the gradient where the parameters are.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Parameters,
        batches: Iterable[Any] | None,
        process_group: ProcessGroup | None,
        seed: int,
    ) -> None:
        check_process_group(process_group)
        self._closure, self._group, self._seed = closure, process_group, seed
        self._batches: Any = [None] if batches is None else batches
        self._in_batches = batches is not None
        given = listed(params)
        self._device = message_device(given, process_group)
        # Who must agree: not in what is called while a closure runs, which has messages of its own for sharded params.
        self._groups = () if process_group is None else (process_group,)
        self._all = self._groups or mesh_groups(given)
        self._processes = math.prod(map(distributed.get_world_size, self._all))
        self.params = Params([], [])
        self._modules: dict[int, nn.Module] = {}
        self._gathering: list[Any] = []  # modules of `fully_shard`
        self._weight, self._own_weight = 1.0, math.nan  # of all processes; of this one
        # Nobody knows the size before the params are checked, and all must make the same call.
        _, (count, *alike) = reduce_over(self._all, self._device, partial(self._check, given), 27)
        if count != self._processes or not all_alike(alike, self._processes):
            self._refuse_differing()
        if self._sharded:
            self._check_counts()
        self.layout = layout_of(self.params, self.like)
        self.params.shards = self.layout if isinstance(self.layout, Shards) else None
        norms = [torch.linalg.vector_norm(self.layout.entries(p.detach()), dtype=torch.float64) for p in self.params]
        differ = not self.layout.same_in_replicas([_hashed(local) for local in self._origin])
        self.norm, differing = self.layout.lengths([torch.stack(norms)], torch.tensor(differ, device=self._device))
        if differing:
            self._refuse_differing()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        # First uncompiled, as hooks tell which modules are called; then as it will always be.
        _, found = self._reduce(partial(self._survey, sums), 4, dtype=torch.float64)
        weight, count, statistics, reached = found
        if self._sharded:
            from torch.distributed.fsdp import FSDPModule

            self._gathering = [m for of in self._modules.values() for m in of.modules() if isinstance(m, FSDPModule)]
        check_sums(count, bool(statistics), weight)
        if not reached:
            raise ValueError("closure: expected a loss that depends on params, got no gradient of any of them")
        if self._group is None:
            warn_of_unreached(self.params, self._reached, stacklevel=4)
        self._weight = weight
        (self.at_origin,), _ = self.combinations(None, [0.0], [[1.0]])
        infinite = self.layout.lengths([], *(~part.isfinite().all() for part in self.layout.split(self.at_origin)))
        wrong = [label for label, found in zip(self.params.labels, infinite, strict=True) if found]
        if wrong:
            raise ValueError(f"closure: expected finite gradients, got NaN or infinity in {', '.join(wrong[:5])}")

    def _refuse_differing(self) -> NoReturn:
        where = "process_group" if self._group else "the mesh"
        raise ValueError(f"params: expected the same in all processes of {where}, got different shapes or values")

    def _check_counts(self) -> None:
        """Of batches, where they have a length: a process with more of them than another would wait for it for ever,
        as every forward pass of a sharded model is one of all processes."""

        n = len(self._batches) if isinstance(self._batches, Sized) else 0

        def count() -> Tensor:
            return torch.tensor([n, n**2], dtype=torch.float64, device=self._device)

        _, (total, squares) = reduce_over(self._all, self._device, count, 2)
        if self._processes * squares != total**2:
            raise ValueError(
                f"batches: expected as many in every process, as sharded parameters need, got {n} in this one and"
                f" {total:.0f} in all {self._processes}"
            )

    def agree(self, names: str, *settings: object) -> None:
        """Raises where another process was called with other settings, which would make other calls."""
        text = repr(settings)
        _, alike = reduce_over(self._all, self._device, partial(fingerprint_of, text, self._device), 26)
        if not all_alike(alike, self._processes):
            raise ValueError(f"{names}: expected the same in all processes, got different ones, here {text}")

    def length_of(self, v: Tensor) -> float:
        """Of a whole vector, before products with it: a process with sharded parameters that cannot go on tells the
        others.

        Raises:
            RuntimeError: a parameter was changed since this was made; replicas differ; another process failed.
        """
        shards = self.params.shards
        if shards is None:
            return norm(v)
        alike = shards.same_in_replicas([v])

        def square() -> Tensor:
            self._check_unchanged()
            if not alike:
                raise RuntimeError(
                    "v: expected the same in all processes with one shard, got different values: they make different"
                    " calls, or their devices do not round alike"
                )
            return torch.tensor([norm(v) ** 2 / shards.copies], dtype=torch.float64, device=self._device)

        _, (total,) = reduce_over(self._all, self._device, square, 1)
        return math.sqrt(total)

    def combinations(
        self, u: Tensor | None, points: Sequence[float], weights: Sequence[Sequence[float]]
    ) -> tuple[Tensor, list[float]]:
        """Row i is Σ_k weights[i][k] · gradient at (parameters + points[k] · u), shape (rows, size of the layout); and
        the lengths of whole rows.

        Raises:
            RuntimeError: a parameter was changed since this was made; another process failed, or has another u.
            ValueError: the weights do not add up to what they were.
        """
        kept = len(weights) * self.layout.size
        total, (changed, *alike) = self._reduce(
            partial(self._pass, u, points, weights), kept + 27, keep=kept, dtype=self.like.dtype
        )
        rows = total.div_(self._weight).view(len(weights), self.layout.size)
        *lengths, changed = self.layout.lengths(list(rows), torch.tensor(changed, device=self._device))
        if not all_alike(alike, self._processes):
            raise RuntimeError(
                "v: expected the same in all processes of process_group, got different values: they make different"
                " calls, or their devices do not round alike"
            )
        if changed:
            raise ValueError(
                "closure: expected the same losses and weights in every pass over batches, got others: switch off"
                " random augmentation, and shuffling with drop_last"
            )
        return rows, lengths

    def fail(self, error: Exception, rows: int) -> None:
        """Raises what kept this process from asking for so many combinations; the others, which wait, are told."""

        def refuse() -> Tensor:
            raise error

        kept = rows * self.layout.size
        self._reduce(refuse, kept + 27, keep=kept, dtype=self.like.dtype)

    def _reduce(
        self, compute: Callable[[], Tensor], length: int, keep: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, list[float]]:
        return reduce_over(self._groups, self._device, compute, length, keep, dtype)

    def _check(self, params: Any) -> Tensor:
        """One, and the fingerprint of params."""
        if isinstance(params, BaseException):
            raise params
        check_callable("closure", self._closure)
        check_batches(self._batches)
        self.params = check_params(params, once=True)
        self._sharded = is_sharded(self.params[0])
        if self._sharded and self._group is not None:
            raise ValueError(
                "process_group: expected None with sharded parameters, whose gradients are averaged over their mesh,"
                " got a group"
            )
        self._reached = [False] * len(self.params)
        dtype = torch.float64 if all(p.dtype == torch.float64 for p in self.params) else torch.float32
        self.like = torch.empty(0, dtype=dtype, device=self._device)
        self.rounding = max(torch.finfo(p.dtype).eps for p in self.params)
        self._origin = [_local(p).clone() for p in self.params]
        found = self._fingerprint([_hashed(p) for p in self.params] if self._group else [])
        if self._sharded:  # each has values of its own
            layouts = [(tuple(p.shape), p.dtype, p.placements) for p in self.params]  # type: ignore[attr-defined]
            found = fingerprint_of(repr((self.params.labels, layouts)), self._device)
        return torch.cat([torch.ones(1, dtype=torch.float64, device=self._device), found])

    def _fingerprint(self, tensors: Sequence[Tensor]) -> Tensor:
        if self._group is None or not tensors:
            return torch.zeros(26, dtype=torch.float64, device=self._device)
        return fingerprint(tensors)

    def _survey(self, sums: Tensor) -> Tensor:
        """This process's weight, number of batches, whether one couples its samples, whether params are reached."""
        count, statistics, cut = 0, False, dict[int, str]()
        averaged = not self._in_batches and self._group is None
        with self._visit() as visit, random_state_kept(self._device, self._seed), _uncompiled():
            for count, batch in enumerate(self._batches, 1):
                with buffers_kept(self.params, averaged) as calls, random_state_kept(self._device, self._seed + count):
                    loss, weight = self._evaluate(batch)
                    tally(sums, loss, weight)
                    self._modules |= {id(module): module for module in calls.outermost}
                    visit.hold(p for module in calls.outermost for p in module.parameters())
                    # One that is no module's own.
                    visit.hold(getattr(node, "variable", None) for node in graph_nodes([loss]))
                    statistics = statistics or calls.batch_statistics or uses_batch_statistics(loss)
                    loss.backward()  # type: ignore[no-untyped-call]
                reached = [p.grad is not None for p in self.params]
                self._reached = [a or b for a, b in zip(self._reached, reached, strict=True)]
                cut |= calls.cut
                visit.clear()
        check_reached(self.params, self._reached, cut)
        self._tolerance = relative_rounding(loss.dtype) if count else 0.0
        self._leaves = visit.leaves
        self._expected = sums
        weight = sums[1].view(1).clone()
        if self._sharded:
            weight = self._mean_over_mesh(weight)
        return torch.cat([weight, sums.new_tensor([count, statistics, any(self._reached)])])

    def _mean_over_mesh(self, weight: Tensor) -> Tensor:
        """Sharded gradients are means over the processes; so must be what the sum is divided by."""
        for group in self._all:
            distributed.all_reduce(weight, group=group)
        return weight / float(self._processes)

    def _pass(self, u: Tensor | None, points: Sequence[float], weights: Sequence[Sequence[float]]) -> Tensor:
        """This process's combinations, whether its sums changed, and the fingerprint of u."""
        self._check_unchanged()
        kept = len(weights) * self.layout.size
        message = torch.zeros(kept + 28, dtype=self.like.dtype, device=self._device)  # the last is for reduce_over
        rows = message[:kept].view(len(weights), self.layout.size)
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        with self._visit(self._leaves) as visit, random_state_kept(self._device, self._seed):
            for count, batch in enumerate(self._batches, 1):
                for k, point in enumerate(points):
                    self._move(u, point)
                    with random_state_kept(self._device, self._seed + count):
                        loss, weight = self._evaluate(batch)
                        loss.backward()  # type: ignore[no-untyped-call]
                    visit.buffers.put_back()
                    self._collect(rows, [row[k] for row in weights])
                    visit.clear()
                    if k == 0:
                        tally(sums, loss, weight)
        own = [u, u.new_tensor(points, dtype=torch.float64)] if u is not None else []
        message[kept] = self._changed(sums, loss_too=u is None)
        message[kept + 1 : -1] = self._fingerprint(own)
        return message

    def _check_unchanged(self) -> None:
        for p, origin, label in zip(self.params, self._origin, self.params.labels, strict=True):
            if not torch.equal(_local(p), origin):
                if origin.isnan().any():
                    raise ValueError(f"{label}: expected finite values, got NaN")
                raise RuntimeError(f"{label}: expected the values it had when the operator was made, got others")

    def _changed(self, sums: Tensor, loss_too: bool) -> Tensor:
        """Whether this process's weights, and its losses where they were computed in the same place, add up to
        something else than at first: 0-d."""
        now, before = sums[:2], self._expected[:2]
        margin = self._tolerance * torch.stack([self._expected[2], before[1].abs()])
        same = ((now - before).abs() <= margin) | (now == before) | ~(now.isfinite() & before.isfinite())
        return ~same[0 if loss_too else 1 :].all()

    def _evaluate(self, batch: Any) -> tuple[Tensor, Tensor | float]:
        """The loss_sum of a batch and its weight."""
        with torch.enable_grad():
            if not self._in_batches:
                return check_loss(self._closure()), 1.0
            loss, weight = check_answer(self._closure(batch), ("loss_sum", "weight_sum"))
        return check_loss(loss, "loss_sum"), weight_of(weight, self._device)

    def _move(self, u: Tensor | None, distance: float) -> None:
        """Displaces the parameters by distance · u."""
        torch.clear_autocast_cache()  # an autocast around us would go on with copies of where they were
        parts = [None] * len(self.params) if u is None else self.layout.locals(u)
        for p, origin, part in zip(self.params, self._origin, parts, strict=True):
            if part is None or distance == 0.0:
                _local(p).copy_(origin)
            else:  # in the precision of vectors, rounded once
                _local(p).copy_(torch.add(origin.to(self.like.dtype), part, alpha=distance))
        for module in self._gathering:  # what is gathered already would be used as it is
            _reshard(module)

    def _collect(self, rows: Tensor, factors: Sequence[float]) -> None:
        """Adds the gradients that lie in .grad to the rows."""
        pieces = zip(*(self.layout.split(row) for row in rows), strict=True)
        for p, of_rows in zip(self.params, pieces, strict=True):
            if p.grad is None:
                continue
            gradient = self.layout.entries(p.grad.detach()).to(rows.dtype)
            for piece, factor in zip(of_rows, factors, strict=True):
                if factor:
                    piece.add_(gradient, alpha=factor)

    @contextmanager
    def _visit(self, leaves: Iterable[Tensor] = ()) -> Iterator[_Visit]:
        """In which parameters may be moved, and gradients come and go."""
        visit = _Visit(self._modules.values())
        visit.hold(self.params)
        visit.hold(leaves)
        try:
            yield visit
        finally:
            self._move(None, 0.0)
            visit.put_back()


class _Visit:
    """What has to be put back when gradients have been computed."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.buffers = BuffersOf(module for outermost in modules for module in outermost.modules())
        self._held: dict[int, tuple[Tensor, Tensor | None]] = {}

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf, _ in self._held.values()]

    def hold(self, leaves: Iterable[Tensor | None]) -> None:
        """Takes the .grad of leaves away."""
        for leaf in leaves:
            if leaf is not None and leaf.is_leaf and id(leaf) not in self._held:
                self._held[id(leaf)] = leaf, leaf.grad
                leaf.grad = None

    def clear(self) -> None:
        for leaf, _ in self._held.values():
            leaf.grad = None

    def put_back(self) -> None:
        self.buffers.put_back()
        for leaf, gradient in self._held.values():
            leaf.grad = gradient


def _local(p: Tensor) -> Tensor:
    """The memory of a parameter in this process; what is written there no version counter sees."""
    with torch.no_grad():
        return p.data.to_local() if is_sharded(p) else p.data  # type: ignore[attr-defined]


def _reshard(module: Any) -> None:
    """Lets a module of `fully_shard` forget what it has gathered, so that its next call gathers anew."""
    module.reshard()
    with suppress(AttributeError):  # none of this is public
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            # An error in its forward pass leaves it as in the midst of one, where it keeps what it has.
            if group is not None and not group.is_sharded:
                group._to_sharded()


def _hashed(p: Tensor) -> Tensor:
    """In a dtype of which there are fingerprints."""
    return p if p.element_size() > 2 else p.float()


def _uncompiled() -> AbstractContextManager[object]:
    """The compiler takes a second to import, and has compiled nothing until somebody does."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
