"""Everything that needs a GPU, in one call of less than nine minutes: `python tools/gpu_check.py --out FOLDER`.

Builds the extension for the GPU that is present in a copy of the tree, runs tests/test_cuda.py, runs the kernels
under compute-sanitizer where that works, checks the machine code, and times the loss against PyTorch, torch.compile
and a plain copy. Writes FOLDER/gpu_check.json and one log per part; exits with 1 if anything has failed. Parts that no
time is left for are recorded as skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: (rows, classes, dtype): the table of the README, then what exceeds the L2 cache.
SHAPES = [
    (300, 3, "float32"),
    (512, 10, "float32"),
    (65536, 3, "float32"),
    (65536, 10, "float32"),
    (65536, 10, "bfloat16"),
    (4096, 1000, "float32"),
    (4096, 1000, "bfloat16"),
    (4_000_000, 10, "float32"),
    (20_000_000, 3, "float32"),
    (1_000_000, 100, "float32"),
    (131072, 1000, "float32"),
    (131072, 1000, "bfloat16"),
    (8192, 32000, "float32"),
    (8192, 32000, "bfloat16"),
    (4096, 128256, "bfloat16"),
]
#: torch.compile takes seconds for each of its shapes.
COMPILED_SHAPES = [(512, 10, "float32"), (65536, 10, "float32"), (131072, 1000, "bfloat16"), (8192, 32000, "float32")]

SANITIZED = """
import torch
from dynloss_ext import Oscillation, dynamic_cross_entropy
for rows, classes in ((1, 1), (300, 3), (2000, 10), (40, 33), (300, 999), (5, 1025), (3, 60001)):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(rows, classes, device="cuda", dtype=dtype, requires_grad=True)
        target = torch.randint(classes, (rows,), device="cuda")
        target[::3] = -100
        oscillation = Oscillation(classes, 70, 100)
        loss = dynamic_cross_entropy(logits, target, oscillation, 3, label_smoothing=0.1)
        loss.backward()
        loss = dynamic_cross_entropy(logits, target, oscillation, 3)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (hessian,) = torch.autograd.grad(gradient.sum(), logits, create_graph=True)
        torch.autograd.grad(hessian.sum(), logits)
        torch.cuda.synchronize()
"""


# ---- parts


class Check:
    """Runs parts in time, keeps what they gave."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.report: dict[str, Any] = {"parts": {}}

    def run(self, name: str, command: list[str | Path], limit: float, **options: Any) -> bool:
        """Runs a command; its output goes to a log of the part's name."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 5:
            self.note(name, "skipped: no time left")
            return False
        start = time.monotonic()
        log = self.out / f"{name}.log"
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, **options
                ).returncode
                result = "ok" if code == 0 else f"failed: exit status {code}"
            except subprocess.TimeoutExpired:
                result = f"failed: took more than {limit:.0f} s"
            except OSError as error:
                result = f"unavailable: {error}"
        self.note(name, result, seconds=round(time.monotonic() - start, 1), end=log.read_text()[-1500:])
        return result == "ok"

    def note(self, name: str, result: str, **details: Any) -> None:
        self.report["parts"][name] = {"result": result, **details}
        print(f"{name:20} {result}  ({details.get('seconds', 0)} s)", flush=True)
        self.write()

    def write(self) -> None:
        path = self.out / "gpu_check.json"
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.report, indent=2) + "\n")
        os.replace(scratch, path)

    @property
    def failed(self) -> bool:
        return any(part["result"].startswith("failed") for part in self.report["parts"].values())


def copy_tree(to: Path) -> None:
    """What a build needs, without what was built here."""
    ignore = shutil.ignore_patterns("*.so", "build", "__pycache__", ".*")
    for name in ("csrc", "dynloss_ext", "tests", "tools", "python_examples"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, to / name)


def check_all(out: Path, seconds: float) -> bool:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no CUDA device")
    check = Check(out, seconds)
    properties = torch.cuda.get_device_properties(0)
    check.report["device"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        environment = {
            **os.environ,
            "DYNLOSS_EXT_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": f"{properties.major}.{properties.minor}",
            "MAX_JOBS": str(os.cpu_count()),
            "PYTHONPATH": str(tree),
        }
        python, here = sys.executable, {"cwd": tree, "env": environment}
        if not check.run("build", [python, "setup.py", "build_ext", "--inplace"], 240, **here):
            return False
        pytest = [python, "-m", "pytest", "-q", "-m", "not slow", "tests/test_cuda.py"]
        check.run("tests", pytest, 150, **here)
        module = next((tree / "dynloss_ext").glob("_C*.so"))
        check.run("machine_code", [python, "tools/check_sass.py", module], 60, **here)
        timings = out / "benchmark.json"
        check.run("benchmark", [python, tree / "tools" / "gpu_check.py", "--benchmark", timings], 120, **here)
        if timings.exists():
            check.report["benchmark"] = json.loads(timings.read_text())
        sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-c", SANITIZED]
            if not check.run(tool, command, 60, **here):
                # Some machines do not let it near the device: that says nothing of the kernels.
                part = check.report["parts"][tool]
                if "Device not supported" in part.get("end", ""):
                    check.note(tool, "unavailable: compute-sanitizer refuses the device")
    check.write()
    return not check.failed


# ---- timing


def milliseconds(run: Callable[[int], object], repeats: int = 30) -> float:
    """Median time of a call, between device events."""
    import torch

    for i in range(5):
        run(i)
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def replayed(run: Callable[[int], object], inner: int = 20) -> float:
    """Time of a call without the host's share: replays of a graph of `inner` calls."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inner):
            run(i)
    return milliseconds(lambda _: graph.replay()) / inner


def time_shape(rows: int, classes: int, dtype_name: str) -> dict[str, float]:
    """Milliseconds per contender, and the bandwidth of ours as a share of a copy's."""
    import torch
    import torch.nn.functional as F

    from dynloss_ext import Oscillation, dynamic_cross_entropy, loss_and_gradient

    dtype = getattr(torch, dtype_name)
    size = rows * classes * torch.empty(0, dtype=dtype).element_size()
    copies = max(1, min(16, (256 << 20) // size))  # so that a later call finds nothing in the cache
    logits = [torch.randn(rows, classes, device="cuda", dtype=dtype).requires_grad_() for _ in range(copies)]
    plain = [x.detach() for x in logits]
    target = torch.randint(classes, (rows,), device="cuda")
    oscillation = Oscillation(classes, 70, 100)
    number = torch.arange(classes, device="cuda")
    other = torch.empty_like(plain[0])

    def eager_loss(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return (gamma[target] * F.cross_entropy(x.float(), target, reduction="none")).mean()

    def gamma(step: int) -> torch.Tensor:
        t, active = step % 100, step // 100 % classes
        g = 1 + 138 * t / 100 if t < 50 else 139 - 138 * t / 100
        raw = torch.where(number == active, g, 1.0)
        return classes * raw / raw.sum()

    def trained(loss: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[int], None]:
        def run(i: int) -> None:
            x = logits[i % copies]
            x.grad = None
            loss(x, i).backward()

        return run

    ours = trained(lambda x, i: dynamic_cross_entropy(x, target, oscillation, i))
    result = {
        "copy": milliseconds(lambda i: other.copy_(plain[i % copies])),
        "ours": milliseconds(ours),
        "loss_and_gradient": milliseconds(
            lambda i: loss_and_gradient(plain[i % copies], target, oscillation, i, reduction="sum")
        ),
        "eager": milliseconds(trained(lambda x, i: eager_loss(x, gamma(i)))),
    }
    result["kernel"] = replayed(
        lambda i: torch.ops.dynloss.cross_entropy_with_gradient(
            plain[i % copies], target, i, None, oscillation.on(target.device)[0], None, None, 2, False, -100, 0.0
        )
    )
    if (rows, classes, dtype_name) in COMPILED_SHAPES:
        torch.compiler.reset()
        compiled = torch.compile(eager_loss, fullgraph=True, dynamic=False)
        result["compile"] = milliseconds(trained(lambda x, i: compiled(x, gamma(i))))
    result["copy_gbps"] = 2 * size / result["copy"] / 1e6
    result["kernel_gbps"] = (2 * size + 8 * rows) / result["kernel"] / 1e6
    return result


def benchmark(out: Path) -> None:
    import torch

    results: dict[str, Any] = {}
    print(f"{'shape':26}{'copy':>9}{'kernel':>9}{'GB/s':>7}{'of copy':>9}{'ours':>9}{'eager':>9}{'compile':>9}   (ms)")
    for rows, classes, dtype in SHAPES:
        name = f"{rows}x{classes}-{dtype}"
        try:
            x = time_shape(rows, classes, dtype)
        except torch.cuda.OutOfMemoryError:
            results[name] = "out of memory"
            continue
        finally:
            torch.cuda.empty_cache()
        results[name] = x
        print(
            f"{name:26}{x['copy']:9.4f}{x['kernel']:9.4f}{x['kernel_gbps']:7.0f}"
            f"{x['kernel_gbps'] / x['copy_gbps']:9.2f}{x['ours']:9.4f}{x['eager']:9.4f}"
            f"{x.get('compile', float('nan')):9.4f}",
            flush=True,
        )
        scratch = out.with_suffix(".tmp")
        scratch.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(scratch, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the report and the logs")
    parser.add_argument("--seconds", type=float, default=520, help="time for everything")
    parser.add_argument("--benchmark", type=Path, metavar="FILE", help="only time, with the dynloss_ext on the path")
    arguments = parser.parse_args()
    if arguments.benchmark is not None:
        benchmark(arguments.benchmark)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not check_all(arguments.out.resolve(), arguments.seconds):
        sys.exit(1)


if __name__ == "__main__":
    main()
