"""What params and losses must be, evaluations that leave no trace, and sums of products over batches and processes."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dynloss_ext import _C

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def check_params(params: Iterable[Tensor], name: str = "params") -> list[Tensor]:
    """The parameters as a list, or an error that says what is wrong with which."""
    if isinstance(params, Tensor):
        raise TypeError(f"{name} must be an iterable of tensors, got one tensor: pass [tensor]")
    if not isinstance(params, Iterable):
        raise TypeError(f"{name} must be an iterable of tensors, got {type(params).__name__}")
    checked = list(params)
    if not checked:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    for i, p in enumerate(checked):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(p).__name__}")
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}[{i}] must be float32 or float64, got {p.dtype}")
        if p.dtype != checked[0].dtype or p.device != checked[0].device:
            raise ValueError(
                f"{name} must share one dtype and device: {name}[0] is {checked[0].dtype} on {checked[0].device}, "
                f"{name}[{i}] is {p.dtype} on {p.device}"
            )
        if not p.requires_grad:
            raise ValueError(f"{name}[{i}] of shape {tuple(p.shape)} does not require grad")
        if p._backward_hooks:
            raise ValueError(
                f"{name}[{i}] of shape {tuple(p.shape)} has a hook (Tensor.register_hook), which every backward pass of"
                " a product would call: remove it for as long as the operator is used"
            )
    if len({id(p) for p in checked}) < len(checked):
        raise ValueError(f"{name} holds the same tensor twice")
    if sum(p.numel() for p in checked) == 0:
        raise ValueError(f"{name} hold no element at all")
    return checked


def check_loss(loss: object, name: str = "loss") -> Tensor:
    """The loss itself, or an error that says why it has no Hessian here."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must be a 0-d torch.Tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"{name} must be a 0-d tensor, got shape {tuple(loss.shape)}: reduce it first")
    if not loss.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating-point tensor, got {loss.dtype}")
    if loss.is_inference():
        raise ValueError(f"{name} has no graph: it was computed in torch.inference_mode(), which records none")
    if not loss.requires_grad:
        raise ValueError(f"{name} has no graph: it was computed without grad, or depends on no parameter")
    return loss


_random_state = threading.RLock()


@contextmanager
def random_state_kept(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leaves torch's generators of the CPU and of `device` as they were; inside, they start from the seed, if any.

    One thread at a time: the generators are everybody's.
    """
    cuda = device.type == "cuda"
    with _random_state, torch.random.fork_rng(devices=[device] if cuda else [], device_type="cuda"):
        if seed is not None:  # not by torch.manual_seed, which seeds every device
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


class Calls:
    """What `buffers_kept` saw."""

    def __init__(self) -> None:
        self.batch_statistics = False  # whether a BatchNorm module normalised by its batch


@contextmanager
def buffers_kept() -> Iterator[Calls]:
    """Puts the buffers of all modules that this thread calls in training mode back to what they were.

    A buffer that is written to has its values put back behind autograd's back, so that graphs recorded meanwhile stay
    valid; one that the module replaces is replaced again.
    """
    calls, thread = Calls(), threading.get_ident()
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    entered: dict[nn.Module, dict[str, Tensor | None]] = {}

    def enter(module: nn.Module, _: object) -> None:
        if threading.get_ident() != thread:
            return
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            calls.batch_statistics = True
        if module.training and module._buffers:
            entered[module] = dict(module._buffers)
            for buffer in map(_plain, module._buffers.values()):
                if buffer is not None and id(buffer) not in saved:
                    with torch._C._DisableFuncTorch():
                        saved[id(buffer)] = buffer, buffer.detach().clone()

    def leave(module: nn.Module, *_: object) -> None:
        if threading.get_ident() == thread and module in entered:
            module._buffers.update(entered.pop(module))

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, values in saved.values():
            buffer.data.copy_(values)


def _plain(buffer: Tensor | None) -> Tensor | None:
    """The tensor itself inside torch.func's wrappers."""
    while buffer is not None and torch._C._functorch.is_functorch_wrapped_tensor(buffer):
        buffer = torch._C._functorch.get_unwrapped(buffer)
    return buffer


def relative_rounding(dtype: torch.dtype) -> float:
    """How far two evaluations of the same loss may differ: not bit for bit, as sums may take another order."""
    return min(1e3 * torch.finfo(dtype).eps, 0.03)


def repeatable(evaluate: Callable[[], T], loss_of: Callable[[T], Tensor], device: torch.device) -> T:
    """What the second of two calls gives, if both give the same loss; random state and buffers stay as they were.

    Raises:
        ValueError: The two losses differ.
    """
    with random_state_kept(device), torch.enable_grad():
        with buffers_kept():
            first = float(loss_of(evaluate()).detach())
        with buffers_kept():
            answer = evaluate()
    loss = loss_of(answer)
    second = float(loss.detach())
    both_nan = math.isnan(first) and math.isnan(second)
    if not both_nan and not math.isclose(first, second, rel_tol=relative_rounding(loss.dtype)):
        raise ValueError(
            f"loss must return the same value for the same parameters, got {first!r} and then {second!r}: "
            "switch dropout and other randomness off"
        )
    return answer


def uses_batch_statistics(loss: Tensor) -> bool:
    """Whether the graph of the loss normalises by statistics of a batch of more than one sample."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", False):
            # InstanceNorm has such a node too: every channel of every sample is a channel of its one sample.
            metadata: Any = node._input_metadata
            if metadata[0].shape[0] > 1:
                return True
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return False


CHUNK = 2**20  # elements hashed at once: the memory that a fingerprint takes


@cache
def _multipliers(device: torch.device) -> Tensor:
    """(CHUNK,) random int64, the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.empty(CHUNK, dtype=torch.int64, device="cpu").random_(generator=generator).to(device)


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Digits d of a 64-bit hash of shapes, dtypes and values, and d²: (26,) float64, small integers.

    Summed over n processes, n Σd² = (Σd)² holds for every digit only if all have the same; see `all_alike`.
    """
    shapes = repr([(tuple(t.shape), t.dtype) for t in tensors]).encode()
    device = tensors[0].device
    total = torch.tensor(zlib.crc32(shapes), dtype=torch.int64, device=device)
    for t in tensors:
        for chunk in torch.split(t.detach().reshape(-1), CHUNK):
            bits = (chunk + 0.0).view(torch.int64 if t.dtype == torch.float64 else torch.int32)  # -0 counts as 0
            total = total * 6364136223846793005 + (bits * _multipliers(device)[: len(bits)]).sum()
    digits = (total >> torch.arange(0, 64, 5, device=device)) & 31
    return torch.cat([digits, digits**2]).double()


def all_alike(sums: Sequence[float], processes: int) -> bool:
    """Whether all processes had the same fingerprint, given the sum of them."""
    half = len(sums) // 2
    return all(processes * squares == digits**2 for digits, squares in zip(sums[:half], sums[half:], strict=True))


class BatchSums:
    """Products with Σ (matrix of a batch) / Σ weight_sum, over batches and the processes of a group.

    Args:
        record: (params, *parts) -> the operator of one batch, or None where it does not depend on params.
        parts: the names of what the closure returns before weight_sum; the first is the loss_sum.
        closure, params, batches, process_group: see `HessianOperator.from_batches`.
    """

    def __init__(
        self,
        record: Callable[..., _C.SymmetricOperator | None],
        parts: tuple[str, ...],
        closure: Callable[[Any], tuple[Any, ...]],
        params: Iterable[Tensor],
        batches: Iterable[Any],
        process_group: ProcessGroup | None,
    ) -> None:
        if process_group is not None and not (
            distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)
        ):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}"
            )
        self._record, self._parts, self._closure = record, parts, closure
        self._batches, self._group = batches, process_group
        self._processes = 1 if process_group is None else distributed.get_world_size(process_group)
        given = _listed(params)
        self._device = _message_device(given, process_group)
        self._params: list[Tensor] = []
        self._passes = 0
        self._expected = self._margin = torch.empty(0)
        self._tolerance = 0.0
        _, (weight, count, statistics, dependent, *alike) = self._reduce(partial(self._survey, given), 30)
        if not all_alike(alike, self._processes):
            raise ValueError(
                "params must be the same in all processes of process_group, got different shapes or values"
            )
        if count == 0:
            raise ValueError("batches must hold at least one batch, got none")
        if statistics and count > 1:
            raise ValueError(
                f"closure uses BatchNorm in train mode on {count:.0f} batches, where the loss of all samples is not"
                " a sum over batches: put the model in eval mode, or pass one batch"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"the weight_sums of all batches must add up to a finite number that is more than 0, got {weight}"
            )
        if not dependent:
            raise ValueError(f"{parts[-1]} does not depend on any of params in any batch")
        self._weight = weight
        self.size = sum(p.numel() for p in self._params)
        self.like = torch.empty(0, dtype=self._params[0].dtype, device=self._device)

    def product(self, v: Tensor) -> Tensor:
        """The matrix times v; the one method that the driver calls."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        total, (changed, *alike) = self._reduce_product(partial(self._pass, v, sums))
        if not all_alike(alike, self._processes):
            raise RuntimeError(
                "v must be the same in all processes of process_group, got different values: they make different"
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
                f"every pass over batches must give the same losses, got others{where}: switch off dropout, random"
                " augmentation, and shuffling with drop_last; autocast must be as it was"
            )
        return total / self._weight

    def fail(self, error: Exception) -> None:
        """Raises what kept this process from asking for a product; the others, which wait for it, are told."""

        def refuse() -> Tensor:
            raise error

        self._reduce_product(refuse)

    def _reduce_product(self, compute: Callable[[], Tensor]) -> tuple[Tensor, list[float]]:
        return self._reduce(compute, self.size + 27, keep=self.size, dtype=self.like.dtype)

    def _changed(self, sums: Tensor) -> Tensor:
        """Whether this process's losses or weights add up to something else than when the operator was made: 0-d."""
        now, before = sums[:2], self._expected
        same = ((now - before).abs() <= self._margin) | (now == before) | (now.isnan() & before.isnan())
        return ~same.all()

    def _pass(self, v: Tensor, sums: Tensor) -> Tensor:
        """This process's sum of products, whether its losses changed, and the fingerprint of v."""
        if self._versions() != self._snapshot:
            raise RuntimeError(
                "a parameter was changed in place after this operator was made; its products would mix two states."
                " Build a new operator."
            )
        total = torch.zeros_like(v)
        with self._pass_state():
            for batch in self._batches:
                self._add_product(batch, v, total, sums)
        return torch.cat([total, self._changed(sums).to(total).view(1), self._fingerprint([v]).to(total)])

    def _add_product(self, batch: Any, v: Tensor, total: Tensor, sums: Tensor) -> None:
        # A function of its own: what it leaves behind must be free before the next batch's graph is built.
        with torch.enable_grad(), buffers_kept():
            graph, weight = self._evaluate(batch)
            _tally(sums, graph[0], weight)
            operator = self._record(self._params, *graph)
            if operator is not None:
                total += operator.apply(v)

    def _survey(self, params: Any) -> Tensor:
        """This process's weight, number of batches, whether one couples its samples, whether one depends on params,
        and the fingerprint of params."""
        if isinstance(params, BaseException):
            raise params
        if not callable(self._closure):
            raise TypeError(f"closure must be callable, got {type(self._closure).__name__}")
        if isinstance(self._batches, Iterator) or not isinstance(self._batches, Iterable):
            raise TypeError(
                "batches must be iterable more than once, such as a list or a DataLoader;"
                f" got {type(self._batches).__name__}"
            )
        self._params = check_params(params)
        self._snapshot = self._versions()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        count, statistics, dependent = 0, False, False
        with self._pass_state():
            for batch in self._batches:
                coupled, dependent = self._inspect(batch, sums, twice=count == 0, dependent=dependent)
                count, statistics = count + 1, statistics or coupled
        _, weight, magnitude = sums
        self._expected = sums[:2]
        self._margin = (self._tolerance * torch.stack([magnitude, weight.abs()])).nan_to_num(0.0, 0.0)
        found = sums.new_tensor([count, statistics, dependent])
        return torch.cat([weight.view(1), found, self._fingerprint(self._params)])

    def _inspect(self, batch: Any, sums: Tensor, twice: bool, dependent: bool) -> tuple[bool, bool]:
        """Whether the batch couples its samples, and whether it, or one before it, depends on params."""
        with torch.enable_grad(), buffers_kept() as calls:
            evaluate = partial(self._evaluate, batch)
            graph, weight = repeatable(evaluate, lambda answer: answer[0][0], self._device) if twice else evaluate()
            _tally(sums, graph[0], weight)
            self._tolerance = max(self._tolerance, relative_rounding(graph[0].dtype))
            coupled = calls.batch_statistics or uses_batch_statistics(graph[0])
            return coupled, dependent or self._record(self._params, *graph) is not None

    def _pass_state(self) -> AbstractContextManager[None]:
        """Another random state for every pass over the batches: what is random shows by its losses."""
        self._passes += 1
        return random_state_kept(self._device, seed=self._passes)

    def _evaluate(self, batch: Any) -> tuple[list[Tensor], Tensor | float]:
        """What the closure returns: parts of the graph, and the weight, a tensor where the closure gives one."""
        answer = self._closure(batch)
        expected = (*self._parts, "weight_sum")
        if not isinstance(answer, tuple) or len(answer) != len(expected):
            got = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else type(answer).__name__
            raise TypeError(f"closure must return ({', '.join(expected)}), got {got}")
        loss, *others, weight = answer
        if isinstance(weight, Tensor) and weight.numel() == 1 and not weight.is_complex():
            weight = weight.detach().to(self._device, torch.float64).view(())
        else:
            try:
                weight = float(weight)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"closure must return a number or a 0-d tensor as weight_sum, got {type(weight).__name__}"
                ) from error
        return [check_loss(loss, self._parts[0]), *others], weight

    def _fingerprint(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].new_empty(0) if self._group is None else fingerprint(tensors)

    def _reduce(
        self, compute: Callable[[], Tensor], length: int, keep: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, list[float]]:
        """The sum over the group, in one all-reduce that also carries how many processes failed.

        Args:
            length: of what compute gives, for a process where it fails.
            keep: how many elements of the sum stay on the device; the rest comes as a list.
        """
        if self._group is None:
            message = compute()
            return message[:keep], message[keep:].tolist()
        failure: BaseException | None = None
        try:
            message = compute()
        except BaseException as error:  # the others must hear of it before it goes on
            failure = error
            message = torch.zeros(length, dtype=dtype, device=self._device)
        message = torch.cat([message, message.new_tensor([0.0 if failure is None else 1.0])])
        distributed.all_reduce(message, group=self._group)
        if failure is not None:
            raise failure
        *tail, failed = message[keep:].tolist()
        if failed:
            raise RuntimeError(
                f"{failed:.0f} other process(es) of process_group failed in this call; their own errors say why"
            )
        return message[:keep], tail

    def _versions(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self._params]


def _tally(sums: Tensor, loss: Tensor, weight: Tensor | float) -> None:
    """Adds to Σ loss_sum, Σ weight_sum and Σ |loss_sum|, without a word from the device."""
    value = loss.detach().to(sums)
    sums[0] += value
    sums[1] += weight
    sums[2] += value.abs()


def _listed(params: Any) -> Any:
    """Params as a list, where they are an iterable; or what was raised on the way, to be raised where others hear."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params
    try:
        return list(params)
    except BaseException as error:
        return error


def _message_device(params: Any, group: ProcessGroup | None) -> torch.device:
    """That of the params, also of a process whose params are refused: the others wait for its message there."""
    for p in params if isinstance(params, list) else [params]:
        if isinstance(p, Tensor):
            return p.device
    backends = "" if group is None else str(distributed.get_backend_config(group))
    return torch.device("cuda", torch.cuda.current_device()) if backends.startswith("cuda") else torch.device("cpu")
