"""Evaluations that leave no trace: random state and buffers are afterwards as they were."""

from __future__ import annotations

import inspect
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from dynloss_ext._checks import Params

T = TypeVar("T")


class _Turns:
    """One thread at a time; but while that one waits for others in Python's threading, as a closure for the threads it
    has work done by, one of these: the one waited for may be among them."""

    _PATIENCE = 0.02  # seconds between looks

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        self._within: _Turns | None = None

    def __enter__(self) -> None:
        looks = 0
        while not self._lock.acquire(timeout=self._PATIENCE):
            looks = looks + 1 if self._waits() else 0
            if looks == 2:
                self._within = self._within or _Turns()
                self._within.__enter__()
                return
        self._owner, self._depth = threading.get_ident(), self._depth + 1

    def __exit__(self, *_: object) -> None:
        if self._owner != threading.get_ident():
            assert self._within is not None
            self._within.__exit__()
            return
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
        self._lock.release()

    def _waits(self) -> bool:
        """Whether the thread whose turn it is waits for another one."""
        frame = None if self._owner is None else sys._current_frames().get(self._owner)
        return frame is not None and frame.f_code.co_filename == threading.__file__


_random_state = _Turns()


@contextmanager
def random_state_kept(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leaves torch's generators of the CPU and of `device` as they were; inside, they start from the seed, if any.

    One thread at a time, as `_Turns` has it: the generators are everybody's.
    """
    cuda = device.type == "cuda"
    with _random_state, torch.random.fork_rng(devices=[device] if cuda else [], device_type="cuda"):
        if seed is not None:  # not by torch.manual_seed, which seeds every device
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


class Calls:
    """What `buffers_kept` saw.

    Args:
        averaged: whether gradients may be averaged over processes, as by DistributedDataParallel.
    """

    def __init__(self, averaged: bool = False) -> None:
        self._averaged = averaged
        self.batch_statistics = False  # whether a BatchNorm module normalised by its batch
        self.outermost: list[nn.Module] = []  # what this thread called that no other module did
        # By a parameter's id, the module of it that ran without grad; and where it lost it to a reentrant checkpoint.
        self.cut: dict[int, str] = {}
        self.lost: dict[int, str] = {}

    def enter(self, module: nn.Module, outermost: bool) -> None:
        if not self._averaged and (
            isinstance(module, DistributedDataParallel)
            or (outermost and any(frame.f_code is DistributedDataParallel.forward.__code__ for frame in _frames()))
        ):
            raise ValueError(
                "closure: expected to call the plain module, got a call of DistributedDataParallel, which averages"
                " gradients over processes, but not their derivatives: call its .module, and for the Hessian of all"
                " processes' data give process_group to from_batches"
            )
        if _is_flatly_sharded(module):
            raise ValueError(
                "closure: expected plain modules, or those of fully_shard, got a call of FullyShardedDataParallel,"
                " whose parameters are pieces of flat ones, other pieces in every process"
            )
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            self.batch_statistics = True

    def leave(self, module: nn.Module, output: object) -> None:
        cut_off = isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad
        if cut_off or not torch.is_grad_enabled():
            names = {id(p): type(module).__name__ for p in module._parameters.values() if p is not None}
            self.cut |= names
            if not torch.is_grad_enabled() and _inside_a_function():
                self.lost |= names


def _is_flatly_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes long
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def _frames() -> Iterator[FrameType]:
    """What is running in this thread, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _inside_a_function() -> bool:
    """Whether the forward pass of an autograd.Function is running, such as that of a reentrant checkpoint."""
    for frame in _frames():
        names = frame.f_code.co_varnames
        if frame.f_code.co_name == "forward" and names and isinstance(frame.f_locals.get(names[0]), FunctionCtx):
            return True
    return False


def check_reached(params: Params, reached: Sequence[bool], cut: Mapping[int, str]) -> None:
    """Refuses a parameter that took part where autograd does not look, and so would count as zero rows."""
    for p, label, yes in zip(params, params.labels, reached, strict=True):
        if not yes and id(p) in cut:
            raise ValueError(
                f"{label}: expected a gradient, got none, though its {cut[id(p)]} ran: without grad, as under"
                " torch.no_grad() or checkpoint(use_reentrant=True); use use_reentrant=False, or leave the tensor"
                f" of shape {tuple(p.shape)} out of params"
            )


def warn_of_unreached(params: Params, reached: Sequence[bool], stacklevel: int) -> None:
    """Warns of parameters that count as zero rows; a graph that was lost looks like one that never was."""
    lost = [
        f"{label} {tuple(p.shape)}" for p, label, yes in zip(params, params.labels, reached, strict=True) if not yes
    ]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        warnings.warn(
            f"no gradient of the loss reaches {', '.join(lost[:5])}{more}: rows and columns of zeros",
            stacklevel=stacklevel + 1,
        )


class _OfOurHooks:
    """In the place of a pattern in Python's filters: torch's warning that hooks of all modules, as `buffers_kept` has
    them, run twice for a compiled module, wherever this thread is inside that."""

    def __init__(self) -> None:
        self.here = threading.local()

    def match(self, text: str) -> bool:
        return getattr(self.here, "inside", False) and "when there are global hooks" in text


_of_our_hooks = _OfOurHooks()
_no_warning: Any = ("ignore", _of_our_hooks, UserWarning, None, 0)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warning of our hooks; filters of all threads stay as they are, and so does what was shown once."""
    filters: Any = warnings.filters
    if filters[:1] != [_no_warning]:
        if _no_warning in filters:
            filters.remove(_no_warning)
        filters.insert(0, _no_warning)
    outside, _of_our_hooks.here.inside = getattr(_of_our_hooks.here, "inside", False), True
    try:
        yield
    finally:
        _of_our_hooks.here.inside = outside


@contextmanager
def buffers_kept(params: Iterable[Tensor] = (), averaged: bool = False) -> Iterator[Calls]:
    """Puts the buffers of all modules that are called meanwhile back to what they were: by this thread, or by another
    one inside a module with one of params.

    A buffer that is written to has its values put back behind autograd's back, so that graphs recorded meanwhile stay
    valid; one that the module replaces is replaced again.

    Args:
        averaged: of `Calls`.
    """
    calls, own, ours = Calls(averaged), threading.get_ident(), {id(p) for p in params}
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    entered: dict[int, list[list[tuple[nn.Module, dict[str, Tensor | None]]]]] = {}  # of each thread, innermost last

    def enter(module: nn.Module, _: object) -> None:
        thread = threading.get_ident()
        inside = entered.setdefault(thread, [])
        if not inside and thread != own and not any(id(p) in ours for p in module.parameters()):
            return
        calls.enter(module, outermost=not inside)
        if not inside and thread == own:
            calls.outermost.append(module)
        # TorchScript calls its modules by itself.
        modules = module.modules() if isinstance(module, torch.jit.ScriptModule) else [module]
        inside.append([(m, dict(m._buffers.items())) for m in modules])
        for _, buffers in inside[-1]:
            for buffer in map(_plain, buffers.values()):
                if buffer is not None and id(buffer) not in saved:
                    with torch._C._DisableFuncTorch():
                        saved[id(buffer)] = buffer, _distinct(buffer).detach().clone()

    def leave(module: nn.Module, _: object, output: object) -> None:
        inside = entered.get(threading.get_ident())
        if not inside or inside[-1][0][0] is not module:
            return
        calls.leave(module, output)
        for m, buffers in inside.pop():
            for name, buffer in buffers.items():
                if m._buffers[name] is not buffer:
                    m._buffers[name] = buffer

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        with _unwarned():
            yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, values in saved.values():
            _distinct(buffer.data).copy_(values)


class BuffersOf:
    """The buffers of some modules as they are now, without hooks, which compiled code would be compiled anew for."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [(module, dict(module._buffers.items())) for module in modules]
        buffers = {id(b): b for _, own in self._modules for b in own.values() if b is not None}
        self._values = [(b, _distinct(b).detach().clone()) for b in buffers.values()]

    def put_back(self) -> None:
        """The values behind autograd's back, and buffers that were replaced."""
        for module, buffers in self._modules:
            for name, buffer in buffers.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        for buffer, values in self._values:
            _distinct(buffer.data).copy_(values)


def _distinct(buffer: Tensor) -> Tensor:
    """The part of an expanded buffer that has memory of its own."""
    for dim in range(buffer.dim()):
        if buffer.layout == torch.strided and buffer.stride(dim) == 0:
            buffer = buffer.narrow(dim, 0, min(1, buffer.shape[dim]))
    return buffer


def _plain(buffer: Tensor | None) -> Tensor | None:
    """The tensor itself inside torch.func's wrappers."""
    while buffer is not None and torch._C._functorch.is_functorch_wrapped_tensor(buffer):
        buffer = torch._C._functorch.get_unwrapped(buffer)
    return buffer


def relative_rounding(dtype: torch.dtype) -> float:
    """How far two evaluations of the same loss may differ: not bit for bit, as sums may take another order."""
    return min(1e3 * torch.finfo(dtype).eps, 0.03)


def repeatable(
    evaluate: Callable[[], T], loss_of: Callable[[T], Tensor], device: torch.device, params: Sequence[Tensor]
) -> tuple[T, Calls]:
    """What the second of two calls gives, if both give the same loss, and the modules that it called; random state and
    buffers stay as they were.

    Raises:
        ValueError: The two losses differ.
    """
    with random_state_kept(device), torch.enable_grad():
        with buffers_kept(params):
            first = float(loss_of(evaluate()).detach())
        with buffers_kept(params) as calls:
            answer = evaluate()
    loss = loss_of(answer)
    second = float(loss.detach())
    both_nan = math.isnan(first) and math.isnan(second)
    if not both_nan and not math.isclose(first, second, rel_tol=relative_rounding(loss.dtype)):
        raise ValueError(
            f"loss: expected the same value for the same parameters, got {first!r} and then {second!r}: switch dropout"
            " and other randomness off"
        )
    return answer, calls


def graph_nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """The nodes of the graphs of tensors."""
    seen, waiting = set(), [None if t is None else t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(next_node for next_node, _ in node.next_functions)


def uses_batch_statistics(loss: Tensor) -> bool:
    """Whether the graph of the loss normalises by statistics of a batch of more than one sample."""
    for node in graph_nodes([loss]):
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", False):
            # InstanceNorm has such a node too: every channel of every sample is a channel of its one sample.
            metadata: Any = node._input_metadata
            if metadata[0].shape[0] > 1:
                return True
    return False


def suspects(tensors: Iterable[Tensor | None]) -> list[str]:
    """The names of the nodes of some graphs whose second derivative may be wrong: by torch those of `weight_norm` and
    ``Embedding(scale_grad_by_freq=True)``, by whoever wrote them those of autograd Functions in Python."""
    return sorted(
        {
            node.name()
            for node in graph_nodes(tensors)
            if isinstance(node, torch.autograd.function.BackwardCFunction)
            or node.name().startswith("WeightNormInterfaceBackward")
            or getattr(node, "_saved_scale_grad_by_freq", False)
        }
    )
