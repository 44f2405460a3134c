"""Flat vectors by parameters: whole in every process, or in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dynloss_ext._batches import all_alike, fingerprint, fingerprint_of, reduce_over
from dynloss_ext._checks import is_sharded

Made = TypeVar("Made")

_BLOCK = 2**14  # normal numbers that are drawn from one seed


class Whole:
    """Vectors that every process holds, the parameters one after the other.

    Args:
        params: tensors or DTensors.
        like: a tensor of the dtype and on the device of vectors.

    Attributes:
        size: entries of a vector in this process.
        dimension: of a whole vector.
    """

    def __init__(self, params: Sequence[Tensor], like: Tensor) -> None:
        self._params, self._like = params, like
        self._sizes = [p.numel() for p in params]
        self.dimension = self.size = sum(self._sizes)

    def split(self, v: Tensor) -> tuple[Tensor, ...]:
        """The entries for each parameter."""
        return torch.split(v, self._sizes)

    def locals(self, v: Tensor) -> list[Tensor]:
        """What v has for the memory of each parameter in this process."""
        return [_distributed(piece.view(p.shape), p) for p, piece in zip(self._params, self.split(v), strict=True)]

    def entries(self, t: Tensor) -> Tensor:
        """Of a tensor like a parameter, those in vectors: 1-D."""
        t = t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]
        return (t if t.layout == torch.strided else t.to_dense()).reshape(-1)

    def normal(self, seed: int) -> Tensor:
        """(size,): normal numbers."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return torch.randn(self.size, generator=generator, dtype=self._like.dtype, device="cpu").to(self._like.device)

    def lengths(self, rows: Sequence[Tensor], *numbers: Tensor) -> list[float]:
        """Of whole vectors; then the sums of 0-d tensors over the processes."""
        return [norm(row) for row in rows] + [float(x) for x in numbers]

    def same_in_replicas(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all processes that hold the same shard have the same values."""
        return True


class Shards(Whole):
    """Vectors of which every process holds what it has of parameters that are sharded over one dimension of a mesh, and
    replicated over its others.

    Also what `csrc/lanczos/shards.h` asks for.

    Attributes:
        groups: see `mesh_groups`.
        processes: of the mesh.
        copies: of each shard.
        place: the number of this process's shard, and how many there are.
    """

    def __init__(self, params: Sequence[Any], like: Tensor) -> None:
        super().__init__(params, like)
        self.groups, self.device = mesh_groups(params), like.device
        self.processes = params[0].device_mesh.size()
        self._replicas = list(self.groups)
        self._group = self._replicas.pop(_cut_by(params[0]))
        self.copies = self.processes // distributed.get_world_size(self._group)
        self.place = [distributed.get_rank(self._group), distributed.get_world_size(self._group)]
        self._shapes = [p.to_local().shape for p in params]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)

    def locals(self, v: Tensor) -> list[Tensor]:
        return [piece.view(shape) for piece, shape in zip(self.split(v), self._shapes, strict=True)]

    def entries(self, t: Any) -> Tensor:
        return t.to_local().reshape(-1)  # type: ignore[no-any-return]

    def sum(self, numbers: Tensor) -> None:
        """Over the shards of a vector, in place."""
        distributed.all_reduce(numbers, group=self._group)

    def max(self, numbers: Tensor) -> None:
        """Over the shards of a vector, in place."""
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group)

    def any(self, condition: bool) -> bool:
        """Whether it holds in any process."""
        found = torch.tensor([float(condition)], device=self.device)
        for group in self.groups:
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group=group)
        return bool(found)

    def lengths(self, rows: Sequence[Tensor], *numbers: Tensor) -> list[float]:
        squares = [torch.linalg.vector_norm(row, dtype=torch.float64).square() for row in rows]
        message = torch.stack([*squares, *(x.to(torch.float64) for x in numbers)])
        for group in self.groups:
            distributed.all_reduce(message, group=group)
        message[: len(rows)].div_(self.copies).sqrt_()
        return message.tolist()

    def same_in_replicas(self, tensors: Sequence[Tensor]) -> bool:
        if not self._replicas:
            return True
        own = fingerprint(tensors)
        both = torch.cat([own, -own])
        for group in self._replicas:
            distributed.all_reduce(both, distributed.ReduceOp.MAX, group=group)
        return torch.equal(both, torch.cat([own, -own]))

    def normal(self, seed: int) -> Tensor:
        """(size,): what the shard has of a vector of normal numbers that is the same for any number of processes."""
        pieces, start = [], 0
        for p, shape in zip(self._params, self._shapes, strict=True):
            dim, first, _ = _shard_of(p)
            # Contiguous in the order in which the dimension that is cut comes first.
            turned = torch.empty(shape, device="meta").movedim(dim, 0).shape
            begin = start + first * turned[1:].numel()
            piece = self._normal(seed, begin, begin + shape.numel()).view(turned)
            pieces.append(piece.movedim(0, dim).reshape(-1))
            start += p.numel()
        return torch.cat(pieces).to(self._like.device)

    def _normal(self, seed: int, begin: int, end: int) -> Tensor:
        """Entries begin to end of a vector whose every block has a seed of its own: the generator knows 32 bits."""
        generator = torch.Generator(device="cpu")
        out = torch.empty(end - begin, dtype=self._like.dtype, device="cpu")
        for first in range(begin - begin % _BLOCK, end, _BLOCK):
            generator.manual_seed((seed * 2654435761 + first // _BLOCK) % 2**32)
            block = torch.randn(_BLOCK, generator=generator, dtype=out.dtype, device="cpu")
            low, high = max(first, begin), min(first + _BLOCK, end)
            out[low - begin : high - begin] = block[low - first : high - first]
        return out

    def signs(self, generator: torch.Generator) -> Tensor:
        """(size,): what the shard has of the numbers 1 and -1 that the generator gives where vectors are whole; every
        process draws all of them, a byte each and one parameter at a time."""
        pieces = (torch.randint(2, p.shape, generator=generator, dtype=torch.int8, device="cpu") for p in self._params)
        signs = self._cut(pieces).mul_(2).sub_(1)
        return signs.to(self.device).to(self._like.dtype)

    def cut(self, v: Tensor) -> Tensor:
        """The shard of a vector that is whole in every process."""
        pieces = torch.split(v, [p.numel() for p in self._params])
        return self._cut(piece.view(p.shape) for p, piece in zip(self._params, pieces, strict=True))

    def _cut(self, pieces: Iterable[Tensor]) -> Tensor:
        """The same of one in the shapes of the parameters."""
        shards = (piece.narrow(*_shard_of(p)) for p, piece in zip(self._params, pieces, strict=True))
        return torch.cat([shard.clone().reshape(-1) for shard in shards])  # without what it was cut from

    def gather(self, v: Tensor) -> Tensor:
        """The whole vector in every process."""
        return torch.cat([piece.full_tensor().reshape(-1) for piece in self.unflatten(v)])  # type: ignore[attr-defined]

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """The pieces of a shard, (size,) or (size, k), as DTensors like the parameters, k last."""
        from torch.distributed.tensor import DTensor

        columns = v.shape[1:]
        out: list[Tensor] = []
        for p, local, piece in zip(self._params, self._shapes, self.split(v), strict=True):
            sharded: Any = p
            whole = torch.empty((*p.shape, *columns), device="meta")
            out.append(
                DTensor.from_local(
                    piece.reshape(*local, *columns),
                    sharded.device_mesh,
                    sharded.placements,
                    run_check=False,
                    shape=whole.shape,
                    stride=whole.stride(),
                )
            )
        return out


def agreed(shards: Shards | None, name: str, check: Callable[[], tuple[Made, object]]) -> Made:
    """The first of what the check of a call's arguments returns; with shards in no process if not in all of them, or
    where the second differs.

    Raises:
        ValueError: it differs.
        RuntimeError: the check of another process failed.
    """
    if shards is None:
        return check()[0]
    made: list[Made] = []

    def message() -> Tensor:
        found, told = check()
        made.append(found)
        return fingerprint_of(repr(told), shards.device)

    _, digits = reduce_over(shards.groups, shards.device, message, 26)
    if not all_alike(digits, shards.processes):
        raise ValueError(f"{name}: expected the same arguments in all processes of the mesh, got others")
    return made[0]


def layout_of(params: Sequence[Tensor], like: Tensor) -> Whole:
    """Shards where all parameters are cut along one dimension each, by the same dimension of the same mesh, and
    replicated over its others."""
    first: Any = params[0]
    if not is_sharded(first):
        return Whole(params, like)
    by = _cut_by(first)
    alike = all(p.device_mesh == first.device_mesh and _cut_by(p) == by for p in params)  # type: ignore[attr-defined]
    return (Whole if by is None or not alike else Shards)(params, like)


def mesh_groups(params: Any) -> tuple[Any, ...]:
    """Of the mesh of the first DTensor, the groups that this process is in, one a dimension: what is summed over one
    after the other is summed over all processes."""
    for given in params if isinstance(params, list) else [params]:
        p = given[1] if isinstance(given, tuple) and len(given) == 2 else given
        if isinstance(p, Tensor) and is_sharded(p):
            return tuple(_oldest_like(group) for group in p.device_mesh.get_all_groups())  # type: ignore[attr-defined]
    return ()


def _oldest_like(group: Any) -> Any:
    """Of the groups with the same processes and backend the first that was made, which is the same in all of them.

    torch's caches take one mesh for another that is equal, and so does a DTensor: by what a process computed before,
    its groups may be those of an earlier mesh, and those of another process not.
    """
    ranks_of, backend_of = distributed.get_process_group_ranks, distributed.get_backend_config
    ranks, backend = ranks_of(group), backend_of(group)
    groups = distributed.distributed_c10d._world.pg_group_ranks  # in the order in which they were made
    return next(other for other in groups if ranks_of(other) == ranks and backend_of(other) == backend)


def largest_entries(rows: Tensor, shards: Shards | None) -> Tensor:
    """(rows, 1): |x| of the largest entry of each whole row."""
    largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    if shards is not None:
        shards.max(largest)
    return largest


def _cut_by(p: Any) -> Any:
    """The dimension of its mesh over which a DTensor is sharded, where it is replicated over the others; or None."""
    names = [type(placement).__name__ for placement in p.placements]
    return names.index("Shard") if sorted(names) == ["Replicate"] * (len(names) - 1) + ["Shard"] else None


def _shard_of(p: Any) -> tuple[int, int, int]:
    """The dimension that is cut, where the shard of this process begins in it, and how long it is."""
    by = _cut_by(p)
    dim = p.placements[by].dim
    rows, processes = p.shape[dim], p.device_mesh.size(by)
    first = min(p.device_mesh.get_local_rank(by) * -(-rows // processes), rows)
    return dim, first, p.to_local().shape[dim]


def norm(v: Tensor) -> float:
    """In double precision."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def _distributed(piece: Tensor, p: Tensor) -> Tensor:
    """What this process has of a whole tensor, where p has its own."""
    if not is_sharded(p):
        return piece
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = p
    shard: Any = distribute_tensor(piece, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return shard.to_local()  # type: ignore[no-any-return]
