"""What the figures of a benchmark depend on."""

from __future__ import annotations

import platform
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


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and the software on it; with device "cuda" also the GPU."""
    description: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
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
