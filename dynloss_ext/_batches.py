"""Sums of products over batches and processes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from dynloss_ext import _C
from dynloss_ext._checks import Parameters, Params, check_callable, check_loss, check_params
from dynloss_ext._double_backward import double_backward, warn_of_custom_functions
from dynloss_ext._evaluation import (
    buffers_kept,
    check_reached,
    random_state_kept,
    relative_rounding,
    repeatable,
    suspects,
    uses_batch_statistics,
    warn_of_unreached,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The operator of one batch, None where that does not depend on params, and what recording gave for each of params: None
# where it does not reach it.
Recording = tuple["_C.SymmetricOperator | None", tuple["Tensor | None", ...]]

CHUNK = 2**20  # elements hashed at once: the memory that a fingerprint takes


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Digits d of a 64-bit hash of shapes, dtypes and values, and d²: (26,) float64, small integers.

    Summed over n processes, n Σd² = (Σd)² holds for every digit only if all have the same; see `all_alike`.
    """
    total = _hash(repr([(tuple(t.shape), t.dtype) for t in tensors]), tensors[0].device)
    for t in tensors:
        for chunk in torch.split(t.detach().reshape(-1), CHUNK):
            total = total * 6364136223846793005 + _C.fingerprints([chunk + 0.0])[0]  # -0 counts as 0
    return _digits(total)


def fingerprint_of(text: str, device: torch.device) -> Tensor:
    """The same of a text."""
    return _digits(_hash(text, device))


def _hash(text: str, device: torch.device) -> Tensor:
    return torch.tensor(zlib.crc32(text.encode()), dtype=torch.int64, device=device)


def _digits(total: Tensor) -> Tensor:
    digits = (total >> torch.arange(0, 64, 5, device=total.device)) & 31
    return torch.cat([digits, digits**2]).double()


def all_alike(sums: Sequence[float], processes: int) -> bool:
    """Whether all processes had the same fingerprint, given the sum of them."""
    half = len(sums) // 2
    return all(processes * squares == digits**2 for digits, squares in zip(sums[:half], sums[half:], strict=True))


class BatchSums:
    """Products with Σ (matrix of a batch) / Σ weight_sum, over batches and the processes of a group.

    Args:
        record: (params, *parts) -> the recording of one batch.
        parts: the names of what the closure returns before weight_sum; the first is the loss_sum.
        closure, params, batches, process_group: see `HessianOperator.from_batches`.
    """

    def __init__(
        self,
        record: Callable[..., Recording],
        parts: tuple[str, ...],
        closure: Callable[[Any], tuple[Any, ...]],
        params: Parameters,
        batches: Iterable[Any],
        process_group: ProcessGroup | None,
    ) -> None:
        check_process_group(process_group)
        self._record, self._parts, self._closure = record, parts, closure
        self._batches, self._group = batches, process_group
        self._processes = 1 if process_group is None else distributed.get_world_size(process_group)
        given = listed(params)
        self._device = message_device(given, process_group)
        self._params = Params([], [])
        self._reached: list[bool] = []
        self._suspects: list[str] = []
        self._passes = 0
        self._expected = self._margin = torch.empty(0)
        self._tolerance = 0.0
        _, (weight, count, statistics, dependent, *alike) = self._reduce(partial(self._survey, given), 30)
        if not all_alike(alike, self._processes):
            raise ValueError(
                "params: expected the same in all processes of process_group, got different shapes or values"
            )
        check_sums(count, bool(statistics), weight)
        if not dependent:
            raise ValueError(f"{parts[-1]}: expected a tensor that depends on params, got none in any batch")
        if self._group is None:  # another process's batches may reach the others
            warn_of_unreached(self._params, self._reached, stacklevel=3)
        self._weight = weight
        self.params = self._params
        self.size = sum(p.numel() for p in self._params)
        self.like = torch.empty(0, dtype=self._params[0].dtype, device=self._device)

    def operator(self) -> _C.SymmetricOperator:
        """What the driver calls. Not kept: the garbage collector does not see through it to what the closure holds."""
        return _C.PythonOperator(self._product, self.size, self.like, partial(self._product, noisily=True))

    def _product(self, v: Tensor, noisily: bool = False) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        total, (changed, *alike) = self._reduce_product(partial(self._pass, v, sums, noisily))
        if not all_alike(alike, self._processes):
            raise RuntimeError(
                "v: expected the same in all processes of process_group, got different values: they make different"
                " calls, or their devices do not round alike"
            )
        if changed:
            where = "" if self._group is None else f" in {changed:.0f} of {self._processes} processes"
            if self._changed(sums):
                (loss, weight), (now_loss, now_weight) = self._expected.tolist(), sums[:2].tolist()
                where += (
                    f"; loss_sums and weight_sums added up to {loss!r} and {weight!r} when this operator was made, and"
                    f" to {now_loss!r} and {now_weight!r} now"
                )
            raise ValueError(
                f"closure: expected the same losses in every pass over batches, got others{where}: switch off dropout,"
                " random augmentation, and shuffling with drop_last; autocast must be as it was"
            )
        return total / self._weight

    def fail(self, error: Exception) -> None:
        """Raises what kept this process from asking for a product; the others, which wait for it, are told."""

        def refuse() -> Tensor:
            raise error

        self._reduce_product(refuse)

    def suspects(self) -> list[str]:
        """Of the first batch."""
        return self._suspects

    def products(self) -> AbstractContextManager[object]:
        """Each evaluation sees to its buffers by itself."""
        return double_backward()

    def _reduce_product(self, compute: Callable[[], Tensor]) -> tuple[Tensor, list[float]]:
        return self._reduce(compute, self.size + 27, keep=self.size, dtype=self.like.dtype)

    def _changed(self, sums: Tensor) -> Tensor:
        """Whether this process's losses or weights add up to something else than when the operator was made: 0-d."""
        now, before = sums[:2], self._expected
        same = ((now - before).abs() <= self._margin) | (now == before) | (now.isnan() & before.isnan())
        return ~same.all()

    def _pass(self, v: Tensor, sums: Tensor, noisily: bool) -> Tensor:
        """This process's sum of products, whether its losses changed, and the fingerprint of v."""
        self._snapshot.check_values()
        total = torch.zeros_like(v)
        with self._pass_state():
            for batch in self._batches:
                self._add_product(batch, v, total, sums, noisily)
        return torch.cat([total, self._changed(sums).to(total).view(1), self._fingerprint([v]).to(total)])

    def _add_product(self, batch: Any, v: Tensor, total: Tensor, sums: Tensor, noisily: bool) -> None:
        # A function of its own: what it leaves behind must be free before the next batch's graph is built.
        with torch.enable_grad(), buffers_kept(self._params):
            graph, weight = self._evaluate(batch)
            tally(sums, graph[0], weight)
            operator, _ = self._record(self._params, *graph)
            if operator is not None:
                total += operator.apply_noisily(v) if noisily else operator.apply(v)

    def _survey(self, params: Any) -> Tensor:
        """This process's weight, number of batches, whether one couples its samples, whether one depends on params,
        and the fingerprint of params."""
        if isinstance(params, BaseException):
            raise params
        check_callable("closure", self._closure)
        check_batches(self._batches)
        self._params = check_params(params)
        self._reached = [False] * len(self._params)
        self._cut: dict[int, str] = {}
        self._snapshot = _C.FlatParameters(self._params, self._params.labels)
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        count, statistics = 0, False
        with self._pass_state():
            for batch in self._batches:
                coupled = self._inspect(batch, sums, twice=count == 0)
                count, statistics = count + 1, statistics or coupled
        # One that a batch leaves out, and another reaches, has no part in that batch's loss.
        check_reached(self._params, self._reached, self._cut)
        _, weight, magnitude = sums
        self._expected = sums[:2]
        self._margin = (self._tolerance * torch.stack([magnitude, weight.abs()])).nan_to_num(0.0, 0.0)
        found = sums.new_tensor([count, statistics, any(self._reached)])
        return torch.cat([weight.view(1), found, self._fingerprint(self._params)])

    def _inspect(self, batch: Any, sums: Tensor, twice: bool) -> bool:
        """Whether the batch couples its samples; notes which params it reaches."""
        with torch.enable_grad(), buffers_kept(self._params) as calls:
            evaluate = partial(self._evaluate, batch)
            if twice:
                (graph, weight), _ = repeatable(evaluate, lambda answer: answer[0][0], self._device, self._params)
            else:
                graph, weight = evaluate()
            tally(sums, graph[0], weight)
            self._tolerance = max(self._tolerance, relative_rounding(graph[0].dtype))
            if twice:
                self._suspects = suspects(graph[:1])
                warn_of_custom_functions(graph[0], stacklevel=5)
            self._cut |= calls.cut
            if calls.lost or not all(self._reached):
                _, gradients = self._record(self._params, *graph)
                reached = [g is not None for g in gradients]
                check_reached(self._params, reached, calls.lost)
                self._reached = [a or b for a, b in zip(self._reached, reached, strict=True)]
            return calls.batch_statistics or uses_batch_statistics(graph[0])

    def _pass_state(self) -> AbstractContextManager[None]:
        """Another random state for every pass over the batches: what is random shows by its losses."""
        self._passes += 1
        return random_state_kept(self._device, seed=self._passes)

    def _evaluate(self, batch: Any) -> tuple[list[Tensor], Tensor | float]:
        """What the closure returns: parts of the graph, and the weight, a tensor where the closure gives one."""
        with double_backward():
            answer = self._closure(batch)
        loss, *others, weight = check_answer(answer, (*self._parts, "weight_sum"))
        return [check_loss(loss, self._parts[0]), *others], weight_of(weight, self._device)

    def _fingerprint(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].new_empty(0) if self._group is None else fingerprint(tensors)

    def _reduce(
        self, compute: Callable[[], Tensor], length: int, keep: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, list[float]]:
        groups = () if self._group is None else (self._group,)
        return reduce_over(groups, self._device, compute, length, keep, dtype)


def reduce_over(
    groups: Sequence[ProcessGroup],
    device: torch.device,
    compute: Callable[[], Tensor],
    length: int,
    keep: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, list[float]]:
    """The sum over the processes, in one all-reduce a group that also carries how many of them failed.

    Args:
        groups: over one after the other; none: of this process alone.
        length: of what compute gives, for a process where it fails. It may give one number more, with room for how
            many fail: then nothing is copied.
        keep: how many elements of the sum stay on the device; the rest comes as a list.
    """
    if not groups:
        message = compute()
        return message[:keep], message[keep:length].tolist()
    failure: BaseException | None = None
    try:
        message = compute()
    except BaseException as error:  # the others must hear of it before it goes on
        failure = error
        message = torch.zeros(length, dtype=dtype, device=device)
    if len(message) == length:
        message = torch.cat([message, message.new_empty(1)])
    message[length] = failure is not None
    for group in groups:
        distributed.all_reduce(message, group=group)
    if failure is not None:
        raise failure
    *tail, failed = message[keep:].tolist()
    if failed:
        raise RuntimeError(
            f"processes: expected none to fail in this call, got {failed:.0f} other(s) that did, whose own errors say"
            " why"
        )
    return message[:keep], tail


def check_process_group(group: object) -> None:
    if group is not None and not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def check_batches(batches: object) -> None:
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches: expected an iterable to be passed over more than once, such as a list or a DataLoader, got"
            f" {type(batches).__name__}"
        )


def check_answer(answer: object, expected: tuple[str, ...]) -> tuple[Any, ...]:
    """What a closure returned, if it is a tuple of what is expected."""
    if not isinstance(answer, tuple) or len(answer) != len(expected):
        got = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else type(answer).__name__
        raise TypeError(f"closure: expected to return ({', '.join(expected)}), got {got}")
    return answer


def weight_of(weight: Any, device: torch.device) -> Tensor | float:
    """The weight_sum of a closure as a number, or where it is a tensor as one that stays on its device."""
    if isinstance(weight, Tensor) and weight.numel() == 1 and not weight.is_complex():
        return weight.detach().to(device, torch.float64).view(())
    try:
        return float(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"closure: expected a number or a 0-d tensor as weight_sum, got {type(weight).__name__}"
        ) from error


def check_sums(count: float, statistics: bool, weight: float) -> None:
    """Refuses batches whose sum has no Hessian: their number, whether one couples its samples, their weight."""
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    if statistics and count > 1:
        raise ValueError(
            "closure: expected a loss of all samples that is a sum over batches, got BatchNorm in train mode on"
            f" {count:.0f} batches: put the model in eval mode, or pass one batch"
        )
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"weight_sum: expected a finite number in all batches together that is more than 0, got {weight}"
        )


def tally(sums: Tensor, loss: Tensor, weight: Tensor | float) -> None:
    """Adds to Σ loss_sum, Σ weight_sum and Σ |loss_sum|, without a word from the device."""
    value = loss.detach().to(sums)
    sums[0] += value
    sums[1] += weight
    sums[2] += value.abs()


def listed(params: Any) -> Any:
    """Params as a list, where they are an iterable; or what was raised on the way, to be raised where others hear."""
    if isinstance(params, Tensor | Mapping) or not isinstance(params, Iterable):
        return params
    try:
        return list(params)
    except BaseException as error:
        return error


def message_device(params: Any, group: ProcessGroup | None) -> torch.device:
    """That of the params, also of a process whose params are refused: the others wait for its message there."""
    for given in params if isinstance(params, list) else [params]:
        for p in given if isinstance(given, tuple) else (given,):
            if isinstance(p, Tensor):
                return p.device
    backends = "" if group is None else str(distributed.get_backend_config(group))
    return torch.device("cuda", torch.cuda.current_device()) if backends.startswith("cuda") else torch.device("cpu")
