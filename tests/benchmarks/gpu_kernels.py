"""The CUDA kernels on a GPU against a copy of the same bytes and against their peers, within a time that is given.

    python tests/benchmarks/gpu_kernels.py table --json table.json --seconds 90
    python tests/benchmarks/gpu_kernels.py contenders --json contenders.json --seconds 120
    ncu --profile-from-start off python tests/benchmarks/gpu_kernels.py profile --json profile.json --seconds 60

`table` captures several calls in a CUDA graph, each on inputs and outputs of its own that together exceed the L2
cache several times, and next to it copies of as many bytes in a graph of the same kind; graphs are replayed by
turns. A last replay over outputs filled with NaN is compared with float64. `contenders` times whole forward and
backward passes by turns, the host's share included. `profile` launches one kernel of each kind for a profiler.

The JSON is written anew after each row; a row for which no time is left is recorded as skipped. The time counts from
when PyTorch is loaded. `--dry-run` prints the rows with their bytes and goes through the same code on a CPU, at small
shapes. The exit status is 1 if a row is wrong or fails.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from compare_losses import cpu_round, cuda_round
from graph_timing import Calls, Gpu, Rehearsal, by_turns
from kernel_rows import REGIMES, STEP, Inputs, Result, Row, parse_shape, select, table_rows
from loss_contenders import AMPLITUDE, PEERS, PERIOD, Case, Contender, Steps, contenders
from machine import machine, one_line
from time_budget import Budget, Report, Results, device_error, go_through

import dynloss_ext

#: GB/s of a copy on an H100, for floors where nothing can be measured.
NOMINAL_GBPS = 3000.0
GRAPH_SECONDS = 1e-3  # what a graph should last at least: its launch then counts for nothing
MAX_CALLS = 10_000
HIDDEN = 1024  # features in front of the classes, where a linear layer belongs to the comparison


# ---- the table


def copies(half: int, sets: int, device: str) -> dict[str, Calls]:
    """Ways to read `half` bytes and to write as many: the runtime's copy, and a kernel of PyTorch's."""
    size = max(half // 4, 1)
    source = [torch.randn(size, device=device) for _ in range(sets)]
    to = [torch.empty(size, device=device) for _ in range(sets)]
    pairs = list(zip(source, to, strict=True))
    return {
        "memcpy": [lambda a=a, b=b: b.copy_(a) for a, b in pairs],
        "elementwise": [lambda a=a, b=b: torch.neg(a, out=b) for a, b in pairs],
    }


def calls_per_graph(sets: int, moved: int) -> int:
    """A multiple of the sets that fills the time a graph should last."""
    one = max(moved / (NOMINAL_GBPS * 1e9), 2e-6)
    rounds = math.ceil(GRAPH_SECONDS / one / sets)
    return sets * max(1, min(rounds, MAX_CALLS // sets))


def poison(results: list[Result]) -> None:
    for result in results:
        for tensor in (result.loss, result.derivative):
            if tensor is not None:
                tensor.fill_(math.nan)


def measure(row: Row, bench: Gpu | Rehearsal, ceiling_gbps: float, seconds: float) -> Report:
    """Times, bandwidths and errors of one row."""
    sets = bench.sets(row.moved)
    count = calls_per_graph(sets, row.moved) if isinstance(bench, Gpu) else sets
    inputs = Inputs(row, sets, bench.device)
    ours = bench.make(inputs.calls(), count)
    graphs = {"ours": ours}
    for name, calls in copies(row.moved // 2, sets, bench.device).items():
        graphs[name] = bench.make(calls, count)
    times = by_turns(lambda: bench.round(graphs), seconds)
    poison(ours.results)
    ours.replay()
    if bench.device == "cuda":
        torch.cuda.synchronize()
    copy = min(times["memcpy"]["us"], times["elementwise"]["us"])
    us, floor = times["ours"]["us"], row.moved / ceiling_gbps / 1e3
    return {
        "bytes": row.moved,
        "sets": sets,
        "calls": count,
        "cold": sets * row.moved > 3 * bench.l2_bytes,
        **times["ours"],
        "memcpy_us": times["memcpy"]["us"],
        "elementwise_us": times["elementwise"]["us"],
        "gbps": row.moved / us / 1e3,
        "copy_gbps": row.moved / copy / 1e3,
        "of_copy": copy / us,
        "floor_us": floor,
        "of_floor": floor / us,
        **inputs.errors(ours.results),
    }


def ceiling(bench: Gpu | Rehearsal) -> float:
    """GB/s of the faster of two large copies, bytes read and bytes written."""
    half = 1 << 30 if isinstance(bench, Gpu) else 1 << 20
    graphs = {name: bench.make(calls, 4) for name, calls in copies(half, 2, bench.device).items()}
    times = by_turns(lambda: bench.round(graphs), 0.0, fewest=10)
    return max(2 * half / x["us"] / 1e3 for x in times.values())


def describe_rows(rows: list[Row], gbps: float) -> None:
    print(f"{'row':34}{'bytes':>14}{'floor us':>10}   at {gbps:.0f} GB/s")
    for row in rows:
        print(f"{row!s:34}{row.moved:14d}{row.moved / gbps / 1e3:10.1f}")


def show_table(name: str, row: Report) -> None:
    if "error" in row:
        print(f"{name:34} {row['error']}", flush=True)
        return
    errors = " ".join(f"{row[key]:.1e}" for key in ("derivative_error", "loss_error") if key in row)
    figures = f"{row['us']:10.2f} us {row['gbps']:8.0f} GB/s {row['of_copy']:6.2f} of a copy's {row['copy_gbps']:5.0f}"
    print(f"{name:34}{figures}  errors {errors}{'' if row['ok'] else '  WRONG'}", flush=True)


def run_table(options: argparse.Namespace, bench: Gpu | Rehearsal, budget: Budget, results: Results) -> None:
    rows = select(table_rows(), options.only)
    if options.dry_run:
        describe_rows(rows, NOMINAL_GBPS)
    gbps = results.report["ceiling_gbps"] = ceiling(bench)
    print(f"large copy: {gbps:.0f} GB/s")

    def of(row: Row) -> Callable[[float], Report]:
        there = row.shrunk() if options.dry_run else row
        return lambda seconds: with_copy(measure(there, bench, gbps, seconds))

    def with_copy(measured: Report) -> Report:
        by_bytes = results.report["copy_gbps"]
        by_bytes[measured["bytes"]] = max(measured["copy_gbps"], by_bytes.get(measured["bytes"], 0.0))
        results.report["copy_gbps"] = dict(sorted(by_bytes.items()))
        return measured

    go_through({str(row): of(row) for row in rows}, results, budget, 0.5, show_table)


# ---- contenders

Candidates = dict[str, Contender | str]


def losses_of(case: Case, device: str) -> Candidates:
    """Forward and backward passes of the loss."""
    candidates = contenders(case, device)
    if device == "cpu":
        candidates |= {"compile": "not run without a GPU"} | dict.fromkeys(PEERS, "not run without a GPU")
    return candidates


def products_of(case: Case, device: str) -> Candidates:
    """Hessian of the loss in the logits times v, where all rows count."""
    inputs = Inputs(Row(case.samples, case.classes, case.dtype, "hessian"), 1, device)
    logits, v, target = inputs.logits[0], inputs.v[0], inputs.target[0]
    gamma = inputs.oscillation.weights(STEP).to(device, torch.float32)

    def eager() -> torch.Tensor:
        p = torch.softmax(logits.float(), -1)
        pv = p * v
        return (gamma[target][:, None] * (pv - p * pv.sum(-1, keepdim=True))).to(logits.dtype)

    candidates: Candidates = {"ours": Contender(lambda: inputs.call(0)), "eager": Contender(eager)}
    try:
        product = importlib.import_module("hessian_eigenthings.loss_fns._fused_ce_hvp").triton_ce_hvp
    except Exception as error:
        candidates["hessian-eigenthings"] = f"not installed ({one_line(error)})"
    else:  # weights of rows go where it has its mask
        candidates["hessian-eigenthings"] = Contender(lambda: product(logits, v, gamma[target], 1.0))
    return candidates


def linear_of(case: Case, device: str) -> Candidates:
    """A linear layer and the loss behind it, forward and backward."""
    steps = Steps(Case(1, case.classes, case.dtype), device)  # for Γ alone
    target = torch.randint(case.classes, (case.samples,), device=device)
    features = torch.randn(case.samples, HIDDEN, device=device).to(case.dtype).requires_grad_()
    layer = (torch.randn(case.classes, HIDDEN, device=device) / HIDDEN**0.5).to(case.dtype).requires_grad_()
    oscillation = dynloss_ext.Oscillation(case.classes, AMPLITUDE, PERIOD)

    def contender(loss: Callable[[], torch.Tensor]) -> Contender:
        def run() -> torch.Tensor | None:
            steps.advance()
            features.grad = layer.grad = None
            loss().backward()
            return features.grad

        return Contender(run)

    def ours() -> torch.Tensor:
        return dynloss_ext.dynamic_cross_entropy(F.linear(features, layer), target, oscillation, steps.step)

    def eager() -> torch.Tensor:
        weight = steps.eager_weights().to(case.dtype)
        return F.cross_entropy(F.linear(features, layer), target, weight, reduction="sum") / case.samples

    candidates: Candidates = {"ours": contender(ours), "eager": contender(eager)}
    fused = getattr(F, "linear_cross_entropy", None)
    make_options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if fused is None or make_options is None:
        candidates["linear_cross_entropy"] = f"not installed (torch {torch.__version__} has none)"
        return candidates

    def chunked() -> torch.Tensor:
        weight = steps.eager_weights().to(case.dtype)
        loss = fused(features, layer, target, weight=weight, reduction="sum", options=make_options())
        return loss / case.samples

    candidates["linear_cross_entropy"] = contender(chunked)
    return candidates


#: The most telling first: a vocabulary in bfloat16, the small problems of the experiments, ImageNet.
CONTENDED = [
    Case(8192, 32000, torch.bfloat16),
    Case(65536, 10, torch.float32),
    Case(4096, 1000, torch.float32),
    Case(512, 10, torch.float32),
    Case(4096, 128256, torch.bfloat16),
    Case(4096, 1000, torch.bfloat16),
    Case(8192, 32000, torch.float32),
    Case(65536, 10, torch.bfloat16),
    Case(512, 10, torch.bfloat16),
    Case(4096, 128256, torch.float32),
]

GROUPS = {"loss": losses_of, "hessian": products_of, "linear": linear_of}


def compare(group: str, case: Case, bench: Gpu | Rehearsal, seconds: float) -> Report:
    """Median and minimum of each contender, or in one line why there is none."""
    runs: dict[str, Contender] = {}
    row: Report = {}
    for name, candidate in GROUPS[group](case, bench.device).items():
        if isinstance(candidate, str):
            row[name] = candidate
            continue
        try:
            candidate.run()
            if bench.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            row[name] = f"failed ({one_line(error)})"
            if dead := device_error():
                raise RuntimeError(f"{name}: {dead}") from error
        else:
            runs[name] = candidate
    if "ours" not in runs:
        raise RuntimeError(f"ours {row.get('ours')}")
    one_round = cuda_round if bench.device == "cuda" else cpu_round
    return row | by_turns(lambda: one_round(runs), seconds)


def show_contenders(name: str, row: Report) -> None:
    if "error" in row:
        print(f"{name:34} {row['error']}", flush=True)
        return
    figures = [f"{key} {x['us']:.1f}" if isinstance(x, dict) else f"{key}: {x[:60]}" for key, x in row.items()]
    print(f"{name:34} us: " + ", ".join(figures), flush=True)


def run_contenders(options: argparse.Namespace, bench: Gpu | Rehearsal, budget: Budget, results: Results) -> None:
    cases = options.only or CONTENDED

    def of(group: str, case: Case) -> Callable[[float], Report]:
        there = Case(min(case.samples, 40), min(case.classes, 50), case.dtype) if options.dry_run else case
        return lambda seconds: compare(group, there, bench, seconds)

    # Where the classes are few there is nothing to gain from a fusion with the linear layer.
    rows = {
        f"{case}-{group}": of(group, case)
        for case in cases
        for group in GROUPS
        if group != "linear" or case.classes >= 1000
    }
    if options.dry_run:
        print(*rows, sep="\n")
    go_through(rows, results, budget, 1.0, show_contenders)


# ---- profile


def launch_for_profiler(row: Row, bench: Gpu | Rehearsal, launches: int) -> Report:
    """Launches of one kernel between the profiler's start and stop."""
    inputs = Inputs(row, 2, bench.device)
    inputs.call(0)
    if bench.device == "cpu":
        return {"launches": launches, "bytes": row.moved, **inputs.errors([inputs.call(0)])}
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        results = [inputs.call(i % 2) for i in range(launches)]
        torch.cuda.synchronize()
    return {"launches": launches, "bytes": row.moved, **inputs.errors(results[:2])}


def run_profile(options: argparse.Namespace, bench: Gpu | Rehearsal, budget: Budget, results: Results) -> None:
    cases = options.only or list(REGIMES)
    rows = [Row(case.samples, case.classes, case.dtype) for case in cases]
    if options.dry_run:
        describe_rows(rows, NOMINAL_GBPS)

    def of(row: Row) -> Callable[[float], Report]:
        there = row.shrunk() if options.dry_run else row
        return lambda seconds: launch_for_profiler(there, bench, launches=2)

    go_through({str(row): of(row) for row in rows}, results, budget, 1.0, lambda name, row: print(name, row))


# ---- the command

STAGES = {"table": run_table, "contenders": run_contenders, "profile": run_profile}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--seconds", type=float, required=True, help="time for everything")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROWSxCLASSES:DTYPE", help="shapes to measure")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU; the numbers mean nothing")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds: expected a number > 0, got {options.seconds}")
    if not options.json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that exists, got {options.json}")
    try:
        options.only = [parse_shape(text) for text in options.only]
    except ValueError as error:
        parser.error(str(error))
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run needs none")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    budget = Budget(options.seconds)
    bench: Gpu | Rehearsal = Rehearsal() if options.dry_run else Gpu()
    head = {
        "stage": options.stage,
        "dry_run": options.dry_run,
        "unit": "microseconds per call: median (us) and minimum (us_min)",
        "machine": machine(bench.device) | {"dynloss_ext": dynloss_ext.__version__},
    }
    if options.stage == "table":  # of a large copy, and of the best as large as each row, by bytes read and written
        head |= {"ceiling_gbps": None, "copy_gbps": {}}
    results = Results(options.json, head)
    STAGES[options.stage](options, bench, budget, results)
    skipped = sum("skipped" in row for row in results.rows.values())
    print(f"{len(results.rows)} rows, {skipped} skipped{', some failed' if results.failed else ''}")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
