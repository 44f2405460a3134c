"""Everything that needs a GPU, in one call of less than nine minutes: `python tools/gpu_check.py --out FOLDER`.

Builds the extension for the GPU that is present in a copy of the tree, runs tests/test_cuda*.py, checks the machine
code, runs the kernels under compute-sanitizer where that works, compares the eigensolvers
(tests/benchmarks/compare_eigensolvers.py), and times the loss against PyTorch, torch.compile, the peers that are
installed (`pip install .[bench]`) and a plain copy (tests/benchmarks/compare_losses.py). Writes
FOLDER/gpu_check.json, which describes the machine, and one log per part; exits with 1 if anything has failed. Parts
that no time is left for are recorded as skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from machine import machine  # noqa: E402

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


class Check:
    """Runs parts in time, keeps what they gave."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.report: dict[str, Any] = {"machine": machine("cuda"), "parts": {}}

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
    check = Check(out, seconds)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        environment = {
            **os.environ,
            "DYNLOSS_EXT_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": check.report["machine"]["gpu"]["capability"],
            "MAX_JOBS": str(os.cpu_count()),
            "PYTHONPATH": str(tree),
        }
        python, here = sys.executable, {"cwd": tree, "env": environment}
        if not check.run("build", [python, "setup.py", "build_ext", "--inplace"], 180, **here):
            return False
        pytest = [python, "-m", "pytest", "-q", "-m", "not slow", "tests/test_cuda.py", "tests/test_cuda_curvature.py"]
        check.run("tests", pytest, 120, **here)
        module = next((tree / "dynloss_ext").glob("_C*.so"))
        check.run("machine_code", [python, "tools/check_sass.py", module], 40, **here)
        run_sanitizers(check, python, here)
        benchmarks = {
            "eigensolvers": (["compare_eigensolvers.py", "spiral", "--states", "10", "--gap", "50"], 60),
            "benchmark": (["compare_losses.py", "--seconds", "1"], seconds),
        }
        for name, ((script, *options), limit) in benchmarks.items():
            timings = out / f"{name}.json"
            timings.unlink(missing_ok=True)
            command = [python, f"tests/benchmarks/{script}", *options, "--device", "cuda", "--json", timings]
            check.run(name, command, limit, **here)
            if timings.exists():  # as far as it has come
                check.report[name] = json.loads(timings.read_text())
    check.write()
    return not check.failed


def run_sanitizers(check: Check, python: str, here: dict[str, Any]) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    for tool in ("memcheck", "racecheck", "synccheck"):
        command: list[str | Path] = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-c", SANITIZED]
        if not check.run(tool, command, 40, **here):
            # Some machines do not let it near the device: that says nothing of the kernels.
            part = check.report["parts"][tool]
            if "Device not supported" in part.get("end", ""):
                check.note(tool, "unavailable: compute-sanitizer refuses the device")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the report and the logs")
    parser.add_argument("--seconds", type=float, default=520, help="time for everything")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no CUDA device")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not check_all(arguments.out.resolve(), arguments.seconds):
        sys.exit(1)


if __name__ == "__main__":
    main()
