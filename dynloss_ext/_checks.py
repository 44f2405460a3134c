"""Checks of arguments. Errors read `name: expected ..., got ...`: a TypeError for a wrong type, else a ValueError."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from dynloss_ext._shards import Shards


def plain_number(value: Any) -> Any:
    """The Python number of a NumPy scalar or 0-d array; whatever else as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def check_count(name: str, value: Any, low: int, high: int | None = None, high_name: str = "") -> int:
    """The value as an int, NumPy's included, but no bool, from ``low`` to ``high``, which is called ``high_name``."""
    count = _int(name, value)
    if count < low or (high is not None and count > high):
        bounds = f">= {low}" if high is None else f"from {low} to {high}" + (f", {high_name}" if high_name else "")
        raise ValueError(f"{name}: expected an int {bounds}, got {count}")
    return count


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """The value as a float, but no bool, within [low, high), or (low, high) where ``open_low``."""
    message = f"{name}: expected a number in {'(' if open_low else '['}{low}, {high}), got {value!r}"
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(message) from None
    if not low <= number < high or (open_low and number == low):
        raise ValueError(message)
    return number


def check_seed(value: Any) -> int:
    """The seed modulo 2⁶⁴: any int is one, a negative one too."""
    return _int("seed", value) % 2**64


def _int(name: str, value: Any) -> int:
    plain = plain_number(value)
    try:
        if not isinstance(plain, bool):
            return operator.index(plain)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def check_member(value: Any, members: int) -> int:
    """The number of a member, from 0; of its place counted from the end if negative."""
    m = plain_number(value)
    if isinstance(m, bool) or not isinstance(m, int):
        raise TypeError(f"member: expected an int, got {type(value).__name__}")
    if not -members <= m < members:
        raise IndexError(f"member: expected one of {members}, got {m}")
    return m % members


_INT64 = range(-(2**63), 2**63)


def check_step(name: str, value: Any, within: range = _INT64) -> int:
    """``value``, if it is an int of these."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int (a number of optimisation steps), got {type(value).__name__}")
    if value not in within:
        raise ValueError(f"{name}: expected a step from {within[0]} to {within[-1]}, got {value}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """The value, one of some strings."""
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}: expected {', '.join(others)} or {last}, got {value!r}")
    return value


def check_callable(name: str, value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def check_vector(
    name: str, value: Any, size: int, dtype: torch.dtype, device: torch.device, *, columns: str = "k"
) -> Tensor:
    """The value, a vector of shape (size,) or a block of vectors of shape (size, ``columns``)."""
    v = check_tensor(name, value)
    if v.dim() not in (1, 2) or v.shape[0] != size:
        raise ValueError(f"{name}: expected shape ({size},) or ({size}, {columns}), got {tuple(v.shape)}")
    if v.dtype != dtype or v.device != device:
        raise ValueError(f"{name}: expected {dtype} on {device}, got {v.dtype} on {v.device}")
    return v


def check_array(
    name: str, value: Any, ndim: int | None = None, length: int | None = None, kinds: str = "biuf"
) -> NDArray[Any]:
    """The value, a list, an array or a tensor on any device, as an array of real numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:  # NumPy has no such type
            value = value.float()
    array = np.asarray(value)
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name}: expected {length} rows, got {len(array)}")
    return array


Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Params(list[Tensor]):
    """Parameters that something is to be differentiated by, and what to call each in a message: ``named``, by its
    own name. ``shards`` says how vectors of sharded ones are laid out over processes."""

    shards: Shards | None = None

    def __init__(self, params: Iterable[Tensor], labels: list[str], named: bool = False) -> None:
        super().__init__(params)
        self.labels, self.named = labels, named


def is_sharded(p: Tensor) -> bool:
    """By name: the module of DTensor takes long to import."""
    return type(p).__name__ == "DTensor"


def _twice(p: Tensor, label: str, first: Tensor, first_label: str) -> tuple[str, str]:
    """What is expected of a parameter that graphs are recorded of, and what it is; nothing where it is that."""
    if is_sharded(p):
        return "a tensor that is whole in this process", "a DTensor, which only HessianOperator.from_gradients takes"
    if p.dtype not in (torch.float32, torch.float64):
        taken = ", which only HessianOperator.from_gradients takes" if p.dtype.is_floating_point else ""
        return "float32 or float64", f"{p.dtype}{taken}"
    if p.dtype != first.dtype or p.device != first.device:
        expected = f"one dtype and device for all, {first.dtype} on {first.device} as {first_label}"
        return expected, f"{p.dtype} on {p.device}"
    return "", ""


def _once(p: Tensor, label: str, first: Tensor, first_label: str) -> tuple[str, str]:
    """The same of a parameter of which gradients alone are asked for, where it may be moved to."""
    if not p.is_leaf:
        return "a leaf, such as an nn.Parameter", f"a tensor of shape {tuple(p.shape)} that was computed"
    if not p.dtype.is_floating_point:
        return "a floating-point tensor", str(p.dtype)
    if p.device != first.device:
        return f"one device for all, {first.device} as {first_label}", str(p.device)
    if is_sharded(p) != is_sharded(first):
        return "DTensors alone, or none", f"{type(p).__name__} beside {first_label}, a {type(first).__name__}"
    if p._post_accumulate_grad_hooks:
        return (
            "a tensor without hooks, which every gradient would call",
            "one with a hook (Tensor.register_post_accumulate_grad_hook), such as an optimizer's step: remove it",
        )
    return "", ""


def named_tensors(params: Parameters, name: str = "params") -> Params:
    """The parameters, given as they are or with their names, none of them twice."""
    if isinstance(params, Tensor):
        raise TypeError(f"{name}: expected an iterable of tensors, got one tensor: pass [tensor]")
    if isinstance(params, nn.Module):
        kind = type(params).__name__
        raise TypeError(f"{name}: expected an iterable of tensors, got a module, {kind}: pass its .parameters()")
    if not isinstance(params, Iterable):
        raise TypeError(f"{name}: expected an iterable of tensors, got {type(params).__name__}")
    if isinstance(params, Mapping):
        raise TypeError(
            f"{name}: expected an iterable of tensors or (name, tensor) pairs, got a {type(params).__name__}: pass its"
            " .items()"
        )
    pairs = [p if isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) else ("", p) for p in params]
    labels = [given or f"{name}[{i}]" for i, (given, _) in enumerate(pairs)]
    checked = Params([p for _, p in pairs], labels, all(given for given, _ in pairs))
    if not checked:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    first: dict[int, str] = {}
    for label, p in zip(labels, checked, strict=True):
        check_tensor(label, p)
        if id(p) in first:
            raise ValueError(f"{name}: expected every tensor once, got one twice, as {first[id(p)]} and {label}")
        first[id(p)] = label
    return checked


def check_params(params: Parameters, name: str = "params", *, once: bool = False) -> Params:
    """The same if something can be differentiated by them; once: their gradients are asked for, and no graphs of
    these."""
    checked = named_tensors(params, name)
    for label, p in zip(checked.labels, checked, strict=True):
        got = f"a tensor of shape {tuple(p.shape)}"
        expected, found = (_once if once else _twice)(p, label, checked[0], checked.labels[0])
        if expected:
            got = found
        elif not p.requires_grad:
            expected, got = "a tensor that requires grad", f"{got} that does not"
        elif p._backward_hooks:
            expected = "a tensor without hooks, which every backward pass of a product would call"
            got += " with a hook (Tensor.register_hook): remove it for as long as the operator is used"
        if expected:
            raise ValueError(f"{label}: expected {expected}, got {got}")
    if sum(p.numel() for p in checked) == 0:
        raise ValueError(f"{name}: expected at least one element in all, got none")
    return checked


def check_loss(loss: object, name: str = "loss") -> Tensor:
    """The loss, a tensor that has a Hessian here."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name}: expected a 0-d torch.Tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"{name}: expected a 0-d tensor, got shape {tuple(loss.shape)}: reduce it first")
    if not loss.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point tensor, got {loss.dtype}")
    if loss.is_inference():
        raise ValueError(f"{name}: expected a tensor with its graph, got one of torch.inference_mode(), which has none")
    if not loss.requires_grad:
        raise ValueError(f"{name}: expected a tensor with its graph, got one made without grad, or from no parameter")
    return loss
