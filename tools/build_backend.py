"""The build backend: setuptools, building against the torch of the environment that is installed into.

An isolated build sees only what it asks for.  If it asked for torch it would download the newest one, several
GB, and link against that instead of the one the user runs.  So it borrows the user's: `find_torch` looks for
the environment the installer works for and puts its packages at the end of `sys.path`.  Only where no fitting
torch is found does the build require one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "find_torch",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH_REQUIREMENT = "torch>=2.11,<2.15"
_FIRST_MINOR, _LAST_MINOR = (2, 11), (2, 14)

_QUERY = """
import importlib.metadata, json, sys
paths = [path for path in sys.path if path.endswith("-packages")]
print(json.dumps([sys.implementation.cache_tag, importlib.metadata.version("torch"), paths]))
"""


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    return [] if find_torch() else [TORCH_REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_wheel


def find_torch() -> str | None:
    """Makes the torch to build against importable; returns its version, or None if there is none that fits."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        return version if _supported(version) else None
    for python in _target_pythons():
        if answer := _ask(python):
            version, paths = answer
            sys.path.extend(path for path in paths if path not in sys.path)
            return version
    return None


def _supported(version: str) -> bool:
    major, minor = version.split(".")[:2]
    return _FIRST_MINOR <= (int(major), int(minor)) <= _LAST_MINOR


def _ask(python: str) -> tuple[str, list[str]] | None:
    """The torch version and the package folders that `python` sees, if its torch can be built against here."""
    # pip isolates a build through these two variables alone.
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    try:
        answer = subprocess.run([python, "-c", _QUERY], env=environ, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    tag, version, paths = json.loads(answer.stdout)
    return (version, paths) if tag == sys.implementation.cache_tag and _supported(version) else None


def _target_pythons() -> Iterator[str]:
    """The interpreters of the environments that this build may be for, the likeliest first."""
    yield sys.executable  # pip runs the build in the target's own interpreter
    # uv and `python -m build` run it in a throw-away environment: ask the process that called.
    try:
        parent = Path("/proc", str(os.getppid()))
        arguments = parent.joinpath("cmdline").read_text().split("\0")
        environ = dict(
            item.split("=", 1) for item in parent.joinpath("environ").read_text().split("\0") if "=" in item
        )
        folder = parent.joinpath("cwd").resolve(strict=True)
    except (OSError, UnicodeError):
        arguments, environ, folder = [""], dict(os.environ), Path.cwd()
    named = [after for flag, after in zip(arguments, arguments[1:]) if flag in ("-p", "--python")]
    named += [argument.partition("=")[2] for argument in arguments if argument.startswith("--python=")]
    named += [environ.get("UV_PYTHON", "")]
    if Path(arguments[0]).name.startswith("python"):
        named.append(arguments[0])
    named += [environ.get("VIRTUAL_ENV", ""), environ.get("CONDA_PREFIX", "")]
    named += [str(place / ".venv") for place in (folder, *folder.parents)]
    for name in filter(None, named):
        path = folder / name
        yield str(path / "bin" / "python" if path.is_dir() else path)
