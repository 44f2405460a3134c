"""Hessian operators: products of second derivatives with flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dynloss_ext import _C

__all__ = ["HessianOperator"]


class HessianOperator:
    """The Hessian of a scalar loss, known by its products with flat vectors.

    The first backward pass is recorded once; a product is then one more backward pass through that graph
    (Pearlmutter, Neural Computation 6, 1994), run in C++ with the GIL released.

    Args:
        loss: 0-d tensor with its graph, or a closure without arguments that returns one. A closure is called twice
            and must return the same value both times: the Hessian of a random function (dropout) is not defined.
        params: the parameters, in the order in which they make up the flat vector of length P; tensors of one
            dtype (float32 or float64) on one device that require grad.

    Raises:
        TypeError, ValueError: for anything else; ``params`` on which the loss does not depend count as zero rows,
            but at least one must be used.
        RuntimeError: by a product, if a parameter was changed in place since the loss was computed.

    Attributes:
        shape: (P, P).
        dtype: of the parameters, the vectors and the products.
        device: likewise.
        gradients: the recorded gradient of each parameter (None where the loss does not depend on it). A training
            step that uses these pays for no backward pass of its own.
    """

    def __init__(self, loss: Tensor | Callable[[], Tensor], params: Iterable[Tensor]) -> None:
        self._params = check_params(params)
        self.gradients = record_gradients(_evaluate(loss), self._params)
        self._op = _C.GraphOperator(list(self.gradients), self._params)
        size = self._op.size
        self.shape = (size, size)
        self.dtype = self._params[0].dtype
        self.device = self._params[0].device

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for v of shape (P,), or for every column of v of shape (P, k)."""
        check_vector(v, self)
        if v.dim() == 1:
            return self._op.apply(v.detach().contiguous())
        columns = [self._op.apply(column.contiguous()) for column in v.detach().unbind(1)]
        return torch.stack(columns, dim=1) if columns else torch.empty_like(v)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


def check_params(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list, or an error that says what is wrong with which."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got one tensor: pass [tensor]")
    checked = list(params)
    if not checked:
        raise ValueError("params must hold at least one tensor, got none")
    for i, p in enumerate(checked):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{i}] must be a torch.Tensor, got {type(p).__name__}")
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params[{i}] must be float32 or float64, got {p.dtype}")
        if p.dtype != checked[0].dtype or p.device != checked[0].device:
            raise ValueError(
                f"params must share one dtype and device: params[0] is {checked[0].dtype} on {checked[0].device}, "
                f"params[{i}] is {p.dtype} on {p.device}"
            )
        if not p.requires_grad:
            raise ValueError(f"params[{i}] of shape {tuple(p.shape)} does not require grad")
    if len({id(p) for p in checked}) < len(checked):
        raise ValueError("params holds the same tensor twice")
    if sum(p.numel() for p in checked) == 0:
        raise ValueError("params hold no element at all")
    return checked


def check_vector(v: Tensor, op: HessianOperator) -> None:
    """Refuses what is not a vector or a block of vectors of the operator's space."""
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a torch.Tensor, got {type(v).__name__}")
    if v.dim() not in (1, 2) or v.shape[0] != op.shape[0]:
        raise ValueError(f"v must have shape ({op.shape[0]},) or ({op.shape[0]}, k), got {tuple(v.shape)}")
    if v.dtype != op.dtype or v.device != op.device:
        raise ValueError(f"v must be {op.dtype} on {op.device}, got {v.dtype} on {v.device}")


def record_gradients(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The first backward pass, recorded so that it can be differentiated again."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss, list(params), create_graph=True, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError("loss does not depend on any of params")
    return gradients


def check_loss(loss: object) -> Tensor:
    """The loss itself, or an error that says why it has no Hessian here."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a 0-d torch.Tensor or a closure returning one, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"loss must be a 0-d tensor, got shape {tuple(loss.shape)}: reduce it first")
    if not loss.dtype.is_floating_point:
        raise ValueError(f"loss must be a floating-point tensor, got {loss.dtype}")
    if not loss.requires_grad:
        raise ValueError("loss has no graph: it was computed without grad, or depends on no parameter")
    return loss


def _evaluate(loss: Tensor | Callable[[], Tensor]) -> Tensor:
    if isinstance(loss, Tensor) or not callable(loss):
        return check_loss(loss)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        first = check_loss(loss())
        second = check_loss(loss())
    a, b = float(first.detach()), float(second.detach())
    # Not bit for bit: a deterministic function may be summed in another order.
    if abs(a - b) > 1e3 * torch.finfo(second.dtype).eps * max(abs(a), abs(b)):
        raise ValueError(
            f"loss must return the same value for the same parameters, got {a!r} and then {b!r}: "
            "switch dropout and other randomness off"
        )
    return second
