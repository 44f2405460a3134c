"""Ctrl-C and SIGTERM, which end a run where `--resume` continues it exactly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar


class Stopped(BaseException):
    """The first Ctrl-C or SIGTERM within `interruptible()`."""


class GracefulStop:
    """Turns the first Ctrl-C or SIGTERM inside the block into `requested`; a second Ctrl-C interrupts.

    A KeyboardInterrupt could strike half-way through a parameter update; a flag that the loop reads between
    two steps leaves a state that `--resume` continues exactly. Eigenvalue updates are long: see `interruptible`.

    Args:
        interrupts: whether `interruptible` may end. One of several processes must not, as the others wait for it.
    """

    _current: ClassVar[GracefulStop | None] = None

    def __init__(self, interrupts: bool = True) -> None:
        self.requested = False
        self._interrupts, self._raises = interrupts, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is not threading.main_thread():
            return self  # a worker's: signals are not for it
        GracefulStop._current = self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._previous:
            return
        GracefulStop._current = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        if self._raises:
            raise Stopped


@contextmanager
def interruptible() -> Iterator[None]:
    """A block that a stop ends at once, by `Stopped`: in an eigenvalue update, between two products.

    Whatever the block has begun to change has to be put back by the caller.
    """
    stop = GracefulStop._current
    if stop is None or not stop._interrupts:
        yield
        return
    stop._raises = True
    try:
        if stop.requested:
            raise Stopped
        yield
    finally:
        stop._raises = False
