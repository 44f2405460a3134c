"""Checks of plain arguments: counts, numbers and seeds."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

__all__ = ["check_count", "check_number", "check_seed"]


def check_count(name: str, value: Any, low: int, high: int | None = None, high_name: str = "") -> int:
    """The value as an int, NumPy's included, within ``low`` and ``high``.

    Args:
        name: of the argument, for the message.
        value: what was given.
        low: smallest value allowed.
        high: largest value allowed, if there is one.
        high_name: what ``high`` is.

    Raises:
        TypeError: not an int; a bool is none. ValueError: out of bounds.
    """
    count = _int(name, value)
    if count < low or (high is not None and count > high):
        bounds = f">= {low}" if high is None else f"between {low} and {high}" + (f", {high_name}" if high_name else "")
        raise ValueError(f"{name} must be {bounds}, got {count}")
    return count


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """The value as a float, within [low, high), or (low, high) where ``open_low``.

    Raises:
        TypeError: not a real number; a bool is none. ValueError: out of the interval, or NaN.
    """
    interval = f"{'(' if open_low else '['}{low}, {high})"
    message = f"{name} must be a number in {interval}, got {value!r}"
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
    """The seed modulo 2⁶⁴: any int is one, a negative one too.

    Raises:
        TypeError: not an int; a bool is none.
    """
    return _int("seed", value) % 2**64


def _int(name: str, value: Any) -> int:
    message = f"{name} must be an int, got {type(value).__name__}"
    if isinstance(value, bool):
        raise TypeError(message)
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(message) from None
