"""What the figures of a benchmark depend on, what it says of one that it could not take, and the file of them all."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str | None:
    """That of the sources, and whether they had other changes; None where there is no repository."""
    root = Path(__file__).parents[2]
    try:
        command = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--dirty= with changes",
            "--abbrev=12",
            "--exclude=*",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and the software on it, and the day; with device "cuda" also the GPU."""
    description: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dynloss_ext": getattr(sys.modules.get("dynloss_ext"), "__version__", None),  # of those who use it
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        description["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return description


def one_line(error: BaseException) -> str:
    """An error's name and the first line of what it says: CUDA's go on with advice."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The file is whole at any time: the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(scratch, path)
