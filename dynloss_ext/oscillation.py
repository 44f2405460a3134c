"""The oscillating class weights Γ(step) of the dynamical loss."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dynloss_ext import _extension as _extension  # registers the ops
from dynloss_ext._checks import check_callable, check_choice, check_count, check_member, check_step, plain_number
from dynloss_ext._configuration import difference

__all__ = ["Oscillation"]

#: One number for all members of an ensemble, or one each.
Parameter: TypeAlias = "float | Tensor"

_WAVEFORMS = {"triangle": 0, "sine": 1, "square": 2}
_EXACT_IN_FLOAT64 = range(1 - 2**53, 2**53)


# Descriptions live on the CPU, also where another default device is set.
_float64 = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")


def _parameter(name: str, value: Any, minimum: float, maximum: float = 1e100) -> Tensor:
    """``value`` as a float64 tensor () or (E,), with its range checked: g and the turns must not overflow."""
    value = plain_number(value)
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"{name}: expected a constant, got a tensor that requires grad; Γ is not differentiable in it"
            )
        if value.dim() > 1 or value.numel() == 0 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected a number or a non-empty 1-D tensor of real numbers, one per member of an ensemble, "
                f"got shape {tuple(value.shape)} of {value.dtype}"
            )
        tensor = value.detach().to("cpu", torch.float64)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a 1-D tensor, got {type(value).__name__}")
    else:
        tensor = _float64(float(value) if abs(value) <= maximum else math.nan)
    if not bool(((tensor >= minimum) & (tensor <= maximum)).all()):
        raise ValueError(f"{name}: expected values from {minimum:g} to {maximum:g}, got {value}")
    return tensor


def _stops(stop_step: int | Sequence[int | None] | None, start: int) -> Tensor:
    """The step or steps as a float64 tensor () or (E,), infinite for None."""
    values: Any = stop_step
    values = values.tolist() if hasattr(values, "tolist") else values
    single = not isinstance(values, Iterable)
    steps = [values] if single else list(values)
    if not steps:
        raise ValueError("stop_step: expected a step or one per oscillation of an ensemble, got none")
    stops = [math.inf if step is None else check_step("stop_step", step, _EXACT_IN_FLOAT64) for step in steps]
    if min(stops) < start:
        raise ValueError(f"stop_step: expected a step >= start_step = {start}, got {min(stops)}")
    return _float64(stops[0] if single else stops)


def _to(device: torch.device, x: Tensor) -> Tensor:
    """A copy on ``device``, which outlives a CUDA graph that is being captured."""
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        copy: Tensor = torch.ops.dynloss.place(x, torch.empty(0, device=device))
        return copy
    return x.to(device)


class Oscillation:
    """Class weights Γ_i(step) that raise one class at a time, as an immutable description.

    In the turn of class ``i`` its raw weight g(t) runs from 1 to the amplitude A and back within one period T (in
    optimisation steps, not epochs), the others weigh 1, and Γ = C·g / Σg, so that ΣΓ = C (Ruiz-Garcia, Zhang,
    Schoenholz, Liu, "Tilting the playing field: Dynamical loss functions for machine learning", ICML 2021, Eq. 2-3).
    A = 1 is the plain cross-entropy. The phase is exact for every step, any int64; a period is the rational number that
    its float64 is.

    Args:
        num_classes: Number of classes C.
        amplitude: A >= 1 (to 1e100); a number, or a 1-D tensor (E,) for an ensemble of E oscillations.
        period: T > 0 (from 1e-9) in steps, int or float; a number, or a 1-D tensor (E,). Scalars are broadcast over
            an ensemble.
        waveform: ``"triangle"``, g = 1 + 2(A-1)t/T up to T/2 and back (the paper); ``"sine"``,
            g = 1 + (A-1) sin(πt/T); ``"square"``, g = A.
        class_order: A permutation of the classes, the one raised in the first turn first. Default 0, 1, ..., C-1.
        closed: A turn lasts T + 1 steps with both ends at weight 1 (the authors' notebook), instead of T. Then T is
            whole: the end of a fractional period is no step, and the waveform has no value beyond it.
        start_step: Γ = 1 before this step, of magnitude below 2⁵³, and the first turn begins here.
        stop_step: Γ = 1 from this step on, likewise; None for never, or a sequence of E of these for an ensemble.

    Raises:
        TypeError, ValueError: naming the argument, for anything else.

    Example:
        >>> Oscillation(3, amplitude=70, period=5000).weights(2500)
        tensor([2.9167, 0.0417, 0.0417], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        amplitude: Parameter,
        period: Parameter,
        *,
        waveform: str = "triangle",
        class_order: Sequence[int] | None = None,
        closed: bool = False,
        start_step: int = 0,
        stop_step: int | Sequence[int | None] | None = None,
    ) -> None:
        check_choice("waveform", waveform, tuple(_WAVEFORMS))
        if not isinstance(closed, bool):
            raise TypeError(f"closed: expected a bool, got {type(closed).__name__}")
        amplitudes = _parameter("amplitude", amplitude, 1.0)
        periods = _parameter("period", period, 1e-9)
        if closed and bool((periods % 1 != 0).any()):
            raise ValueError(f"period: expected a whole number of steps, as closed=True needs, got {period}")
        self._set_num_classes(num_classes)
        self._set_clock(amplitudes, periods, _WAVEFORMS[waveform], closed, start_step, stop_step)
        self._waveform = waveform
        self._closed = closed
        self._class_order = self._checked_order(class_order)
        self._table: Tensor | None = None
        self._function: Callable[[int], Tensor] | None = None
        self._place()

    @classmethod
    def from_table(cls, gamma: Tensor, *, start_step: int = 0, stop_step: int | None = None) -> Oscillation:
        """Any class weights, given step by step and repeated: Γ(s) = gamma[(s - start_step) mod S].

        Args:
            gamma: (S, C) finite weights >= 0, or (E, S, C) for an ensemble, any real dtype; used as they are, not
                normalised. A copy is kept in float64.
            start_step, stop_step: Γ = 1 before and from these steps on.

        Raises:
            TypeError, ValueError: naming the argument.

        Example:
            >>> warm_up = torch.tensor([[2.0, 1.0], [1.5, 1.0], [1.0, 1.0]])
            >>> Oscillation.from_table(warm_up, stop_step=3).weights(torch.arange(4))
            tensor([[2.0000, 1.0000],
                    [1.5000, 1.0000],
                    [1.0000, 1.0000],
                    [1.0000, 1.0000]], dtype=torch.float64)
        """
        if not isinstance(gamma, Tensor):
            raise TypeError(f"gamma: expected a tensor of shape (S, C) or (E, S, C), got {type(gamma).__name__}")
        if gamma.requires_grad:
            raise ValueError("gamma: expected a constant, got a tensor that requires grad")
        if gamma.dim() not in (2, 3) or gamma.numel() == 0 or gamma.is_complex() or gamma.dtype == torch.bool:
            raise ValueError(
                "gamma: expected real numbers of shape (S, C) or (E, S, C), no dimension 0, got "
                f"{gamma.dtype} of shape {tuple(gamma.shape)}"
            )
        table = gamma.detach().to("cpu", torch.float64).clone(memory_format=torch.contiguous_format)
        if not bool((table.isfinite() & (table >= 0)).all()):
            raise ValueError("gamma: expected finite weights >= 0, got negative, infinite or NaN entries")
        self = cls.__new__(cls)
        self._set_num_classes(table.shape[-1])
        members = _float64(1.0).expand(table.shape[:-2])
        self._set_clock(
            members,
            _float64(float(table.shape[-2])),
            0,
            False,
            start_step,
            stop_step,
        )
        self._waveform = "table"
        self._closed = False
        self._class_order = None
        self._table = table
        self._function = None
        self._place()
        return self

    @classmethod
    def from_function(cls, function: Callable[[int], Tensor], num_classes: int) -> Oscillation:
        """Class weights computed by ``function(step) -> (C,)`` at each call, in eager mode with an int step only.

        Under ``torch.compile``, ``torch.export`` or with a tensor as step it raises: use :meth:`from_table` there.

        Args:
            function: Called with the step (an int); returns finite weights >= 0 of shape (C,).
            num_classes: Number of classes C.

        Example:
            >>> decaying = Oscillation.from_function(lambda step: torch.tensor([1 + 2.0**-step, 1.0]), num_classes=2)
            >>> decaying.weights(2)
            tensor([1.2500, 1.0000], dtype=torch.float64)
        """
        check_callable("function", function)
        self = cls.__new__(cls)
        self._set_num_classes(num_classes)
        one = _float64(1.0)
        self._set_clock(one, one, 0, False, 0, None)
        self._waveform = "function"
        self._closed = False
        self._class_order = None
        self._table = None
        self._function = function
        self._place()
        return self

    # ---- construction

    def _set_num_classes(self, num_classes: int) -> None:
        self._num_classes = check_count("num_classes", num_classes, 1)

    def _set_clock(
        self,
        amplitude: Tensor,
        period: Tensor,
        waveform: int,
        closed: bool,
        start_step: int,
        stop_step: int | Sequence[int | None] | None,
    ) -> None:
        start = check_step("start_step", start_step, _EXACT_IN_FLOAT64)
        stop = _stops(stop_step, start)
        try:
            shape = torch.Size(torch.broadcast_shapes(amplitude.shape, period.shape))  # type: ignore[no-untyped-call]
        except RuntimeError:
            raise ValueError(
                f"period: expected one per amplitude, got {tuple(period.shape)} for {tuple(amplitude.shape)}"
            ) from None
        if stop.dim() == 1:
            if shape not in (torch.Size(), torch.Size([1]), stop.shape):
                raise ValueError(f"stop_step: expected one step or {shape[0]}, one per oscillation, got {len(stop)}")
            shape = stop.shape
        amplitude, period = amplitude.expand(shape), period.expand(shape)
        turn = period + 1 if closed else period
        self._start_step = start
        self._stop_step = None if stop_step is None else (int(stop) if stop.dim() == 0 else stop)
        #: (6,) or (E, 6), float64: what the kernels read (csrc/core/oscillation.h).
        parts = (amplitude, period, turn, _float64(start), stop, _float64(waveform))
        self._clock = torch.stack([part.expand(shape) for part in parts], -1)

    def _checked_order(self, class_order: Sequence[int] | None) -> Tensor | None:
        if class_order is None:
            return None
        expected = f"class_order: expected a permutation of the ints 0..{self._num_classes - 1}"
        values = class_order.tolist() if hasattr(class_order, "tolist") else class_order
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{expected}, got {class_order!r}")
        order = [plain_number(value) for value in values]
        if any(isinstance(c, bool) or not isinstance(c, int) for c in order):
            raise TypeError(f"{expected}, got {class_order!r}")
        if sorted(order) != list(range(self._num_classes)):
            raise ValueError(f"{expected}, got {order}")
        return torch.tensor(order, dtype=torch.int64, device="cpu")

    def _place(self) -> None:
        """Keeps copies of the description per device, so that a call moves nothing."""
        self._placed: dict[torch.device, tuple[Tensor, Tensor | None, Tensor | None]] = {
            torch.device("cpu"): (self._clock, self._class_order, self._table)
        }
        #: What csrc/eager.cpp reads; None where a call needs Python.
        self._plain = None if self._function is not None else (self._num_classes, self._placed)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Clock, class order and table on ``device``, as the ops take them."""
        placed = self._placed.get(device)
        if placed is None:
            order = None if self._class_order is None else _to(device, self._class_order)
            table = None if self._table is None else _to(device, self._table)
            placed = (_to(device, self._clock), order, table)
            if type(placed[0]) is Tensor:  # not one that a tracer made up
                self._placed[device] = placed
        return placed

    # ---- description

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self._num_classes

    @property
    def amplitude(self) -> Tensor:
        """A, float64, () or (E,)."""
        return self._clock[..., 0].clone()

    @property
    def period(self) -> Tensor:
        """T in steps, float64, () or (E,)."""
        return self._clock[..., 1].clone()

    @property
    def waveform(self) -> str:
        """``"triangle"``, ``"sine"``, ``"square"``, ``"table"`` or ``"function"``."""
        return self._waveform

    @property
    def ensemble_size(self) -> int | None:
        """E, or None if this is a single oscillation."""
        return self._clock.shape[0] if self._clock.dim() == 2 else None

    def config(self) -> dict[str, Any]:
        """What tells two oscillations apart: numbers, strings, None, and float64 tensors of what is longer.

        ``amplitude``, ``period`` and ``stop_step`` are numbers (or None), or (E,), with infinity for never;
        ``class_order`` is (C,), ``table`` (S, C) or (E, S, C).
        """
        amplitude, period = (x.clone() if x.dim() else x.item() for x in self._clock[..., :2].unbind(-1))
        return {
            "num_classes": self._num_classes,
            "amplitude": amplitude,
            "period": period,
            "waveform": self._waveform,
            "class_order": None if self._class_order is None else self._class_order.to(torch.float64),
            "closed": self._closed,
            "start_step": self._start_step,
            "stop_step": self._stop_step.clone() if isinstance(self._stop_step, Tensor) else self._stop_step,
            "table": None if self._table is None else self._table.clone(),
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Oscillation):
            return NotImplemented
        return self is other or (self._function is other._function and not difference(self.config(), other.config()))

    def __hash__(self) -> int:
        stop = tuple(self._stop_step.tolist()) if isinstance(self._stop_step, Tensor) else self._stop_step
        return hash((self._num_classes, self._waveform, self._closed, self._start_step, stop))

    def __repr__(self) -> str:
        if self._waveform in ("table", "function"):
            return f"Oscillation.from_{self._waveform}(num_classes={self._num_classes})"
        size = "" if self.ensemble_size is None else f", ensemble_size={self.ensemble_size}"
        amplitude, period, stop_step = (
            x if not isinstance(x, Tensor) else x.tolist() if x.dim() == 0 or len(x) <= 4 else "..."
            for x in (self.amplitude, self.period, self._stop_step)
        )
        return (
            f"Oscillation(num_classes={self._num_classes}, amplitude={amplitude}, period={period}, "
            f"waveform={self._waveform!r}, closed={self._closed}, start_step={self._start_step}, "
            f"stop_step={stop_step}{size})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_placed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._place()

    # ---- evaluation

    def weights(self, step: int | Tensor) -> Tensor:
        """Γ at a step, or at each of a list of steps.

        Args:
            step: An int, or an int64 tensor (S,).

        Returns:
            float64 on CPU: (C,) for an int, (S, C) for a tensor; (E, C) and (S, E, C) for an ensemble.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if isinstance(step, Tensor) and (step.dim() != 1 or step.dtype != torch.int64):
            raise ValueError(f"step: expected an int64 tensor (S,), got {step.dtype} of shape {tuple(step.shape)}")
        steps = step.cpu() if isinstance(step, Tensor) else torch.tensor([check_step("step", step)], device="cpu")
        if self._function is not None:
            weights = (
                torch.stack([self.evaluate_function(int(s)) for s in steps])
                if len(steps)
                else torch.empty(0, self._num_classes, dtype=torch.float64, device="cpu")
            )
        else:
            weights = torch.ops.dynloss.oscillation_weights(
                steps, self._clock, self._class_order, self._table, self._num_classes
            )
        return weights if isinstance(step, Tensor) else weights[0]

    def expand(self, size: int) -> Oscillation:
        """An ensemble of ``size`` members with this Γ; one of as many members as it is.

        Raises:
            TypeError, ValueError: naming the argument; this is an ensemble of another size, or calls a function.
        """
        size = check_count("size", size, 1)
        if self._function is not None:
            raise ValueError("oscillation: expected one without a Python function, got from_function: use from_table")
        if self.ensemble_size not in (None, size):
            raise ValueError(f"size: expected {self.ensemble_size}, that of this ensemble, got {size}")
        if self.ensemble_size is not None:
            return self
        table = None if self._table is None else self._table.expand(size, *self._table.shape).contiguous()
        return self._with(self._clock.expand(size, -1).contiguous(), table, self._stop_step)

    def member(self, index: int) -> Oscillation:
        """One of an ensemble, as a single oscillation.

        Raises:
            TypeError, IndexError: no such member. ValueError: this is no ensemble.
        """
        if self.ensemble_size is None:
            raise ValueError("oscillation: expected an ensemble, got a single one")
        m = check_member(index, self.ensemble_size)
        stop: Any = self._stop_step
        if isinstance(stop, Tensor):
            stop = None if stop[m].isinf() else int(stop[m])
        return self._with(self._clock[m].clone(), None if self._table is None else self._table[m].clone(), stop)

    def _with(self, clock: Tensor, table: Tensor | None, stop_step: int | Tensor | None) -> Oscillation:
        made = copy.copy(self)
        made._clock, made._table, made._stop_step = clock, table, stop_step
        made._place()
        return made

    def turn(self, step: int) -> Tensor:
        """The turn that a step belongs to: 0 from ``start_step`` on, and on past ``stop_step``; int64, () or (E,).

        Each turn raises another class, and so tilts the landscape another way.
        """
        elapsed = check_step("step", step) - self._start_step

        def whole_turns(length: float) -> int:
            whole = elapsed // (int(length) if length.is_integer() else Fraction(length))
            return max(-(2**63), min(whole, 2**63 - 1))

        lengths = self._clock.select(-1, 2).tolist()
        return torch.tensor(
            list(map(whole_turns, lengths)) if isinstance(lengths, list) else whole_turns(lengths), device="cpu"
        )

    def evaluate_function(self, step: int) -> Tensor:
        """Γ (C,) float64 from the user's function, checked."""
        assert self._function is not None
        value = self._function(step)
        try:
            gamma = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"function: expected weights of shape ({self._num_classes},) at step {step}, got {value!r}"
            ) from None
        if gamma.shape != (self._num_classes,) or not bool((gamma.isfinite() & (gamma >= 0)).all()):
            raise ValueError(
                f"function: expected finite weights >= 0 of shape ({self._num_classes},) at step {step}, got {gamma}"
            )
        return gamma
