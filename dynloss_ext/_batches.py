"""Losses that come from closures: what they must be, and exact sums of products over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dynloss_ext import _C

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


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


def repeatable(evaluate: Callable[[], T], loss_of: Callable[[T], Tensor]) -> T:
    """What the second of two calls gives, if both give the same loss; the random state stays as it was.

    Raises:
        ValueError: The two losses differ.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        first = float(loss_of(evaluate()).detach())
        answer = evaluate()
    second = loss_of(answer)
    value = float(second.detach())
    # Not bit for bit: a deterministic function may be summed in another order.
    if abs(first - value) > 1e3 * torch.finfo(second.dtype).eps * max(abs(first), abs(value)):
        raise ValueError(
            f"loss must return the same value for the same parameters, got {first!r} and then {value!r}: "
            "switch dropout and other randomness off"
        )
    return answer


def uses_batch_statistics(loss: Tensor) -> bool:
    """Whether a BatchNorm in train mode is in the graph of the loss."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", False):
            return True
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return False


class BatchSums:
    """Hessian-vector products of Σ loss_sum / Σ weight_sum over batches and the processes of a group."""

    def __init__(
        self,
        closure: Callable[[Any], tuple[Tensor, Tensor | float]],
        params: Sequence[Tensor],
        batches: Iterable[Any],
        process_group: ProcessGroup | None,
    ) -> None:
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be iterable more than once, such as a list or a DataLoader; got {type(batches).__name__}"
            )
        self._closure, self._params, self._batches, self._group = closure, list(params), batches, process_group
        self._snapshot = self._versions()
        weight, count, statistics = self._reduce(self._survey, params[0].new_zeros(3, dtype=torch.float64)).tolist()
        if count == 0:
            raise ValueError("batches must hold at least one batch, got none")
        if statistics and count > 1:
            raise ValueError(
                f"closure uses BatchNorm in train mode on {count:.0f} batches, where the loss of all samples is not"
                " a sum over batches: put the model in eval mode, or pass one batch"
            )
        if not weight > 0:
            raise ValueError(f"the weight_sums of all batches must add up to more than 0, got {weight}")
        self._weight = weight

    def product(self, v: Tensor) -> Tensor:
        """H v; the one method that the driver calls."""
        if self._versions() != self._snapshot:
            raise RuntimeError(
                "a parameter was changed in place after this operator was made; its products would mix two states."
                " Build a new operator."
            )
        total: Tensor = self._reduce(lambda: self._local_product(v), v) / self._weight
        return total

    def _local_product(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for batch in self._batches:
            with torch.enable_grad():
                loss, _ = self._evaluate(batch)
                gradients = torch.autograd.grad(loss, self._params, create_graph=True, allow_unused=True)
            total += _C.GraphOperator(gradients, self._params).apply(v)
        return total

    def _survey(self) -> Tensor:
        """Sum of the weights, number of batches, and whether one uses batch statistics."""
        weight, count, statistics = 0.0, 0, False
        for batch in self._batches:
            if count == 0:
                loss, batch_weight = repeatable(partial(self._evaluate, batch), itemgetter(0))
                statistics = uses_batch_statistics(loss)
            else:
                with torch.enable_grad():
                    _, batch_weight = self._evaluate(batch)
            weight += batch_weight
            count += 1
        return self._params[0].new_tensor([weight, count, statistics], dtype=torch.float64)

    def _evaluate(self, batch: Any) -> tuple[Tensor, float]:
        answer = self._closure(batch)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise TypeError(f"closure must return (loss_sum, weight_sum), got {type(answer).__name__}")
        return check_loss(answer[0]), float(answer[1])

    def _reduce(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The sum over the group, in one all-reduce that also carries how many processes failed."""
        if self._group is None:
            return compute()
        failure: BaseException | None = None
        try:
            local = compute()
        except BaseException as error:  # the others must hear of it before it goes on
            failure = error
            local = torch.zeros_like(like)
        message = torch.cat([local, local.new_tensor([0.0 if failure is None else 1.0])])
        torch.distributed.all_reduce(message, group=self._group)
        if failure is not None:
            raise failure
        if message[-1] > 0:
            raise RuntimeError(f"{int(message[-1])} other process(es) of the group failed in this operator's closure")
        return message[:-1]

    def _versions(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self._params]
