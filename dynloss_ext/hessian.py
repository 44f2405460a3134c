"""Hessian operators: products of second derivatives with flat vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.autograd.graph import get_gradient_edge

from dynloss_ext import _C
from dynloss_ext._batches import BatchSums, Recording
from dynloss_ext._checks import Parameters, Params, check_loss, check_params, check_tensor
from dynloss_ext._differences import GradientDifferences
from dynloss_ext._double_backward import custom_functions, double_backward, warn_of_custom_functions
from dynloss_ext._evaluation import Calls, buffers_kept, check_reached, repeatable, suspects, warn_of_unreached
from dynloss_ext._operators import CurvatureOperator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CurvatureOperator", "GaussNewtonOperator", "HessianOperator"]


class _Recorded:
    """A matrix behind a recorded graph."""

    def __init__(self, op: _C.SymmetricOperator, roots: Sequence[Tensor | None], params: Params) -> None:
        self._op, self.size, self._roots, self.params = op, op.size, roots, params

    def operator(self) -> _C.SymmetricOperator:
        """What the driver calls."""
        return self._op

    def fail(self, error: Exception) -> None:
        """Nobody else waits for a product that this process cannot ask for."""

    def suspects(self) -> list[str]:
        """Those of the recorded graph."""
        return suspects(self._roots)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Checkpoints call their modules again."""
        with double_backward(), buffers_kept(self.params):
            yield


class HessianOperator(CurvatureOperator):
    """The Hessian of a scalar loss, known by its products with flat vectors.

    The first backward pass is recorded once; a product is then one more backward pass through that graph
    (Pearlmutter, Neural Computation 6, 1994), run in C++ with the GIL released.

    Args:
        loss: 0-d tensor with its graph, or a closure without arguments that returns one. A closure is called twice
            and must return the same value both times: the Hessian of a random function (dropout) is not defined.
            The buffers of its modules and torch's random state stay as they were. It runs with attention by plain
            operators and without torch.compile: what these make has no second derivative.
        params: the parameters, in the order in which they make up the flat vector of length P; tensors of one
            dtype (float32 or float64) on one device that require grad and have no hooks, or (name, tensor) pairs as
            from ``model.named_parameters()``. A part of them gives that block of the Hessian; see `layers` for many
            blocks of one backward pass.

    Raises:
        TypeError, ValueError: for anything else; ``params`` that no gradient reaches count as zero rows, of which a
            warning says so, but at least one must be reached. For a closure, also a parameter without a gradient whose
            module ran without grad, and a call of DistributedDataParallel.
        RuntimeError: torch cannot differentiate the loss twice: here or by the first product.
        RuntimeError: by a product, if a parameter was changed in place since the loss was computed, by its version
            counter. Fused optimizers and changes of ``p.data`` leave that alone: a 64-bit hash of the parameters'
            values, taken when the operator is made, is compared at the start of `eigsh`, `EigenTracker.update`,
            `spectral_density` and `trace`, and on the CPU of every ``H @ v``. A fused step between the computation
            of a loss and that of its operator cannot be seen.

    Attributes:
        gradients: the recorded gradient of each parameter (None where the loss does not depend on it). A training
            step that uses these pays for no backward pass of its own; ``detach().clone()`` them, as autograd may hand
            out one number seen many times. Empty for `from_batches` and `from_gradients`.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> H = HessianOperator(x[0] ** 2 * x[1], [x])
        >>> H @ torch.tensor([1.0, 0.0], dtype=torch.float64)
        tensor([4., 2.], dtype=torch.float64)
        >>> H.to_dense()
        tensor([[4., 2.],
                [2., 0.]], dtype=torch.float64)
    """

    gradients: tuple[Tensor | None, ...] = ()

    def __init__(self, loss: Tensor | Callable[[], Tensor], params: Parameters) -> None:
        checked = check_params(params)
        self.gradients = _record_loss(loss, checked, "params")
        op = _C.GraphOperator(self.gradients, _flat(checked))
        super().__init__(_Recorded(op, self.gradients, checked), checked[0])

    @classmethod
    def layers(
        cls, loss: Tensor | Callable[[], Tensor], groups: Mapping[str, Parameters]
    ) -> dict[str, HessianOperator]:
        """The diagonal block of the Hessian for every named group of parameters, from one recorded backward pass.

        ``HessianOperator.layers(loss, {name: [p] for name, p in model.named_parameters()})`` gives the spectra of
        single tensors. Groups must not overlap; one on which the loss does not depend has the block 0. Arguments and
        errors are those of `HessianOperator` otherwise.
        """
        if not isinstance(groups, Mapping):
            raise TypeError(f"groups: expected a mapping from names to params, got {type(groups).__name__}")
        if not groups:
            raise ValueError("groups: expected at least one group, got none")
        checked = {name: check_params(params, f"groups[{name!r}]") for name, params in groups.items()}
        named = [pair for params in checked.values() for pair in zip(params.labels, params, strict=True)]
        gradients = iter(_record_loss(loss, check_params(named, "all groups together"), "the params in groups"))
        blocks = {}
        for name, params in checked.items():
            own = tuple(next(gradients) for _ in params)
            blocks[name] = cls._of(_Recorded(_C.GraphOperator(own, _flat(params)), own, params), params[0])
            blocks[name].gradients = own
        return blocks

    @classmethod
    def from_batches(
        cls,
        closure: Callable[[Any], tuple[Tensor, Tensor | float]],
        params: Parameters,
        batches: Iterable[Any],
        *,
        process_group: ProcessGroup | None = None,
    ) -> HessianOperator:
        """The Hessian of Σ loss_sum / Σ weight_sum over batches, exactly, however ragged or weighted they are.

        Only one batch's graph lives at a time: small batches bound the memory, at the price of one forward and
        backward pass per batch and product. The model's mode and buffers and torch's random state stay as they were;
        every pass starts from another random state, and takes its turn with those of other threads.

        Args:
            closure: batch -> (loss_sum, weight_sum): the *sum* of the batch's losses, 0-d with its graph, and what
                the total is to be divided by: the number of samples, or the sum of their weights. It runs as that of
                `HessianOperator`.
            params: as in `HessianOperator`. A batch that leaves one out, as one of a mixture's experts, or uses it
                under no_grad, adds zeros to its rows; at least one batch must reach it.
            batches: iterated over once per product, so not an iterator; each pass must give the same batches.
            process_group: whose processes hold shards of the data (`torch.distributed.group.WORLD` for all); each
                passes its own batches, or none, and the same params, and all must make the same calls. One all-reduce
                per product; a process that fails makes the others raise instead of waiting for it.

        Raises:
            ValueError: the closure is random, or uses BatchNorm in train mode on more than one batch: there the
                loss of all samples is not a sum over batches; no batch depends on params; the weights do not add up
                to a finite positive number; params differ between processes. By a product: the losses of this pass
                over the batches add up to something else than before.
            RuntimeError: by a product: a parameter was changed in place, another process failed, or v differs between
                processes.
        """
        sums = BatchSums(_hessian, ("loss_sum",), closure, params, batches, process_group)
        return cls._of(sums, sums.like)

    @classmethod
    def from_gradients(
        cls,
        closure: Callable[..., Any],
        params: Parameters,
        batches: Iterable[Any] | None = None,
        *,
        process_group: ProcessGroup | None = None,
        order: int = 4,
        step: float | None = None,
        seed: int = 0,
    ) -> HessianOperator:
        """The Hessian by central differences of gradients: for what torch differentiates once, as fused attention,
        compiled and sharded modules.

        A product takes ``order`` gradients and is inexact; its error is estimated when the operator is made, by 20 to
        60 gradients, and, of order 4, with every product (`noise`), which takes up to three times as many where its
        direction bends more than was measured. `eigsh` and `EigenTracker` add the noise to their residuals and stop
        where the rest is no more, with the status "noise floor" where the tolerance is below.

        The closure runs as it is: attention fused, modules compiled, layers in their mode. The parameters are moved
        while a product is computed. They, their ``.grad``, buffers and torch's random state are put back to the bit.
        Memory, beside that of a backward pass: a copy of the parameters that stays, and in the dtype of products five
        vectors of length P while a product is computed (four of order 2), eight while the operator is made.

        Args:
            closure: without batches, () -> loss, a 0-d tensor with its graph; with them, batch -> (loss_sum,
                weight_sum) as in `from_batches`. ``loss.backward()`` is called here. Random layers draw the same
                numbers in every evaluation.
            params: leaves of any floating-point dtypes on one device, that have no hooks: tensors, or DTensors as of
                `torch.distributed.fsdp.fully_shard`, which every process must pass. Vectors and sums are float64 if all
                params are, float32 otherwise. Of sharded params vectors are in shards, also those of sums, multiples
                and `preconditioned`; ``H @ v`` takes and gives whole ones, too. Call modules, not their ``forward``:
                buffers of those that are called are put back.
            batches: as in `from_batches`, or None. With sharded params as many in every process.
            process_group: as in `from_batches`; without batches the mean of the processes' losses. None with DTensors
                or DistributedDataParallel (which takes no batches), whose gradients are means already.
            order: of the error in the step: 4, by one step of Richardson, or 2 at half the price, without an estimate
                for each product.
            step: about the best length δ of the displacement, as ``step`` of an operator a few training steps ago: it
                is made to suit by 13 gradients, or more where its error is large. None: found by 20 to 60.
            seed: of the random layers' numbers and the direction of the measurement.

        Raises:
            TypeError, ValueError: as `HessianOperator` and `from_batches`; no gradient reaches params, or one of it is
                not finite; params that are no leaves, or are on several devices.
            RuntimeError: by a product: a parameter was changed, or another process failed.

        Example:
            >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
            >>> H = HessianOperator.from_gradients(lambda: x[0] ** 2 * x[1], [x])
            >>> (H @ torch.tensor([1.0, 0.0], dtype=torch.float64)).round(decimals=9)
            tensor([4., 2.], dtype=torch.float64)
            >>> H.noise < 1e-9
            True
        """
        differences = GradientDifferences(closure, params, batches, process_group, order, step, seed)
        return cls._of(differences, differences.like)

    @property
    def step(self) -> float | None:
        """Of `from_gradients`, the length δ of its displacements; None for others."""
        return self._source.step if isinstance(self._source, GradientDifferences) else None


class GaussNewtonOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix Jᵀ ∇²ℓ J of loss = ℓ(z(params)), J = dz/dparams: the Hessian without the
    curvature of the network; positive semidefinite for a convex ℓ (Schraudolph, Neural Computation 14, 2002).

    Exact: three backward passes through recorded graphs per product, in C++.

    Args:
        loss: 0-d tensor computed from ``outputs``, which must be all through which it depends on ``params``.
        outputs: z, such as the logits; any shape.
        params: as in `HessianOperator`.

    Raises:
        TypeError, ValueError: as `HessianOperator`; the graph of the loss reaches params beside outputs, as with a
            penalty on the parameters. RuntimeError: as there.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> outputs = x[:1] * x[1:]
        >>> GaussNewtonOperator((outputs**2).sum() / 2, outputs, [x]).to_dense()
        tensor([[4., 2.],
                [2., 1.]])
    """

    def __init__(self, loss: Tensor, outputs: Tensor, params: Parameters) -> None:
        checked = check_params(params)
        _warn_of_one_process(stacklevel=2)
        op, pullback = _gauss_newton(checked, check_loss(loss), outputs)
        if op is None:
            raise ValueError("outputs: expected a tensor that depends on params, got one that depends on none")
        warn_of_unreached(checked, [g is not None for g in pullback], stacklevel=2)
        warn_of_custom_functions(loss, stacklevel=2)
        super().__init__(_Recorded(op, [loss], checked), checked[0])

    @classmethod
    def from_batches(
        cls,
        closure: Callable[[Any], tuple[Tensor, Tensor, Tensor | float]],
        params: Parameters,
        batches: Iterable[Any],
        *,
        process_group: ProcessGroup | None = None,
    ) -> GaussNewtonOperator:
        """The Gauss-Newton matrix of Σ loss_sum / Σ weight_sum over batches, exactly.

        Args:
            closure: batch -> (loss_sum, outputs, weight_sum): as in `HessianOperator.from_batches`, with the outputs
                from which this loss_sum is computed.
            params, batches, process_group: as there, and so are the errors.
        """
        parts = ("loss_sum", "outputs")
        sums = BatchSums(_gauss_newton, parts, closure, params, batches, process_group)
        return cls._of(sums, sums.like)


def _flat(params: Params) -> _C.FlatParameters:
    return _C.FlatParameters(params, params.labels)


def _hessian(params: Params, loss: Tensor) -> Recording:
    gradients = _record_gradients(loss, params)
    return (None if _all_none(gradients) else _C.GraphOperator(gradients, _flat(params))), gradients


def _gauss_newton(params: Params, loss: Tensor, outputs: Tensor) -> Recording:
    if not check_tensor("outputs", outputs).requires_grad:
        raise ValueError("outputs: expected a tensor with its graph, got one that does not require grad")
    (gradient,) = _record_gradients(loss, [outputs])
    if gradient is None:
        raise ValueError("loss: expected one that depends on outputs, got one that does not")
    _check_passes_through(outputs, params, loss)
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pullback = _record_gradients(outputs, params, dummy)
    op = None if _all_none(pullback) else _C.GaussNewtonOperator(outputs, gradient, dummy, pullback, _flat(params))
    return op, pullback


def _record_loss(loss: Tensor | Callable[[], Tensor], params: Params, called: str) -> tuple[Tensor | None, ...]:
    """The recorded gradients of what an operator is made from; ``called``: the name of params in an error."""
    value, calls = _evaluate(loss, params)
    gradients = _record_gradients(value, params)
    if _all_none(gradients):
        raise ValueError(f"loss: expected one that depends on {called}, got one that depends on none")
    reached = [g is not None for g in gradients]
    check_reached(params, reached, calls.cut)
    warn_of_unreached(params, reached, stacklevel=3)
    warn_of_custom_functions(value, stacklevel=3)
    return gradients


def _check_passes_through(outputs: Tensor, params: Params, loss: Tensor) -> None:
    """Walks the graph of the loss as far as outputs: a gradient may pass by them that is 0 at this very point."""
    labels = {_edge(p): label for p, label in zip(params, params.labels, strict=True)}
    seen, waiting = {_edge(outputs)}, [_edge(loss)]
    while waiting:
        edge = waiting.pop()
        if edge[0] is None or edge in seen:
            continue
        if edge in labels:
            raise ValueError(
                "loss: expected one that depends on params through outputs alone, got one that reaches"
                f" {labels[edge]} beside them: leave penalties on params out, or add their Hessian to the products"
            )
        seen.add(edge)
        waiting.extend(edge[0].next_functions)


def _edge(of: Tensor) -> tuple[Any, int]:
    """The node of a graph that a tensor comes from, and which of its outputs it is."""
    edge = get_gradient_edge(of)
    return edge.node, edge.output_nr


def _record_gradients(of: Tensor, params: Sequence[Tensor], seed: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """A first backward pass, recorded so that it can be differentiated again."""
    custom_functions(of)
    with torch.enable_grad(), double_backward(), buffers_kept(params):
        gradients = torch.autograd.grad(of, list(params), seed, create_graph=True, allow_unused=True)
    for p, gradient in zip(params, gradients, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(
                f"params: expected dense gradients, got a {gradient.layout} one for the tensor of shape"
                f" {tuple(p.shape)}: build nn.Embedding with sparse=False"
            )
    return gradients


def _all_none(gradients: Iterable[Tensor | None]) -> bool:
    return all(g is None for g in gradients)


def _evaluate(loss: Tensor | Callable[[], Tensor], params: Params) -> tuple[Tensor, Calls]:
    if isinstance(loss, Tensor):
        _warn_of_one_process(stacklevel=4)
        return check_loss(loss), Calls()
    if not callable(loss):
        raise TypeError(f"loss: expected a 0-d torch.Tensor or a closure returning one, got {type(loss).__name__}")

    def evaluate() -> Tensor:
        with double_backward():  # once more, as the first evaluation may be what imports the compiler
            return loss()

    return repeatable(evaluate, check_loss, params[0].device, params)


def _warn_of_one_process(stacklevel: int) -> None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warnings.warn(
            "loss: the curvature is that of this process's data only; HessianOperator.from_batches with process_group"
            " gives that of all processes'",
            stacklevel=stacklevel + 1,
        )
