"""Whole steps of a loop in one launch: CUDA graphs of training steps and of Hessian-vector products.

A step of a small network on a GPU takes as long as its launches, hundreds of them by Python. A CUDA graph replays
all of them at once. Where there are none, the same objects make plain calls and say why.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._checks import Params, check_callable, check_count, check_loss, check_params, check_tensor
from dynloss_ext._double_backward import double_backward
from dynloss_ext._evaluation import buffers_kept
from dynloss_ext._operators import CurvatureOperator
from dynloss_ext.hessian import HessianOperator

__all__ = ["CapturedHessian", "CapturedStep", "DeviceRecords"]

T = TypeVar("T")


class CapturedStep:
    """One step of a loop, replayed as a CUDA graph; where that is impossible, plain calls.

    ``run(n)`` makes exactly n steps, in whatever way: the first ``warmup`` of them are plain calls on a side stream,
    which make what is made once (an optimizer's state, cuDNN's plans), and the last of these is watched for what waits
    for the device. Then one call is recorded, which computes nothing, and every further step is a replay.

    A replay repeats what was launched, and no Python. So the step keeps all that changes in tensors that stay where
    they are: a step counter (`DynamicCrossEntropyLoss.step`, or ``counter.add_(1)``), the batch (``inputs.copy_(...)``
    between two runs), a learning rate that the optimizer reads on the device (``capturable=True``, or ``fused=True``
    with a tensor ``lr``), what is measured (`DeviceRecords`). Gradients are best dropped at its beginning
    (``zero_grad(set_to_none=True)``); between runs they belong to the graph that was captured last, if several steps
    share parameters. No graph of autograd that reaches the same parameters may be alive while it is
    recorded. Random numbers are those of plain calls if they come from torch's default generator.

    Args:
        step: a callable without arguments; what it returns is dropped.
        device: where it computes.
        warmup: plain steps before the recording, at least 1; 11 with DistributedDataParallel.
        capture: False: plain calls, for a comparison.
        pool: from `torch.cuda.graph_pool_handle`: memory that captured steps share of which one runs at a time.

    Attributes:
        fallback: why steps are plain calls, a phrase; None where they are, or will be, replayed.
        captured: whether the next step is a replay.

    Raises:
        TypeError, ValueError: naming the argument; by ``run``, also whatever a plain call raises.

    Example:
        >>> model, inputs = torch.nn.Linear(2, 3), torch.randn(8, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def step():
        ...     optimizer.zero_grad(set_to_none=True)
        ...     model(inputs).square().mean().backward()
        ...     optimizer.step()
        >>> steps = CapturedStep(step, inputs.device)
        >>> steps.run(100)
        >>> steps.fallback
        'there are no CUDA graphs on a cpu'
    """

    def __init__(
        self,
        step: Callable[[], object],
        device: torch.device | str,
        *,
        warmup: int = 3,
        capture: bool = True,
        pool: Any = None,
    ) -> None:
        self._step = check_callable("step", step)
        self._warmup = check_count("warmup", warmup, 1)
        self._pool = pool
        if not isinstance(device, (torch.device, str)):
            raise TypeError(f"device: expected a torch.device or its name, got {type(device).__name__}")
        self._device = torch.device(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.fallback = _obstacle(self._device, capture)

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self, n: int = 1) -> None:
        """Makes n steps, on the current stream."""
        left = check_count("n", n, 0)
        while left and self.fallback is None and self._graph is None:
            if self._warmup:
                self._warm_up()
                left -= 1
            else:
                self._capture()
        call = self._step if self._graph is None else self._graph.replay
        for _ in range(left):
            call()

    def _warm_up(self) -> None:
        stage = _Stage(self._device)
        if self._warmup > 1:
            stage.call(self._step)
        else:
            self.fallback = stage.watch(self._step)
        self._warmup -= 1

    def _capture(self) -> None:
        try:
            self._graph, _ = _Stage(self._device).capture(self._step, self._pool)
        except _CaptureError as error:
            self.fallback = str(error)

    def __repr__(self) -> str:
        state = self.fallback or ("captured" if self.captured else f"{self._warmup} plain steps to go")
        return f"{type(self).__name__}({state})"


class CapturedHessian(CurvatureOperator):
    """The Hessian of a loss that is computed again and again, with a CUDA graph for a product and one for the rest.

    A `HessianOperator` is of one state of the parameters, and a graph of its products would be, too. Here the forward
    pass and the recorded first backward pass are a graph of their own: ``refresh()`` replays it with whatever is in the
    parameters now, and products are then those of this state. For `eigsh` and `EigenTracker` it is like any operator:
    ``tracker.update(hessian.refresh())``. Where there are no graphs, ``refresh()`` makes what `HessianOperator` makes.

    Args:
        loss: a closure without arguments that returns the loss, 0-d, from tensors that stay where they are: the
            parameters, a batch, a step counter on the device. As in `HessianOperator` it must not be random.
        params: as in `HessianOperator`.
        capture: False: plain calls, for a comparison.

    Attributes:
        fallback: why products are plain calls, a phrase; None where they are replayed.
        gradients: of each parameter, of the last refresh (None where the loss does not depend on it). Replays write
            over them.
        num_refreshes: so far.

    Raises:
        As `HessianOperator`. Replays do not notice a parameter that has changed since the last refresh.

    Example:
        >>> w = torch.ones(3, requires_grad=True)
        >>> hessian = CapturedHessian(lambda: (w**3).sum(), [w])
        >>> with torch.no_grad():
        ...     _ = w.mul_(2)
        >>> hessian.refresh() @ torch.ones(3)
        tensor([12., 12., 12.])
    """

    gradients: tuple[Tensor | None, ...]

    def __init__(self, loss: Callable[[], Tensor], params: Iterable[Tensor], *, capture: bool = True) -> None:
        self._loss, self._params = check_callable("loss", loss), check_params(params)
        like = self._params[0]
        self.num_refreshes = 0
        self.fallback = _obstacle(like.device, capture)
        self._replay: Callable[[], None] | None = None
        first = partial(HessianOperator, self._loss, self._params)
        if self.fallback is not None:
            self._adopt(first())
        else:
            stage = _Stage(like.device)
            self._adopt(stage.call(first))
            try:
                self._capture(stage)
            except _CaptureError as error:
                self.fallback = str(error)
                self._adopt(self._record())
        super().__init__(self._source, like)

    def refresh(self) -> CapturedHessian:
        """Takes over the values that the parameters have now; returns itself."""
        if self._replay is None:
            self._adopt(self._record())
        else:
            self._replay()
        self.num_refreshes += 1
        return self

    def _adopt(self, hessian: HessianOperator) -> None:
        self._source, self.gradients = hessian._source, hessian.gradients

    def _record(self) -> HessianOperator:
        """Forward pass and recorded backward pass."""
        with torch.enable_grad(), buffers_kept(self._params), double_backward():
            loss = check_loss(self._loss())
        return HessianOperator(loss, self._params)

    def _capture(self, stage: _Stage) -> None:
        like = self._params[0]
        v = torch.zeros(self._source.size, dtype=like.dtype, device=like.device)

        def product(hessian: HessianOperator) -> Tensor:
            return hessian._op.apply(v)

        def both() -> None:
            product(self._record())

        stage.call(both)
        if (waits := stage.watch(both)) is not None:
            raise _CaptureError(waits)
        del self._source
        self.gradients = ()  # nothing may hold on to a graph of autograd from outside of the capture
        refresh, hessian = stage.capture(self._record)
        # In the same memory, where what the first has saved for the second stays as long as both.
        replay, out = stage.capture(partial(product, hessian), refresh.pool())
        self.gradients = tuple(None if g is None else g.detach() for g in hessian.gradients)
        self._source = _Replayed(v, replay.replay, out, self._params)
        self._replay = refresh.replay
        self._replay()


class DeviceRecords:
    """Rows of numbers that a step writes on its device, without a word to the host, and that are read many at a time.

    A ring of ``capacity`` rows: one more and the oldest is written over, which ``read`` notices. ``append`` may be part
    of a `CapturedStep`; ``read`` copies once, and waits for the device.

    Args:
        capacity: most rows between two readings.
        shape: of a row; () for a number.
        dtype, device: of the rows.

    Example:
        >>> records = DeviceRecords(100, (2,))
        >>> for step in range(3):
        ...     records.append(torch.tensor([step, step**2]))
        >>> records.read()
        tensor([[0., 0.],
                [1., 1.],
                [2., 4.]])
        >>> records.read().shape
        torch.Size([0, 2])
    """

    def __init__(
        self,
        capacity: int,
        shape: Sequence[int] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = check_count("capacity", capacity, 1)
        self.shape = torch.Size(shape)
        self._rows = torch.zeros(self.capacity, *self.shape, dtype=dtype, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)  # rows appended so far
        self._num_read = 0

    def append(self, row: Tensor) -> None:
        """Adds a row of ``shape``, in any dtype."""
        if check_tensor("row", row).shape != self.shape or row.device != self._rows.device:
            expected = f"shape {tuple(self.shape)} on {self._rows.device}"
            raise ValueError(f"row: expected {expected}, got {tuple(row.shape)} on {row.device}")
        self._rows.index_copy_(0, self._count % self.capacity, row.detach().to(self._rows.dtype).unsqueeze(0))
        self._count.add_(1)

    def read(self) -> Tensor:
        """The rows since the last reading, ``(n, *shape)`` on the CPU, the oldest first.

        Raises:
            RuntimeError: more than ``capacity`` rows were appended since then; the next reading starts after them.
        """
        # Numbers of two types as bytes, to travel in one copy.
        packed = torch.cat([self._rows.view(-1).view(torch.uint8), self._count.view(torch.uint8)]).cpu()
        start, stop = self._num_read, int(packed[-8:].clone().view(torch.int64))
        self._num_read = stop
        if stop - start > self.capacity:
            raise RuntimeError(
                f"DeviceRecords: expected at most {self.capacity} rows between two readings, got {stop - start}: read"
                " more often, or make room for more"
            )
        rows = packed[:-8].view(self._rows.dtype).view(self._rows.shape)
        return rows[torch.arange(start, stop) % self.capacity]


class _CaptureError(Exception):
    """Says why something cannot be captured."""


class _Replayed:
    """A matrix whose products a graph computes from one static vector into another."""

    def __init__(self, v: Tensor, replay: Callable[[], None], out: Tensor, params: Params) -> None:
        self._v, self._replay, self._out, self.params = v, replay, out, params
        self.size = v.numel()

    def operator(self) -> _C.SymmetricOperator:
        """What the driver calls."""
        return _C.PythonOperator(self._product, self.size, self._v, self._product)

    def fail(self, error: Exception) -> None:
        """Nobody else waits for a product that this process cannot ask for."""

    def suspects(self) -> list[str]:
        """The graph is not there any more."""
        return []

    def products(self) -> AbstractContextManager[object]:
        """No module runs."""
        return nullcontext()

    def _product(self, v: Tensor) -> Tensor:
        self._v.copy_(v)
        self._replay()
        return self._out.clone()


def _obstacle(device: torch.device, capture: bool) -> str | None:
    """Why there will be no graph, as far as is known beforehand."""
    if device.type != "cuda":
        return f"there are no CUDA graphs on a {device.type}"
    return None if capture else "capture=False was asked for"


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One for a device: backward passes run on the stream of their forward passes, and graphs that share memory were
    recorded on one."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class _Stage:
    """Where calls are rehearsed and captured: the side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = _side_stream(self.device.index)

    def call(self, work: Callable[[], T]) -> T:
        """A plain call there; the current stream waits for it."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            answer = work()
        current.wait_stream(self._stream)
        return answer

    def watch(self, work: Callable[[], object]) -> str | None:
        """A plain call; where it waits for the device, if it does. It is not stopped there, and so is a whole step."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(max(mode, 1))  # 1: warn; 2, error, may be the user's wish
            try:
                self.call(work)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [warning for warning in caught if "called a synchronizing CUDA operation" in str(warning.message)]
        for other in caught:
            if other not in waits and "Synchronization debug mode" not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if not waits:
            return None
        return f"it waits for the device, in {Path(waits[0].filename).name}, line {waits[0].lineno}"

    def capture(self, work: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
        """The graph of a call, and what the call returned, which a replay computes.

        Raises:
            _CaptureError: with the first cause; what was to be computed has not been.
        """
        gc.collect()  # cycles could hold graphs of autograd, or free a graph of CUDA in the middle
        graph = torch.cuda.CUDAGraph()
        outside = sys.exc_info()[1]
        try:
            # The outer block: torch's own leaves its stream current if the capture turns out to be invalid.
            with _gradients_kept(), torch.cuda.stream(self._stream), self._recording(graph, pool):
                answer = work()
        except BaseException as error:
            self._recover()
            if not isinstance(error, Exception):
                raise
            raise _CaptureError(f"it could not be captured: {_first_cause(error, outside)}") from error
        return graph, answer

    def _recording(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
        return torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")

    def _recover(self) -> None:
        """After a capture that failed torch's generator believes itself in one still; the end of another frees it."""
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError), torch.cuda.stream(self._stream), self._recording(graph):
            torch.zeros((), device=self.device)


@contextmanager
def _gradients_kept() -> Iterator[None]:
    """If the block fails, all leaves have the gradients that they had: a capture makes others, and computes none."""
    leaves = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.requires_grad and x.is_leaf]
    before = [leaf.grad for leaf in leaves]
    try:
        yield
    except BaseException:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient
        raise


def _first_cause(error: BaseException, outside: BaseException | None = None) -> str:
    """The first line of the error that led to the others, after the one that is being handled outside."""
    while error.__context__ is not None and error.__context__ is not outside:
        error = error.__context__
    return str(error).partition("\n")[0] or type(error).__name__
