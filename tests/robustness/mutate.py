"""Single faults in csrc, each of which some test must find.

    cd tests && python -m robustness.mutate --out robustness/results/mutate.json

Each fault is put into a copy of the tree, what changed is compiled anew, and the tests that fit are run until one
fails. A fault that survives needs a test. The file is written after each, and one that is there already is gone on
with, for the faults that it has not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from robustness.faults import FAULTS, Fault
from robustness.record import publish

ROOT = Path(__file__).parents[2]


def fits(fault: Fault) -> bool:
    """Whether its text is in its file once."""
    return (ROOT / "csrc" / fault.file).read_text().count(fault.text) == 1


def _run(tree: Path, *command: str, seconds: float) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DYNLOSS_EXT_CUDA": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    try:
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124, "took too long"
    return run.returncode, run.stdout + run.stderr


def _copy(tree: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    packed = subprocess.run(["tar", "--null", "-T-", "-c"], cwd=ROOT, input=names, capture_output=True, check=True)
    subprocess.run(["tar", "-x"], cwd=tree, input=packed.stdout, check=True)


def _build(tree: Path) -> None:
    code, output = _run(tree, sys.executable, "setup.py", "-q", "build_ext", "--inplace", seconds=1800)
    if code:
        raise SystemExit(f"does not compile:\n{output[-3000:]}")


def _tests(tree: Path, names: str) -> tuple[int, str]:
    files = [f"tests/test_{name}.py" for name in names.split()]
    return _run(tree, sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not cuda", *files, seconds=900)


def outcome(tree: Path, fault: Fault) -> dict[str, Any]:
    """Whether the tests notice, and which."""
    file = tree / "csrc" / fault.file
    good = file.read_text()
    try:
        file.write_text(good.replace(fault.text, fault.by))
        _build(tree)
        code, output = _tests(tree, fault.tests)
    finally:
        file.write_text(good)
    failed = next((line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))), output[-100:])
    return {
        **dict(zip(("file", "fault"), fault.name, strict=True)),
        "caught": code != 0,
        "by": failed[:150] if code else "",
    }


def told(out: Path | None, outcomes: list[dict[str, Any]]) -> bool:
    """Publishes what is known so far; whether every fault was caught."""
    survived, caught = ([one for one in outcomes if one["caught"] is so] for so in (False, True))
    counts = {"faults": len(FAULTS), "tried": len(outcomes)}
    publish(out, "python -m robustness.mutate", **counts, survived=survived, caught=caught)
    return not survived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="faults in files whose name holds this")
    parser.add_argument("--seconds", type=float, default=7200, help="begin none after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    outcomes = known.get("survived", []) + known.get("caught", [])
    tried = {(one["file"], one["fault"]) for one in outcomes}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        _copy(tree)
        _build(tree)
        for fault in FAULTS:
            if options.only in fault.file and fault.name not in tried and time.monotonic() < end:
                outcomes.append(outcome(tree, fault))
                told(options.out, outcomes)
    if not told(options.out, outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
