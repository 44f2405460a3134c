"""Times the loss against its peers by turns and prints a table of ratios.

    python tests/benchmarks/compare_losses.py --threads 2 --json results/loss_cpu.json --figure results/loss_cpu.png

Every round runs each contender once, so that all meet the same machine; the minimum over the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_contenders import CASES, contenders

import dynloss_ext
from dynloss_ext import _C

#: Targets for eager / ours and compile / ours, at two threads.
TARGETS = {
    "300x3-float32": (4, 4),
    "512x10-float32": (5, 4),
    "65536x10-float32": (14, 3.2),
    "4096x1000-float32": (2.5, 3),
    "512x32000-float32": (2.5, 1.3),
    "65536x10-bfloat16": (13, 2.8),
    "4096x1000-bfloat16": (2.3, 3.5),
}


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": processor(),
        "threads": threads,
        "instruction_set": _C.cpu_instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dynloss_ext": dynloss_ext.__version__,
    }


def interleaved_minimum(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds per call, the minimum over rounds in which each contender takes its turn."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 15 or (time.perf_counter() < deadline and rounds < 2000):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e6)
        rounds += 1
    return best


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of the ratios, with a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for offset, peer in ((-0.2, "eager"), (0.2, "compile")):
        ratios = [row[peer] / row["ours"] for row in rows.values()]
        positions = [i + offset for i in range(len(rows))]
        bars = axes.bar(positions, ratios, 0.38, label=f"PyTorch {peer}")
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], fontsize=8, padding=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [name.replace("-", "\n") for name in rows], fontsize=8)
    axes.set_ylabel("time of the peer / ours")
    axes.set_title("Forward and backward pass of the dynamical loss on CPU", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    print(f"{'case':20}{'ours':>10}{'eager':>10}{'compile':>10}{'l+g':>10}{'copy':>10}{'floor':>10}", end="")
    print(f"{'eager/ours':>12}{'target':>8}{'compile/ours':>14}{'target':>8}")
    for case in CASES:
        row = interleaved_minimum(contenders(case), options.seconds)
        rows[str(case)] = row
        eager, compiled = row["eager"] / row["ours"], row["compile"] / row["ours"]
        goals = TARGETS[str(case)]
        print(f"{case!s:20}" + "".join(f"{value:10.1f}" for value in row.values()), end="")
        print(f"{eager:12.2f}{goals[0]:8}{compiled:14.2f}{goals[1]:8}", flush=True)
    if options.json:
        report = {"machine": machine(options.threads), "unit": "microseconds, minimum", "cases": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
