"""Time and peak memory of the solvers of compare_eigensolvers over sizes P and numbers of pairs k.

A network of two hidden layers and ten classes has about P parameters; its products are cheap with 16 samples and dear
with 1,024. Every solver sees the same states by turns, and its time is the smallest of them; where there is one state
only, which takes hours, a solver after the other, so that another process can go on with those that are missing. Peak
memory is measured in a process for each solver.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import math
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import commit, one_line
from torch import nn

SAMPLES = {"cheap": 16, "dear": 1024}
#: Parameters by samples by pairs of a cell in which every solver takes part; above, those of DEAR, which take most
#: products, do not.
FOR_ALL = 1_000_000 * 1024 * 10
DEAR = ("PyHessian",)
#: Parameters from which peak memory is measured: that of smaller vectors does not show beside what a process holds.
MEMORY_FROM = 50_000


def network(size: int, samples: int, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model of about `size` parameters, inputs and targets."""
    width = max(1, round(math.sqrt(size / 2 + 9) - 3))  # 2 w (w + 1) + 10 (w + 1) parameters
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    inputs = torch.randn(samples, width, generator=generator, dtype=dtype)
    return nn.Sequential(*layers).to(dtype), inputs, torch.randint(10, (samples,), generator=generator)


def made(solvers: Any, size: int, cost: str, k: int, dtype: torch.dtype) -> Any:
    """The problem of a cell of the grid, for the solvers of the module that compares them."""
    model, inputs, target = network(size, SAMPLES[cost], dtype)
    oscillation = solvers.Oscillation(10, 10.0, 100)
    return solvers.Problem(model, inputs, target, oscillation, lr=0.02, dense=False, k=k, exact=False)


def resident(reset: bool = False) -> tuple[int, int] | None:
    """Bytes that the process holds, and the most that it held since the last reset; None where Linux does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if "VmRSS" in name or "VmHWM" in name
    }
    return found["VmRSS"], found["VmHWM"]


def held_most(name: str, size: int, k: int, dtype: torch.dtype, threads: int) -> int | None:
    """Bytes above those of the problem that this process, a new one, holds while a solver solves it.

    A "warm" solver solves it twice. What a solver imports is there before: it has solved a small problem first.
    """
    solvers = importlib.import_module("compare_eigensolvers")
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    warnings.simplefilter("ignore")
    solvers.contenders()[name](made(solvers, 1000, "cheap", k, dtype))
    problem, solve = made(solvers, size, "cheap", k, dtype), solvers.contenders()[name]
    before = resident(reset=True)
    for _ in range(2 if "(warm)" in name else 1):
        problem.train(1)
        solve(problem)
    after = resident()
    return None if before is None or after is None else after[1] - before[0]


def peak_bytes(name: str, size: int, k: int, dtype: torch.dtype, threads: int) -> int | None:
    """`held_most` in a process whose allocator has kept nothing of an earlier solver; None where that fails."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(held_most, name, size, k, dtype, threads).result()
        except Exception as error:
            print(f"peak memory of {name}, P={size} k={k}: {error}", file=sys.stderr)
            return None


def measure_one_by_one(
    solvers: Any,
    make: Callable[[], Any],
    contenders: dict[str, Any],
    arguments: argparse.Namespace,
    cell: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Adds to a cell those of the contenders that it does not have, each from the first state on a problem of its own.

    The cell keeps their answers: an error depends on all, and is found anew with each.
    """
    answers = cell.setdefault("answers", {})
    for name, solve in contenders.items():
        if solve is None or name in answers:
            continue
        problem, load = make(), os.getloadavg()[0]
        try:
            for state in range(arguments.warm + 1):
                problem.train(arguments.gap)
                if state == arguments.warm or "(warm)" in name:
                    answer = solvers.timed(name, solve, problem)
            answers[name] = dataclasses.asdict(answer) | {"values": answer.values.tolist(), "load": load}
        except Exception as error:
            answers[name] = {"failed": one_line(error)}
        figures = judged(solvers, answers)
        cell["solvers"] = {name: cell["solvers"].get(name, {}) | row for name, row in figures.items()}
        save()


def judged(solvers: Any, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `summarize` makes of the answers that a cell keeps."""
    failed = {name: answer["failed"] for name, answer in answers.items() if "failed" in answer}
    fields = [field.name for field in dataclasses.fields(solvers.Answer)]
    rows = {
        name: []
        if name in failed
        else [solvers.Answer(**{key: answer[key] for key in fields} | {"values": np.array(answer["values"])})]
        for name, answer in answers.items()
    }
    return solvers.summarize(rows, failed, [None])


def measure_grid(
    solvers: Any, arguments: argparse.Namespace, grid: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> None:
    """Adds rows by product, P and k to those that `grid` has; `solvers` is the module that compares them.

    Of 10⁶ parameters two states, and one of 10⁷, where nothing else is asked for. Peak memory is measured with cheap
    products, where rows do not have it, and from MEMORY_FROM parameters on.
    """
    dtype = getattr(torch, arguments.dtype)
    for cost in arguments.products:
        for size, k in product(arguments.sizes, arguments.ks):
            name = f"{cost} P={size} k={k}"
            states = arguments.states or (3 if size < 1_000_000 else 2 if size < 10_000_000 else 1)
            dear = DEAR if size * SAMPLES[cost] * k > FOR_ALL else ()
            contenders = {
                name: solve
                for name, solve in solvers.contenders().items()
                if name not in arguments.without and name not in dear
            }
            make = partial(made, solvers, size, cost, k, dtype)
            if name not in grid:
                grid[name] = {"product": cost, "parameters": sum(p.numel() for p in make().params), "k": k}
                grid[name] |= {"states": states, "load": os.getloadavg()[0]}
                grid[name] |= {"date": datetime.date.today().isoformat(), "commit": commit(), "solvers": {}}
            cell = grid[name]
            if states == 1 and (not cell["solvers"] or "answers" in cell):
                measure_one_by_one(solvers, make, contenders, arguments, cell, partial(save, grid))
            elif not cell["solvers"]:
                cell["solvers"] = solvers.measure(
                    make(), contenders, states, arguments.gap, arguments.warm, lambda _: None
                )
                save(grid)
            if cost == "cheap" and size >= MEMORY_FROM:
                for solver, row in cell["solvers"].items():
                    if row is not None and "failed" not in row and "peak_bytes" not in row:
                        row["peak_bytes"] = peak_bytes(solver, size, k, dtype, arguments.threads)
                        save(grid)


def run(solvers: Any, arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Figures by product, P and k into the file, after each.

    What the file has from the same processor stays, so that a grid can be measured piece by piece.
    """
    known = json.loads(arguments.json.read_text()).get("grid") if arguments.json and arguments.json.exists() else None
    same = known is not None and known["machine"]["processor"] == figures["machine"]["processor"]
    grid: dict[str, Any] = known["solvers"] if same else {}

    def save(grid: dict[str, Any]) -> None:
        figures["solvers"] = grid
        if arguments.json:
            solvers.add_to_json(arguments.json, "grid", figures)

    measure_grid(solvers, arguments, grid, save)
    for name, row in grid.items():
        print(name)
        solvers.show(row["solvers"])
