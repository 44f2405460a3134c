"""Hessian operators: products of second derivatives with flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._batches import BatchSums, check_loss, repeatable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CurvatureOperator", "GaussNewtonOperator", "HessianOperator"]


class CurvatureOperator:
    """A symmetric P × P matrix known by its products with flat vectors: what every operator here offers.

    Attributes:
        shape: (P, P).
        dtype: of the parameters, the vectors and the products.
        device: likewise.
    """

    def __init__(self, op: _C.SymmetricOperator, like: Tensor) -> None:
        self._op = op
        self.shape = (op.size, op.size)
        self.dtype = like.dtype
        self.device = like.device

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for v of shape (P,), or for every column of v of shape (P, k)."""
        _check_vector(v, self)
        if v.dim() == 1:
            return self._op.apply(v.detach().contiguous())
        columns = [self._op.apply(column.contiguous()) for column in v.detach().unbind(1)]
        return torch.stack(columns, dim=1) if columns else torch.empty_like(v)

    def to_dense(self) -> Tensor:
        """The matrix itself, (P, P), by P products: for small P."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def as_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` on NumPy vectors, which travel to the device and back."""
        from scipy.sparse.linalg import LinearOperator

        def product(x: Any) -> Any:
            v = torch.as_tensor(x, dtype=self.dtype, device=self.device)
            return (self @ (v.reshape(-1) if v.numel() == self.shape[0] else v)).cpu().numpy()

        name = str(self.dtype).removeprefix("torch.")
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


class HessianOperator(CurvatureOperator):
    """The Hessian of a scalar loss, known by its products with flat vectors.

    The first backward pass is recorded once; a product is then one more backward pass through that graph
    (Pearlmutter, Neural Computation 6, 1994), run in C++ with the GIL released.

    Args:
        loss: 0-d tensor with its graph, or a closure without arguments that returns one. A closure is called twice
            and must return the same value both times: the Hessian of a random function (dropout) is not defined.
        params: the parameters, in the order in which they make up the flat vector of length P; tensors of one
            dtype (float32 or float64) on one device that require grad. A part of them gives that block of the
            Hessian; see `layers` for many blocks of one backward pass.

    Raises:
        TypeError, ValueError: for anything else; ``params`` on which the loss does not depend count as zero rows,
            but at least one must be used.
        RuntimeError: by a product, if a parameter was changed in place since the loss was computed. (A change
            through ``p.data`` escapes PyTorch's version counter and this check.)

    Attributes:
        gradients: the recorded gradient of each parameter (None where the loss does not depend on it). A training
            step that uses these pays for no backward pass of its own. Empty for `from_batches`.
    """

    def __init__(self, loss: Tensor | Callable[[], Tensor], params: Iterable[Tensor]) -> None:
        checked = check_params(params)
        self.gradients = _record_gradients(_evaluate(loss), checked)
        super().__init__(_C.GraphOperator(self.gradients, checked), checked[0])

    @classmethod
    def _of(cls, op: _C.SymmetricOperator, like: Tensor, gradients: tuple[Tensor | None, ...]) -> HessianOperator:
        made = cls.__new__(cls)
        CurvatureOperator.__init__(made, op, like)
        made.gradients = gradients
        return made

    @classmethod
    def layers(
        cls, loss: Tensor | Callable[[], Tensor], groups: Mapping[str, Iterable[Tensor]]
    ) -> dict[str, HessianOperator]:
        """The diagonal block of the Hessian for every named group of parameters, from one recorded backward pass.

        ``HessianOperator.layers(loss, {name: [p] for name, p in model.named_parameters()})`` gives the spectra of
        single tensors. Groups must not overlap; arguments and errors are those of `HessianOperator`.
        """
        checked = {name: check_params(params) for name, params in groups.items()}
        everything = check_params([p for params in checked.values() for p in params])
        gradients = iter(_record_gradients(_evaluate(loss), everything))
        blocks = {}
        for name, params in checked.items():
            own = tuple(next(gradients) for _ in params)
            blocks[name] = cls._of(_C.GraphOperator(own, params), params[0], own)
        return blocks

    @classmethod
    def from_batches(
        cls,
        closure: Callable[[Any], tuple[Tensor, Tensor | float]],
        params: Iterable[Tensor],
        batches: Iterable[Any],
        *,
        process_group: ProcessGroup | None = None,
    ) -> HessianOperator:
        """The Hessian of Σ loss_sum / Σ weight_sum over batches, exactly, however ragged or weighted they are.

        Only one batch's graph lives at a time: small batches bound the memory, at the price of one forward and
        backward pass per batch and product.

        Args:
            closure: batch -> (loss_sum, weight_sum): the *sum* of the batch's losses, 0-d with its graph, and what
                the total is to be divided by: the number of samples, or the sum of their weights.
            params: as in `HessianOperator`.
            batches: iterated over once per product, so not an iterator; each pass must give the same batches.
            process_group: whose processes hold shards of the data (`torch.distributed.group.WORLD` for all); each
                passes its own batches and the same params, and all must make the same calls. One all-reduce
                per product; a process that fails makes the others raise instead of waiting for it.

        Raises:
            ValueError: the closure is random, or uses BatchNorm in train mode on more than one batch: there the
                loss of all samples is not a sum over batches.
        """
        checked = check_params(params)
        sums = BatchSums(closure, checked, batches, process_group)
        size = sum(p.numel() for p in checked)
        like = torch.empty(0, dtype=checked[0].dtype, device=checked[0].device)
        return cls._of(_C.PythonOperator(sums.product, size, like), like, ())


class GaussNewtonOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix Jᵀ ∇²ℓ J of loss = ℓ(z(params)), J = dz/dparams: the Hessian without the
    curvature of the network; positive semidefinite for a convex ℓ (Schraudolph, Neural Computation 14, 2002).

    Exact: three backward passes through recorded graphs per product, in C++.

    Args:
        loss: 0-d tensor computed from ``outputs``, which must be all through which it depends on ``params``.
        outputs: z, such as the logits; any shape.
        params: as in `HessianOperator`.
    """

    def __init__(self, loss: Tensor, outputs: Tensor, params: Iterable[Tensor]) -> None:
        checked = check_params(params)
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            raise ValueError("outputs must be a tensor with its graph")
        (gradient,) = _record_gradients(check_loss(loss), [outputs], of="outputs")
        dummy = torch.zeros_like(outputs, requires_grad=True)
        with torch.enable_grad():
            pullback = torch.autograd.grad(outputs, checked, dummy, create_graph=True, allow_unused=True)
        if all(g is None for g in pullback):
            raise ValueError("outputs do not depend on any of params")
        op = _C.GaussNewtonOperator(outputs, cast(Tensor, gradient), dummy, pullback, checked)
        super().__init__(op, checked[0])


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


def _check_vector(v: Tensor, op: CurvatureOperator) -> None:
    """Refuses what is not a vector or a block of vectors of the operator's space."""
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a torch.Tensor, got {type(v).__name__}")
    if v.dim() not in (1, 2) or v.shape[0] != op.shape[0]:
        raise ValueError(f"v must have shape ({op.shape[0]},) or ({op.shape[0]}, k), got {tuple(v.shape)}")
    if v.dtype != op.dtype or v.device != op.device:
        raise ValueError(f"v must be {op.dtype} on {op.device}, got {v.dtype} on {v.device}")


def _record_gradients(loss: Tensor, params: Sequence[Tensor], of: str = "any of params") -> tuple[Tensor | None, ...]:
    """The first backward pass, recorded so that it can be differentiated again."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss, list(params), create_graph=True, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError(f"loss does not depend on {of}")
    return gradients


def _evaluate(loss: Tensor | Callable[[], Tensor]) -> Tensor:
    if isinstance(loss, Tensor) or not callable(loss):
        return check_loss(loss)
    return repeatable(loss, check_loss)
