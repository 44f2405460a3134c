"""Times the loss against its peers by turns and prints a table of ratios.

    python tests/benchmarks/compare_losses.py --threads 2 --json FILE
    python tests/benchmarks/compare_losses.py --device cuda --json FILE

Every round runs each contender once, so that all meet the same machine; the minimum over the rounds counts. The JSON
is written anew after each case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loss_contenders import CASES, PEERS, Contender, contenders
from machine import machine, one_line, write_json

import dynloss_ext
from dynloss_ext import _C

#: Targets for eager / ours and compile / ours, on a CPU with two threads.
TARGETS = {
    "300x3-float32": (4, 4),
    "512x10-float32": (5, 4),
    "65536x10-float32": (14, 3.2),
    "4096x1000-float32": (2.5, 3),
    "512x32000-float32": (2.5, 1.3),
    "65536x10-bfloat16": (13, 2.8),
    "4096x1000-bfloat16": (2.3, 3.5),
}

Row = dict[str, float | str]


# ---- timing


def cpu_round(runs: dict[str, Contender]) -> dict[str, float]:
    """Microseconds of one run each."""
    times = {}
    for name, contender in runs.items():
        start = time.perf_counter()
        contender.run()
        times[name] = (time.perf_counter() - start) * 1e6 / contender.calls
    return times


def cuda_round(runs: dict[str, Contender]) -> dict[str, float]:
    """Microseconds of one run each, between events on the device."""
    events = {}
    for name, contender in runs.items():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        contender.run()
        end.record()
        events[name] = (begin, end)
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) * 1e3 / runs[name].calls for name, (begin, end) in events.items()}


def interleaved_minimum(
    runs: dict[str, Contender], seconds: float, one_round: Callable[[dict[str, Contender]], dict[str, float]]
) -> dict[str, float]:
    """Microseconds per call, the minimum over rounds in which each contender takes its turn."""
    best = dict.fromkeys(runs, float("inf"))
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 15 or (time.perf_counter() < deadline and rounds < 2000):
        best = {name: min(best[name], value) for name, value in one_round(runs).items()}
        rounds += 1
    return best


def time_case(candidates: dict[str, Contender | str], seconds: float, device: str) -> Row:
    """The time of each contender, or why there is none: a peer is not installed, or fails."""
    runs: dict[str, Contender] = {}
    row: Row = {}
    for name, candidate in candidates.items():
        if isinstance(candidate, str):
            row[name] = candidate
            continue
        try:
            candidate.run()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            if name not in PEERS:
                raise
            row[name] = f"failed ({one_line(error)})"
        else:
            runs[name] = candidate
    row |= interleaved_minimum(runs, seconds, cuda_round if device == "cuda" else cpu_round)
    return row


# ---- reporting


def add_bandwidth(row: Row, samples: int, copied_bytes: int) -> None:
    """GB/s of the copy and of the kernel, which also reads the labels; its share of the copy's."""
    copy, kernel = row["copy"], row["kernel"]
    assert isinstance(copy, float) and isinstance(kernel, float)
    row["copy_gbps"] = 2 * copied_bytes / copy / 1e3
    row["kernel_gbps"] = (2 * copied_bytes + 8 * samples) / kernel / 1e3


def ratio(row: Row, name: str) -> float:
    """The time of a contender over ours; NaN where it has none."""
    value, ours = row.get(name), row["ours"]
    assert isinstance(ours, float)
    return value / ours if isinstance(value, float) else float("nan")


def print_row(name: str, row: Row, rivals: list[str]) -> None:
    figures = "".join(f"{x:12.1f}" if isinstance(x := row.get(column), float) else f"{'-':>12}" for column in COLUMNS)
    goals = TARGETS.get(name, ())
    print(f"{name:24}{figures}" + "".join(f"{ratio(row, rival):14.2f}" for rival in rivals), *goals, flush=True)


COLUMNS = ["ours", "eager", "compile", "loss_and_gradient", "copy", "autograd floor", "kernel"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(options.threads)
    rivals = ["eager", "compile", *(PEERS if options.device == "cuda" else [])]
    description = machine(options.device) | {
        "instruction_set": _C.cpu_instruction_set(),
        "dynloss_ext": dynloss_ext.__version__,
    }
    rows: dict[str, Row] = {}
    report = {"machine": description, "unit": "microseconds, minimum", "cases": rows}
    print(f"{'us':24}" + "".join(f"{name[:11]:>12}" for name in COLUMNS), end="")
    print("".join(f"{rival + '/ours':>14}" for rival in rivals) + ("  targets" if options.device == "cpu" else ""))
    for case in CASES[options.device]:
        try:
            row = time_case(contenders(case, options.device), options.seconds, options.device)
            if "kernel" in row:
                add_bandwidth(row, case.samples, case.bytes)
            rows[str(case)] = row
            print_row(str(case), row, rivals)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{case!s:24} out of memory: {str(error).partition('. ')[0]}", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if options.json:
            write_json(options.json, report)
    for rival in rivals:
        reasons = {reason for row in rows.values() if isinstance(reason := row.get(rival), str)}
        print(*(f"{rival}: {reason}" for reason in sorted(reasons)), sep="\n", end="\n" if reasons else "")


if __name__ == "__main__":
    main()
