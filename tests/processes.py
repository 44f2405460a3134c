"""Code in a process of its own, which finds the package under test as this one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dynloss_ext


def run_python(*arguments: str, timeout: float = 300, **variables: str) -> str:
    """What ``python ARGUMENTS`` prints, with these environment variables besides."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        cwd=Path(dynloss_ext.__file__).parents[1],  # elsewhere a source folder could hide the package
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
