"""Flat vectors by parameters: whole in every process, or in shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dynloss_ext._batches import all_alike, fingerprint_of, reduce_over
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
        group: of the processes that hold shards, or None.
    """

    group: Any = None

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


class Shards(Whole):
    """Vectors of which every process holds what it has of parameters that are sharded over a mesh of one dimension.

    Also what `csrc/lanczos/shards.h` asks for.
    """

    def __init__(self, params: Sequence[Any], like: Tensor) -> None:
        super().__init__(params, like)
        self.group, self.device = mesh_group(params[0]), like.device
        self._shapes = [p.to_local().shape for p in params]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)

    def locals(self, v: Tensor) -> list[Tensor]:
        return [piece.view(shape) for piece, shape in zip(self.split(v), self._shapes, strict=True)]

    def entries(self, t: Any) -> Tensor:
        return t.to_local().reshape(-1)  # type: ignore[no-any-return]

    def sum(self, numbers: Tensor) -> None:
        """Over all processes, in place."""
        distributed.all_reduce(numbers, group=self.group)

    def max(self, numbers: Tensor) -> None:
        """Over all processes, in place."""
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self.group)

    def lengths(self, rows: Sequence[Tensor], *numbers: Tensor) -> list[float]:
        squares = [torch.linalg.vector_norm(row, dtype=torch.float64).square() for row in rows]
        message = torch.stack([*squares, *(x.to(torch.float64) for x in numbers)])
        self.sum(message)
        message[: len(rows)].sqrt_()
        return message.tolist()

    def normal(self, seed: int) -> Tensor:
        """(size,): what the shard has of a vector of normal numbers that is the same for any number of processes."""
        pieces, start = [], 0
        for p, shape in zip(self._params, self._shapes, strict=True):
            (placement,) = p.placements  # type: ignore[attr-defined]
            first, _ = shard_of(p)
            # Contiguous in the order in which the dimension that is cut comes first.
            turned = torch.empty(shape, device="meta").movedim(placement.dim, 0).shape
            begin = start + first * turned[1:].numel()
            piece = self._normal(seed, begin, begin + shape.numel()).view(turned)
            pieces.append(piece.movedim(0, placement.dim).reshape(-1))
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

    def cut(self, v: Tensor) -> Tensor:
        """The shard of a vector that is whole in every process."""
        pieces = torch.split(v, [p.numel() for p in self._params])
        return torch.cat(
            [
                piece.view(p.shape).narrow(p.placements[0].dim, *shard_of(p)).reshape(-1)  # type: ignore[attr-defined]
                for p, piece in zip(self._params, pieces, strict=True)
            ]
        )

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

    _, digits = reduce_over(shards.group, shards.device, message, 26)
    if not all_alike(digits, distributed.get_world_size(shards.group)):
        raise ValueError(f"{name}: expected the same arguments in all processes of the mesh, got others")
    return made[0]


def layout_of(params: Sequence[Tensor], like: Tensor) -> Whole:
    """Shards where every parameter is cut along one dimension over the same mesh of one dimension."""

    def cut(p: Any) -> bool:
        mesh = params[0].device_mesh  # type: ignore[attr-defined]
        return mesh.ndim == 1 and p.device_mesh == mesh and type(p.placements[0]).__name__ == "Shard"

    return (Shards if is_sharded(params[0]) and all(map(cut, params)) else Whole)(params, like)


def mesh_group(params: Any) -> Any:
    """Of the first DTensor on a mesh of one dimension, or None."""
    for given in params if isinstance(params, list) else [params]:
        p = given[1] if isinstance(given, tuple) and len(given) == 2 else given
        if isinstance(p, Tensor) and is_sharded(p) and p.device_mesh.ndim == 1:  # type: ignore[attr-defined]
            return p.device_mesh.get_group()  # type: ignore[attr-defined]
    return None


def shard_of(p: Any) -> tuple[int, int]:
    """Where the shard of this process begins in the dimension that is cut, and how long it is."""
    dim = p.placements[0].dim
    rows, processes = p.shape[dim], p.device_mesh.size()
    first = min(p.device_mesh.get_local_rank() * -(-rows // processes), rows)
    return first, p.to_local().shape[dim]


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
