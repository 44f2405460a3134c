"""A committed result, and where it comes from, as the benchmarks say it."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from machine import machine, write_json


def publish(out: Path | None, command: str, **figures: Any) -> None:
    """Prints what `command` has counted on this machine today, and writes it where that is asked for."""
    report = {"command": command, "machine": machine(), "date": datetime.date.today().isoformat(), **figures}
    print(json.dumps(report, indent=2))
    if out:
        write_json(out, report)
