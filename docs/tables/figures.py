"""The figures of measured.py: each a function of committed figures and the file it is drawn into."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999", "#f0e442", "#000000"]
Json = dict[str, Any]


def number(value: float) -> str:
    """Three digits, without an exponent where that is shorter."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def bars(path: Path, groups: list[str], series: dict[str, list[float | None]], label: str) -> None:
    """Horizontal bars on a logarithmic scale, a group of them per case; where a value is None there is no bar."""
    places: dict[str, list[float]] = {name: [] for name in series}
    shown: dict[str, list[float]] = {name: [] for name in series}
    ticks, top = [], 0.0
    for group in range(len(groups)):
        first = top
        for name, values in series.items():
            if (value := values[group]) is not None:
                places[name].append(top)
                shown[name].append(value)
                top += 1
        ticks.append((first + top - 1) / 2)
        top += 1
    figure = Figure(figsize=(7.5, 0.9 + 0.15 * top), layout="constrained")
    axis = figure.subplots()
    for (name, at), colour in zip(places.items(), COLOURS * len(series), strict=False):
        drawn = axis.barh(at, shown[name], 1, label=name, color=colour)
        axis.bar_label(drawn, [number(value) for value in shown[name]], padding=2, fontsize=6)
    axis.set_yticks(ticks, ["\n".join(textwrap.wrap(name, 32)) for name in groups], fontsize=7)
    axis.set_ylim(top - 1, -1)
    axis.set_xscale("log")
    axis.margins(x=0.1)
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=6, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def ratios(path: Path, cases: Json, peers: list[str]) -> None:
    """Bars of a peer's time over ours for each shape, with a line at 1."""
    width = 0.8 / len(peers)
    figure = Figure(figsize=(max(8, 0.9 * len(cases)), 3.6), layout="constrained")
    axis = figure.subplots()
    for k, peer in enumerate(peers):
        places = [i + (k - (len(peers) - 1) / 2) * width for i in range(len(cases))]
        values = [row[peer] / row["ours"] if isinstance(row.get(peer), float) else math.nan for row in cases.values()]
        drawn = axis.bar(places, values, width * 0.95, label=f"PyTorch {peer}", color=COLOURS[k])
        axis.bar_label(drawn, [f"{x:.1f}" if x == x else "" for x in values], fontsize=8, padding=2)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_xticks(range(len(cases)), [name.replace("-", "\n") for name in cases], fontsize=8)
    axis.set_ylabel("time of the peer / ours")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def scaling(path: Path, costs: dict[str, dict[str, float]]) -> None:
    """Microseconds a step against M, H and N, on logarithmic axes, beside proportionality to the largest size."""
    labels = {"M": "members M (H = 100, N = 300)", "H": "hidden units H (N = 300)", "N": "points N (H = 100)"}
    figure = Figure(figsize=(9, 3), layout="constrained")
    row = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axis, (name, cost) in zip(row, costs.items(), strict=True):
        sizes, times = [int(size) for size in cost], list(cost.values())
        axis.loglog(sizes, [times[-1] * size / sizes[-1] for size in sizes], color="0.7", label="proportional")
        axis.loglog(sizes, times, "o-", markersize=4, label="measured")
        axis.set_xlabel(labels[name])
    row[0].set_ylabel("µs per step of all members")
    row[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def eigensolver_grid(path: Path, cells: list[Json], tolerance: float, source: str | None = None) -> None:
    """A column for each k: time over that of the first solver, with cheap and with dear products, and peak memory.

    A cross without a line where values are wrong by more than the tolerance. `source` goes into the picture's metadata.
    """
    costs = ("cheap", "dear")
    ks = sorted({cell["k"] for cell in cells})
    names = list(dict.fromkeys(name for cell in cells for name, found in cell["solvers"].items() if found))
    figure = Figure(figsize=(2.6 * len(ks) + 1, 7.5), layout="constrained")
    axes = figure.subplots(3, len(ks), sharex=True, sharey="row", squeeze=False)

    def draw(axis: Axes, cost: str, k: int, value: Callable[[Json, Json], float]) -> None:
        chosen = [cell for cell in cells if (cell["k"], cell["product"]) == (k, cost)]
        chosen.sort(key=lambda cell: cell["parameters"])
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            points = [
                (cell["parameters"], value(cell, found), found["worst_error"] <= tolerance)
                for cell in chosen
                if "seconds_min" in (found := cell["solvers"].get(name) or {})
            ]
            right = [(x, y) for x, y, is_right in points if is_right]
            wrong = [(x, y) for x, y, is_right in points if not is_right]
            axis.plot(*zip(*right, strict=True) if right else ([], []), "-o", color=colour, markersize=3, label=name)
            axis.plot(*zip(*wrong, strict=True) if wrong else ([], []), "x", color=colour, markersize=5)
        axis.set(xscale="log", yscale="log")

    def relative_time(cell: Json, found: Json) -> float:
        return float(found["seconds_min"] / cell["solvers"][names[0]]["seconds_min"])

    def peak(cell: Json, found: Json) -> float:
        return float(found.get("peak_bytes") or math.nan)

    for column, k in enumerate(ks):
        for cost, axis in zip(costs, axes[:, column], strict=False):
            draw(axis, cost, k, relative_time)
        draw(axes[2, column], "cheap", k, peak)
        axes[0, column].set_title(f"k = {k}")
        axes[2, column].set_xlabel("parameters")
    for axis, cost in zip(axes[:, 0], costs, strict=False):
        axis.set_ylabel(f"time / {names[0]}'s,\n{cost} products")
    axes[2, 0].set_ylabel("peak memory, bytes,\ncheap products")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=150, metadata={"Source": source} if source else None)


def shares_of_bandwidth(path: Path, shares: dict[str, dict[int, float]]) -> None:
    """By the number of classes, a line for each dtype."""
    figure = Figure(figsize=(6.5, 3), layout="constrained")
    axis = figure.subplots()
    for (dtype, row), colour in zip(shares.items(), COLOURS, strict=False):
        classes = sorted(row)
        axis.semilogx(classes, [row[c] for c in classes], "o-", ms=3, lw=1, color=colour, label=dtype)
    axis.set(xlabel="classes", ylabel="part of a copy's bandwidth", ylim=(0, 1))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
