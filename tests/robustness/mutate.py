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
from typing import Any, NamedTuple

from robustness.record import publish

ROOT = Path(__file__).parents[2]
AUTOGRAD = (
    "cross_entropy_autograd cross_entropy_graph cross_entropy cross_entropy_module cross_entropy_training"
    " cross_entropy_weight eager inplace_gradient"
)
LOSS = "cross_entropy cross_entropy_probabilities cross_entropy_weight oscillation confident_rows"
LANCZOS = "eigsh audits symmetry tracker spectrum operators"


class Fault(NamedTuple):
    """A text that is in a file once, by what it is replaced, and the tests that have to notice, in tests/test_*.py."""

    file: str
    text: str
    by: str
    tests: str

    @property
    def name(self) -> tuple[str, str]:
        """As outcomes have it."""
        return self.file, f"{self.text} -> {self.by}"


def _faults(file: str, tests: str, *edits: tuple[str, str]) -> list[Fault]:
    return [Fault(file, text, by, tests) for text, by in edits]


FAULTS = [
    *_faults(
        "autograd/cross_entropy.cpp",
        AUTOGRAD,
        ("divided_by / divisor);", "divisor / divided_by);"),
        ("at::where(divisor == 0, at::ones_like(divisor)", "at::where(divisor == 1, at::ones_like(divisor)"),
        ("if (factor.dim() == 1) factor", "if (factor.dim() == 3) factor"),
        ("gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat", "gradient.scalar_type()"),
        ("return one && divisors[0] == divisors[1];", "return one;"),
        ("return one && divisors[0]", "return divisors[0]"),
        ("if (!has_gradient_ || !constant) return", "if (!has_gradient_) return"),
        ("!tangent_of(grad_output).defined();\n    if", "true;\n    if"),
        ("if (!keep) gradient_.reset_data();", "gradient_.reset_data();"),
        ("if (keep || saved.use_count() > 1 ||", "if (keep ||"),
        ("logits.scalar_type() != at::kHalf;", "true;"),
        ("tangent_of(*weight).defined()),", "false),"),
        ("torch::autograd::impl::bump_version(logits);", ""),
        ("directions[i] = by;", "directions[0] = by;"),
        ("derivative(x, directions, at::ones_like(grad_output))", "derivative(x, directions, grad_output)"),
        ("if (task_should_compute_output(count + 1))", "if (false)"),
        ("result[count + 1] = derivative(x, with_direction(w, directions), grad_output);", "result[count + 1] = w;"),
        ("directions.size() < 2", "directions.size() < 3"),
        ("add(replaced(directions, i, t), grad_output)", "add(replaced(directions, i, t), at::ones_like(grad_output))"),
        ("add(with_direction(t, directions), grad_output);", ";"),
        ("at::sum(product, {ensemble ? 2 : 1}", "at::sum(product, {1}"),
        ("!in_transform() && !tangent_of(logits).defined() && !at::isTensorSubclassLike(logits),", "true,"),
    ),
    *_faults(
        "lanczos/eigsh.cpp",
        LANCZOS,
        ("kMissProbability = 0.08", "kMissProbability = 0.8"),
        ("kInconclusive = 0.5", "kInconclusive = 2.0"),
        ("kMaxAuditProducts = 24", "kMaxAuditProducts = 1"),
        ("if (side * *found <= side * bound) return;", "return;"),
        ("std::pow(epsilon_, 2.0 / 3.0) * scale_", "0.0 * scale_"),
        ("deceived_ = beyond() > before ? 0 : deceived_ + 1;", "deceived_ = 0;"),
        ("if (symmetry_.fails(", "if (false && symmetry_.fails("),
        ("(!options_.audit || audited_) &&", "true &&"),
        ("return ritz_.values[a] > ritz_.values[b]; });", "return false; });"),
        ("residual_norms_[pair] / basis_.unit();", "residual_norms_[pair];"),
    ),
    *_faults(
        "lanczos/start_vectors.cpp",
        LANCZOS,
        ("if (overlap < 0.0) std::transform", "if (false) std::transform"),
        ("taken[from] = true;", ""),
    ),
    *_faults(
        "lanczos/symmetry.cpp",
        LANCZOS,
        ("kMaxProducts = 4", "kMaxProducts = 0"),
        ("if (!op.is_differentiated()) negligible_", "negligible_"),
    ),
    *_faults(
        "lanczos/complement_probe.cpp",
        LANCZOS,
        ("for (double& entry : coupling) entry = -entry;", ""),
        ("off_diagonal_.push_back(ends ? 0.0 : length);", "off_diagonal_.push_back(length);"),
    ),
    *_faults(
        "layout.cpp",
        f"{LOSS} cross_entropy_autograd",
        ("x.size(d) == 1) continue;", "false) continue;"),
        ("return stride ? stride : single;", "return single;"),
        ("table() + member * table_rows() * classes_;", "table() + member * classes_;"),
    ),
    *_faults(
        "cpu/cross_entropy.cpp",
        LOSS,
        ("if (e == 0 || own_labels) {", "if (e == 0) {"),
        ("sum / normalizer[2 * e];", "sum / normalizer[0];"),
        ("index > 0 && weights[index] == weights[index - 1]", "index > 0"),
        ("std::min(first + chunk, layout.rows)", "first + chunk"),
        ("return ignored > 0;", "return false;"),
    ),
]


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
