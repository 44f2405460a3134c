"""Batching rules: `torch.func.vmap` over any op is the same op on an ensemble, with the batch as its members."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.dynloss


def class_dim(logits_dim: int, ensemble: bool) -> int:
    """Which dimension of logits holds the classes; as in csrc/arguments.h."""
    return 2 if ensemble else int(logits_dim > 1)


def _in_front(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """x with the batch as first dimension, expanded if it has none."""
    return x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)


class _Folding:
    """Maps the arguments of one problem, single or ensemble, to those of an ensemble of batch · E members."""

    def __init__(self, batch: int, logits: Tensor, logits_dim: int | None, ensemble: bool) -> None:
        shape = list(logits.shape)
        if logits_dim is not None:
            del shape[logits_dim]
        self.batch, self.shape, self.ensemble = batch, shape, ensemble
        self.members = shape[0] if ensemble else 1
        self.class_dim = class_dim(len(shape), ensemble)
        self.samples = [s for d, s in enumerate(shape) if d != self.class_dim][1 if ensemble else 0 :]
        self.lead = [self.members] if ensemble else []

    def logits(self, x: Tensor, dim: int | None) -> Tensor:
        """(E, N, C), (N, C, ...) or (C,), batched or not -> (B E, N', C)."""
        x = _in_front(x, dim, self.batch).movedim(self.class_dim + 1, -1)
        return x.reshape(self.batch * self.members, math.prod(self.samples), x.shape[-1])

    def unfold_logits(self, x: Tensor) -> Tensor:
        x = x.reshape(self.batch, *self.lead, *self.samples, x.shape[-1])
        return x.movedim(-1, self.class_dim + 1)

    def target(self, x: Tensor, dim: int | None) -> Tensor:
        count = math.prod(self.samples)
        if dim is None and not (self.ensemble and x.dim() == 2):
            return x.reshape(count)
        x = _in_front(x, dim, self.batch)
        if self.ensemble and x.dim() == 2:
            x = x.unsqueeze(1).expand(self.batch, self.members, count)
        return x.reshape(self.batch * self.members, count)

    def members_first(self, x: Tensor, dim: int | None, rank: int) -> Tensor:
        """A tensor with `rank` dimensions per member -> (B E, ...)."""
        x = _in_front(x, dim, self.batch)
        if x.dim() == rank + 1:
            x = x.unsqueeze(1).expand(self.batch, self.members, *x.shape[1:])
        return x.reshape(self.batch * self.members, *x.shape[2:])

    def unfold_members(self, x: Tensor) -> Tensor:
        return x.reshape(self.batch, *self.lead, *x.shape[1:])

    def loss(self, x: Tensor, dim: int | None) -> Tensor:
        """Something shaped like the loss -> (B E,), or (B E, N') unreduced."""
        x = _in_front(x, dim, self.batch)
        reduced = x.dim() - 1 == len(self.lead)
        return x.reshape(self.batch * self.members, *([] if reduced else [math.prod(self.samples)]))

    def unfold_loss(self, x: Tensor) -> Tensor:
        return x.reshape(self.batch, *self.lead, *([] if x.dim() == 1 else self.samples))


def _rank(x: Tensor, dim: int | None) -> int:
    return x.dim() - (dim is not None)


def _forward_rule(op: Any) -> Any:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        logits, target, step, step_tensor, clock, class_order, table, weight, *options = args
        d_logits, d_target, _, d_step, d_clock, d_order, d_table, d_weight = in_dims[:8]
        if d_order is not None:
            raise ValueError("class_order: vmap over the order of the classes is not supported; use a table")
        fold = _Folding(info.batch_size, logits, d_logits, _rank(clock, d_clock) == 2)
        if step_tensor is not None:
            step_tensor = fold.members_first(step_tensor, d_step, 0)
        if table is not None:
            table = fold.members_first(table, d_table, 2)
        if weight is not None:
            weight = fold.members_first(weight, d_weight, 1)
        loss, *gradient, weights, normalizer = op(
            fold.logits(logits, d_logits),
            fold.target(target, d_target),
            step,
            step_tensor,
            fold.members_first(clock, d_clock, 1),
            class_order,
            table,
            weight,
            *options,
        )
        outputs = (
            fold.unfold_loss(loss),
            *(fold.unfold_logits(g) for g in gradient),
            fold.unfold_members(weights),
            fold.unfold_members(normalizer),
        )
        return outputs, (0,) * len(outputs)

    return rule


def _derivative_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    u, v, grad_output, logits, target, weights, normalizer, *options = args
    d_u, d_v, d_grad, d_logits, d_target, d_weights, d_normalizer, *_ = in_dims
    fold = _Folding(info.batch_size, logits, d_logits, _rank(weights, d_weights) == 2)
    result = _ops.cross_entropy_derivative(
        *(None if x is None else fold.logits(x, d) for x, d in ((u, d_u), (v, d_v))),
        fold.loss(grad_output, d_grad),
        fold.logits(logits, d_logits),
        fold.target(target, d_target),
        fold.members_first(weights, d_weights, 1),
        fold.members_first(normalizer, d_normalizer, 1),
        *options,
    )
    return fold.unfold_logits(result), 0


for _name in ("cross_entropy", "cross_entropy_with_gradient"):
    torch.library.register_vmap(f"dynloss::{_name}", _forward_rule(getattr(_ops, _name)))
torch.library.register_vmap("dynloss::cross_entropy_derivative", _derivative_rule)
