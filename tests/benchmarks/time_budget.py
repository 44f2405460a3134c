"""Rows of a benchmark within a time that is given, each written to the file at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import one_line, write_json

Report = dict[str, Any]


class Budget:
    """The time for everything, and what the longest row of each kind has taken of it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._longest: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def allows(self, kind: str) -> bool:
        """Whether another row like the longest of the kind fits."""
        return self.left > max(1.2 * self._longest.get(kind, 0.0), 0.2)

    def run(self, kind: str, row: Callable[[], Report]) -> Report:
        start = self._clock()
        try:
            return row()
        finally:
            self._longest[kind] = max(self._longest.get(kind, 0.0), self._clock() - start)

    def share(self, rows: int, most: float) -> float:
        """Seconds of measuring for each of so many rows, if half of the time goes into preparing them."""
        return min(most, max(0.05, self.left / (2 * max(rows, 1))))


class Results:
    """The report, written to the file after each row."""

    def __init__(self, path: Path, head: Report) -> None:
        self.path = path
        self.rows: dict[str, Report] = {}
        self.report: Report = head | {"rows": self.rows}
        self.write()

    def write(self) -> None:
        write_json(self.path, self.report)

    def add(self, name: str, row: Report) -> None:
        self.rows[name] = row
        self.write()

    @property
    def failed(self) -> bool:
        return any("error" in row or row.get("ok") is False for row in self.rows.values())


def go_through(
    rows: dict[str, Callable[[float], Report]], results: Results, budget: Budget, most: float, show: Callable[..., None]
) -> None:
    """Runs the rows, each with its seconds, while time is left; a failure costs its own row only.

    The names end with the kind.
    """
    dead = ""
    for number, (name, measure) in enumerate(rows.items()):
        kind = name.rpartition("-")[2]
        if dead or not budget.allows(kind):
            results.add(name, {"skipped": dead or "no time left"})
            continue
        seconds = budget.share(len(rows) - number, most)
        try:
            row = budget.run(kind, lambda measure=measure, seconds=seconds: measure(seconds))
        except Exception as error:
            row = {"error": one_line(error)}
            dead = device_error()
        results.add(name, row)
        show(name, row)
        free_memory()


def device_error() -> str:
    """Why the device answers nothing any more; empty if it does."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        return f"after {one_line(error)}"
    return ""


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized() and not device_error():
        torch.cuda.empty_cache()
