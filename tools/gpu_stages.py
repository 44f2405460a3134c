"""The plans of tools/gpu_check.py: what each stage runs, for how long, and what is read from it afterwards."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON = "{python}"
EXAMPLES, BENCHMARKS = "python_examples", "tests/benchmarks"
#: What compute-sanitizer and ncu say where the machine does not let them near the device: nothing about our kernels.
REFUSED = ("Device not supported", "ERR_NVGPUCTRPERM", "Failed to initialize the profiler", "LibraryNotLoaded")


@dataclass(frozen=True)
class Artefacts:
    """Where a stage leaves what is read afterwards."""

    log: Path
    json: Path
    run: Path  # the folder of an example's run
    table: Path  # what ncu writes


@dataclass(frozen=True)
class Reading:
    """Numbers for the report; `result` and `reason` where they say more than the exit status."""

    numbers: Any = None
    result: str | None = None
    reason: str | None = None


Reader = Callable[[Artefacts, int], Reading]


def read_json(artefacts: Artefacts, code: int) -> Reading:
    """The stage's JSON, as far as it has come."""
    return Reading(json.loads(artefacts.json.read_text()) if artefacts.json.exists() else None)


def read_summary(artefacts: Artefacts, code: int) -> Reading:
    """The summary of an example's run."""
    path = artefacts.run / "summary.json"
    return Reading(json.loads(path.read_text()) if path.exists() else None)


def read_pytest(artefacts: Artefacts, code: int) -> Reading:
    """Counts and the names of what failed; tests that were all skipped have shown nothing."""
    text = artefacts.log.read_text(errors="replace")
    summary = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", summary)}
    # As each test ends, "NAME FAILED [ 12%]", or with workers "[gw3] [ 12%] FAILED NAME"; and in the summary.
    ended = re.findall(
        r"^(\S+::\S.*?) (FAILED|ERROR|PASSED)\b|^\[gw\d+\].*?\b(FAILED|ERROR|PASSED) (\S+)", text, re.MULTILINE
    )
    words = [(left or right, before or after) for before, left, right, after in ended]
    names = [name for word, name in words if word != "PASSED"] + re.findall(
        r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE
    )
    if not summary:  # ended before its time
        counts = {word.lower(): sum(other == word for other, _ in words) for word in ("PASSED", "FAILED", "ERROR")}
    numbers = {**counts, "failures": list(dict.fromkeys(names))}
    if code == 5:
        return Reading(numbers, "skipped", "there are no such tests")
    if code == 0 and not counts.get("passed"):
        return Reading(numbers, "failed", "no test has run, all were skipped")
    return Reading(numbers, reason=summary.strip("= ") or None)  # beside it, what a test has printed says little


def read_ncu(artefacts: Artefacts, code: int) -> Reading:
    """Of each launch its kernel and its metrics, with their units."""
    if not artefacts.table.exists():
        return Reading()
    lines = [line for line in artefacts.table.read_text(errors="replace").splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if row.get("Metric Name"):
            launch[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    if code == 0 and not launches:
        return Reading([], "failed", "ncu has seen no launch of ours")
    return Reading(list(launches.values()))


@dataclass(frozen=True)
class Stage:
    """One child process. Words in braces in its command are filled in by the runner; see `Runner.fill`."""

    name: str
    command: tuple[str, ...]
    limit: float  # seconds after which it is ended
    fixed: float = 0.0  # estimated seconds: fixed + work / processors, of which at most `width` help
    work: float = 0.0
    width: int = 16
    script: str = ""  # a file of the tree that it cannot do without
    program: str = ""  # one that must be on PATH
    artefact: str = ""  # what an earlier stage must have left
    dry: tuple[str, ...] | None = None  # without a GPU: this command, () for none, None for the script's --help
    needs_gpu: bool = True
    needs_data: bool = False
    goes_on: tuple[str, ...] = ()  # a run as long as there is time: the command that continues its checkpoint
    read: Reader = read_json

    def estimate(self, processors: int) -> float:
        """Seconds on a machine with so many processors."""
        return self.fixed + self.work / max(1, min(processors, self.width))


def script(name: str, path: str, *options: str, **fields: Any) -> Stage:
    return Stage(name, (PYTHON, path, *options), script=path, **fields)


def pytest(name: str, marks: str, limit: float, workers: bool, **fields: Any) -> Stage:
    """The tests that need a GPU; the processors share it, and each computes what it compares with on its own."""
    parallel = ("env", "OMP_NUM_THREADS={threads}") if workers else ()
    # Verbose: a run that is cut short has then named what had failed, and what it hung in is in its traceback.
    options = ("-v", "-rfE", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "-m", marks)
    command = (*parallel, PYTHON, "-m", "pytest", *options, *(("{xdist}",) if workers else ()), "{cuda_tests}")
    return Stage(name, command, limit, read=read_pytest, **fields)


def training(name: str, *options: str, **fields: Any) -> Stage:
    path = f"{BENCHMARKS}/compare_training.py"
    here = ("--device", "{device}", "--json", "{json}")
    return script(name, path, *here, "--rounds", "3", "--seconds", "0.5", *options, **fields)


def sanitizer(tool: str) -> Stage:
    options = ("--tool", tool, "--error-exitcode", "9", "{work}/gpu_guard", "--exact", "--seconds", "12")
    return Stage(
        tool,
        ("compute-sanitizer", *options),
        limit=45,  # it slows down what it watches
        fixed=15,
        script="tests/cpp/gpu_guard.sh",
        program="compute-sanitizer",
        artefact="{work}/gpu_guard",
        dry=(),
    )


LOAD = Stage(
    "load",
    (PYTHON, "{root}/tools/gpu_load.py", "--work", "{work}", "--json", "{json}", "{pack}"),
    limit=200,
    fixed=8,
    script="tools/gpu_load.py",
    dry=(PYTHON, "{root}/tools/gpu_load.py", "--work", "{work}", "--json", "{json}", "{pack}", "--dry"),
    needs_gpu=False,
)
#: Added to LOAD's estimate where there is no pack: the sources compiled by as many processors.
BUILD_SECONDS = (45.0, 200.0)
SMOKE = script(
    "smoke",
    "tools/gpu_smoke.py",
    *("--device", "{device}", "--json", "{json}"),
    limit=30,
    fixed=8,
    dry=(PYTHON, "tools/gpu_smoke.py", "--device", "cpu", "--json", "{json}"),
)
KERNELS = f"{BENCHMARKS}/gpu_kernels.py"
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")

CHECK = (
    LOAD,
    SMOKE,
    script("kernels", KERNELS, "table", "--json", "{json}", "--seconds", "{seconds}", limit=105, fixed=65),
    pytest(
        "correctness",
        "cuda and not slow",
        limit=110,
        workers=True,
        fixed=10,
        work=240,
        width=8,
        dry=(PYTHON, "-m", "pytest", "--collect-only", "-q", "-m", "cuda and not slow", "{cuda_tests}"),
    ),
    pytest("correctness_slow", "cuda and slow", limit=60, workers=False, fixed=12, dry=()),
    script("contenders", KERNELS, "contenders", "--json", "{json}", "--seconds", "{seconds}", limit=60, fixed=50),
    training("training", "--numerics", "bfloat16", limit=60, fixed=35),
    script(
        "graphs",
        f"{BENCHMARKS}/compare_graphs.py",
        *("--device", "{device}", "--json", "{json}", "--seconds", "0.1"),
        limit=45,
        fixed=14,
    ),
    script(
        "spiral",
        f"{EXAMPLES}/spiral_mlp.py",
        *("--device", "{device}", "--out", "{run}", "--steps", "2000"),
        limit=40,
        fixed=16,
        read=read_summary,
    ),
    script(
        "ensembles",
        f"{EXAMPLES}/myrtle5_cifar10.py",
        *("--ensemble", "--channels-last", "--synthetic", "--device", "{device}", "--out", "{run}"),
        *("--epochs", "20", "--peak-epoch", "10", "--stop-epoch", "15"),
        limit=60,
        fixed=28.5,
        read=read_summary,
    ),
    script(
        "curvature",
        f"{BENCHMARKS}/compare_eigensolvers.py",
        *("spiral", "--states", "8", "--gap", "50", "--device", "{device}", "--json", "{json}"),
        limit=60,
        fixed=25,
    ),
    script(
        "perceptrons",
        f"{BENCHMARKS}/compare_ensembles.py",
        *("--device", "{device}", "--rounds", "2", "--json", "{json}"),
        limit=40,
        fixed=8,
    ),
    Stage(
        "ncu",
        (
            *("ncu", "--target-processes", "all", "--clock-control", "none", "--profile-from-start", "off"),
            *("--kernel-name", "regex:forward_|derivative_"),
            *(word for section in NCU_SECTIONS for word in ("--section", section)),
            *("--csv", "--log-file", "{table}"),
            *(PYTHON, KERNELS, "profile", "--json", "{json}", "--seconds", "{seconds}"),
        ),
        limit=40,
        fixed=20,
        script=KERNELS,
        program="ncu",
        dry=(),
        read=read_ncu,
    ),
    script("sass", "tools/check_sass.py", "{module}", limit=40, fixed=12),
    Stage(
        "guard",
        (
            *("sh", "-c"),
            '[ -x "$0" ] || bash tests/cpp/gpu_guard.sh build "$0" "$1" && exec "$0" --seconds "$2"',
            *("{work}/gpu_guard", "{arch}", "10"),
        ),
        limit=80,  # most of it for a build, where there is no pack
        fixed=12,
        script="tests/cpp/gpu_guard.sh",
        dry=("bash", "-n", "tests/cpp/gpu_guard.sh"),
    ),
    *map(sanitizer, ("memcheck", "racecheck", "synccheck", "initcheck")),
    training("training_exact", "--numerics", "exact", "tf32", "--networks", "myrtle5", limit=80, fixed=40),
    training("training_compiled", "--compiled", limit=120, fixed=40, work=250),
)


def experiment(name: str, example: str, *options: str) -> Stage:
    path = f"{EXAMPLES}/{example}"
    here = ("--out", "{run}", "--device", "{device}", "{data}")
    return script(
        name,
        path,
        *here,
        *options,
        limit=0,  # what is left, in equal parts
        needs_data=True,
        goes_on=(PYTHON, path, "--resume", *here),
        read=read_summary,
    )


EXPERIMENTS = (
    LOAD,
    SMOKE,
    # Supplementary Fig. 3: 3 + 3 seeds, the paper's 700 epochs.
    experiment(
        "fig3", "myrtle5_cifar10.py", "--ensemble", "--channels-last", "--precision", "tf32", "--no-deterministic"
    ),
    # Supplementary Fig. 2: 3000 images, 10,000 steps.
    experiment("fig2", "myrtle5_bifurcations.py", "--channels-last"),
)

PLANS = {"check": CHECK, "experiments": EXPERIMENTS}
