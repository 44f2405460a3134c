"""Stages in small, run here by the runner of `tools/gpu_check.py`."""

from __future__ import annotations

import json
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from gpu_runner import Results, Runner
from gpu_stages import Stage

ROOT = Path(__file__).parents[1]
HEAD = {"plan": "check", "dry_run": False, "tree": "0123", "commit": "abc", "card": "NVIDIA H100"}


def make_runner(out: Path, work: Path, *, seconds: float = 60, **fields: Any) -> Runner:
    results = Results(out, work, "gpu_check", HEAD)
    (work / "tree").mkdir(exist_ok=True)
    values: dict[str, str | list[str]] = {"root": str(ROOT), "python": sys.executable, "data": ["--synthetic"]}
    return Runner(results, values, end=time.monotonic() + seconds, cwd=work / "tree", **({"grace": 0.3} | fields))


def python(name: str, code: str, limit: float = 20, **fields: Any) -> Stage:
    return Stage(name, ("{python}", "-c", code), limit, **fields)


def entries(out: Path) -> dict[str, dict[str, Any]]:
    report: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return dict(report["stages"])


def archived(out: Path) -> set[str]:
    with tarfile.open(out / "gpu_check.tar.gz") as tar:
        return set(tar.getnames())


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(process: int) -> bool:
    """Whether it is gone soon: a signal takes its time on a busy machine."""
    end = time.monotonic() + 5
    while is_running(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(process)


def wait_for(path: Path) -> str:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    return path.read_text()


#: Starts a grandchild, which writes its number, and what it hears. Both are deaf to SIGTERM if they shall be.
FAMILY = """
import signal, subprocess, sys, time
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("from the child")
trap = "" if {deaf} else "trap 'echo heard > {file}.heard; exit' TERM;"
grandchild = subprocess.Popen(["sh", "-c", trap + "echo $$ > {file}; while :; do sleep 0.1; done"])
while {seconds}:
    time.sleep(60)
while True:
    try:
        open("{file}").read(1)
        break
    except OSError:
        time.sleep(0.01)
"""
