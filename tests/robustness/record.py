"""Where a committed result comes from: as the benchmarks say it."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from machine import machine

__all__ = ["machine", "today"]


def today() -> str:
    """The date, as 2026-01-31."""
    return datetime.date.today().isoformat()
