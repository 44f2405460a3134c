"""Time and peak memory of the solvers of compare_eigensolvers over sizes P and numbers of pairs k, and their figure.

A network of two hidden layers and ten classes has about P parameters; its products are cheap with 16 samples and dear
with 1,024. Every solver sees the same states by turns, and its time is the smallest of them. Peak memory is what the
process held most above what it held before.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

SAMPLES = {"cheap": 16, "dear": 1024}


def network(size: int, samples: int, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model of about `size` parameters, inputs and targets."""
    width = max(1, round(math.sqrt(size / 2 + 9) - 3))  # 2 w (w + 1) + 10 (w + 1) parameters
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    inputs = torch.randn(samples, width, generator=generator, dtype=dtype)
    return nn.Sequential(*layers).to(dtype), inputs, torch.randint(10, (samples,), generator=generator)


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


def with_peak(solve: Callable[..., Any], peaks: list[int], problem: Any) -> Any:
    before = resident(reset=True)
    answer = solve(problem)
    after = resident()
    if before is not None and after is not None:
        peaks.append(max(0, after[1] - before[0]))
    return answer


def measure_grid(
    solvers: Any, arguments: argparse.Namespace, grid: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> None:
    """Adds rows by product, P and k to those that `grid` has; `solvers` is the module that compares them."""
    for cost, samples in SAMPLES.items():
        for size in arguments.sizes:
            for k in arguments.ks:
                if f"{cost} P={size} k={k}" in grid or cost not in arguments.products:
                    continue
                model, inputs, target = network(size, samples, getattr(torch, arguments.dtype))
                oscillation = solvers.Oscillation(10, 10.0, 100)
                problem = solvers.Problem(model, inputs, target, oscillation, lr=0.02, dense=False, k=k, exact=False)
                peaks: dict[str, list[int]] = {}
                contenders = {
                    name: solve and partial(with_peak, solve, peaks.setdefault(name, []))
                    for name, solve in solvers.contenders().items()
                }
                rows = solvers.measure(
                    problem, contenders, arguments.states, arguments.gap, arguments.warm, lambda _: None
                )
                for name, row in rows.items():
                    if row is not None and peaks[name]:
                        row["peak_bytes"] = max(peaks[name])
                parameters = sum(p.numel() for p in problem.params)
                grid[f"{cost} P={size} k={k}"] = {"product": cost, "parameters": parameters, "k": k, "solvers": rows}
                save(grid)


def draw(grid: dict[str, Any], path: Path, tolerance: float) -> None:
    """Seconds and peak bytes over P, a column for each k, solid for dear products and dashed for cheap ones.

    A cross where the values are wrong by more than the tolerance.
    """
    import matplotlib.pyplot as plt

    ks = sorted({row["k"] for row in grid.values()})
    names = list(dict.fromkeys(name for row in grid.values() for name, found in row["solvers"].items() if found))
    figure, axes = plt.subplots(2, len(ks), figsize=(4 * len(ks), 6), sharex=True, sharey="row", squeeze=False)
    for column, k in enumerate(ks):
        for axis, measure in zip(axes[:, column], ("seconds_min", "peak_bytes"), strict=True):
            for i, name in enumerate(names):
                for cost, style in (("cheap", "--"), ("dear", "-")):
                    rows = [row for row in grid.values() if (row["k"], row["product"]) == (k, cost)]
                    values = [(row["solvers"][name] or {}).get(measure, math.nan) for row in rows]
                    sizes = [row["parameters"] for row in rows]
                    label = name if cost == "dear" else None
                    errors = [(row["solvers"][name] or {}).get("worst_error", math.nan) for row in rows]
                    wrong = [j for j, error in enumerate(errors) if error > tolerance]
                    axis.plot(sizes, values, style, marker=".", color=f"C{i}", label=label)
                    axis.plot(sizes, values, "x", color=f"C{i}", markevery=wrong)
            axis.set(xscale="log", yscale="log")
        axes[0, column].set_title(f"k = {k}")
        axes[1, column].set_xlabel("parameters")
    axes[0, 0].set_ylabel("s, dear (solid) and cheap products (dashed)")
    axes[1, 0].set_ylabel("peak memory, bytes")
    axes[0, -1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(solvers: Any, arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Figures by product, P and k into the file, after each, and beside it the picture of them all.

    What the file has from the same processor stays, so that a grid can be measured piece by piece.
    """
    known = json.loads(arguments.json.read_text()).get("grid") if arguments.json and arguments.json.exists() else None
    same = known is not None and known["machine"]["processor"] == figures["machine"]["processor"]
    grid: dict[str, Any] = known["solvers"] if same else {}

    def save(grid: dict[str, Any]) -> None:
        figures["solvers"] = grid
        if arguments.json:
            solvers.write_json(arguments.json, "grid", figures)

    measure_grid(solvers, arguments, grid, save)
    for name, row in grid.items():
        print(name)
        solvers.show(row["solvers"])
    if arguments.json:
        draw(grid, arguments.json.with_suffix(".png"), solvers.TOL)
