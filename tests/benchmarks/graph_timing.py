"""Calls timed by turns: captured in CUDA graphs, or in loops where there is no GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_rows import Result

MAX_SETS = 10_000

Calls = Sequence[Callable[[], object]]


class Graph:
    """`count` calls by turns, captured. What the last of each returned stays alive, each in memory of its own."""

    def __init__(self, calls: Calls, count: int) -> None:
        self.calls = count
        self.results: list[Any] = []
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(count):
                result = calls[i % len(calls)]()
                if len(self.results) == len(calls):
                    self.results[i % len(calls)] = result
                else:
                    self.results.append(result)

    def replay(self) -> None:
        self._graph.replay()


class Loop:
    """In the place of a graph where there is no GPU."""

    def __init__(self, calls: Calls, count: int) -> None:
        self.calls, self._calls = count, calls
        self.results: list[Any] = [call() for call in calls]

    def replay(self) -> None:
        for i in range(self.calls):
            result = self._calls[i % len(self._calls)]()
            kept = self.results[i % len(self._calls)]
            if isinstance(kept, Result):  # into the same memory, as a graph would
                for old, new in ((kept.loss, result.loss), (kept.derivative, result.derivative)):
                    if old is not None:
                        old.copy_(new)


def summary(values: list[float]) -> dict[str, float]:
    return {"us": statistics.median(values), "us_min": min(values)}


class Gpu:
    """Measures on the device."""

    device = "cuda"
    make = Graph

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size or 50 << 20

    def sets(self, moved: int) -> int:
        """So many problems exceed the L2 cache four times."""
        return max(2, min(MAX_SETS, math.ceil(4 * self.l2_bytes / moved)))

    def round(self, graphs: dict[str, Graph]) -> dict[str, float]:
        """Microseconds per call. The device sleeps until the first graph is submitted: no launch is waited for."""
        torch.cuda._sleep(2_000_000 + 2_000 * max(graph.calls for graph in graphs.values()))
        events = {}
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            events[name] = (begin, end)
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) * 1e3 / graphs[name].calls for name, (begin, end) in events.items()}


class Rehearsal:
    """The same without a GPU, at small shapes."""

    device = "cpu"
    make = Loop
    l2_bytes = 1 << 10

    def sets(self, moved: int) -> int:
        return 2

    def round(self, loops: dict[str, Loop]) -> dict[str, float]:
        times = {}
        for name, loop in loops.items():
            start = time.perf_counter()
            loop.replay()
            times[name] = (time.perf_counter() - start) * 1e6 / loop.calls
        return times


def by_turns(
    one_round: Callable[[], dict[str, float]], seconds: float, fewest: int = 5, most: int = 200
) -> dict[str, dict[str, float]]:
    """Median and minimum of each contender over the rounds; the first two only warm up."""
    one_round()
    one_round()
    end = time.perf_counter() + seconds
    rounds = [one_round()]
    while len(rounds) < most and (len(rounds) < fewest or time.perf_counter() < end):
        rounds.append(one_round())
    return {name: summary([times[name] for times in rounds]) for name in rounds[0]}
