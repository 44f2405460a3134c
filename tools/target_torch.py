"""Finds the torch to build against: that of the environment which the package is installed into.

An isolated build sees only what it asks for.  If it asked for torch it would download the newest one, several
GB, and link against that instead of the one the user runs.  So it borrows the user's: `find_torch` looks for
the environment that the installer works for and puts its packages at the end of `sys.path`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TORCH_REQUIREMENT = "torch>=2.11,<2.16"
_FIRST_MINOR, _LAST_MINOR = (2, 11), (2, 15)

_ISOLATING = ("PYTHONPATH", "PYTHONNOUSERSITE")
_QUERY = """
import importlib.metadata, json, sys
paths = [path for path in sys.path if path.endswith("-packages")]
print(json.dumps([sys.implementation.cache_tag, importlib.metadata.version("torch"), paths, sys.prefix]))
"""


def find_torch() -> str | None:
    """Makes the torch to build against importable; returns its version, or None if there is none.

    Raises:
        SystemExit: There is one that is not supported: an installer that went on would replace it.
    """
    tag, version, paths, prefix = sys.implementation.cache_tag, None, [], sys.prefix
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        for answer in filter(None, map(_ask, _target_pythons())):
            tag, version, paths, prefix = answer
            break
    if version is None or tag != sys.implementation.cache_tag:
        return None
    if not _FIRST_MINOR <= tuple(map(int, version.split(".")[:2])) <= _LAST_MINOR:
        sys.exit(
            f"dynloss_ext builds against {TORCH_REQUIREMENT}, but {prefix} has torch {version}: nothing was installed"
            f" or replaced; install another torch there first (pip install '{TORCH_REQUIREMENT}'), or use another"
            " environment"
        )
    sys.path.extend(path for path in paths if path not in sys.path)
    return version


def _ask(python: str) -> tuple[str, str, list[str], str] | None:
    """The tag, the torch version, the package folders and the prefix of an interpreter; None if it has no torch."""
    # pip isolates a build through these two variables alone.
    environ = {name: value for name, value in os.environ.items() if name not in _ISOLATING}
    command = [python, "-c", _QUERY]
    try:
        answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    tag, version, paths, prefix = json.loads(answer.stdout)
    return tag, version, paths, prefix


def _target_pythons() -> Iterator[str]:
    """The interpreters of the environments that this build may be for, the likeliest first."""
    yield sys.executable  # pip runs the build in the target's own interpreter
    # uv and `python -m build` run it in a throw-away environment: ask the process that called.
    try:
        parent = Path("/proc", str(os.getppid()))
        arguments = parent.joinpath("cmdline").read_text().split("\0")
        variables = parent.joinpath("environ").read_text().split("\0")
        environ = dict(variable.split("=", 1) for variable in variables if "=" in variable)
        folder = parent.joinpath("cwd").resolve(strict=True)
    except (OSError, UnicodeError):
        arguments, environ, folder = [""], dict(os.environ), Path.cwd()
    named = [value for flag, value in itertools.pairwise(arguments) if flag in ("-p", "--python")]
    named += [argument.partition("=")[2] for argument in arguments if argument.startswith("--python=")]
    named.append(environ.get("UV_PYTHON", ""))
    if Path(arguments[0]).name.startswith("python"):
        program = arguments[0]
        named.append(program if "/" in program else shutil.which(program, path=environ.get("PATH")) or "")
    named += [environ.get("VIRTUAL_ENV", ""), environ.get("CONDA_PREFIX", "")]
    named += [str(place / ".venv") for place in (folder, *folder.parents)]
    for name in filter(None, named):
        path = folder / name
        yield str(path / "bin" / "python" if path.is_dir() else path)
