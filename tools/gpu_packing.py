"""What tools/pack_for_gpu.py makes and tools/gpu_check.py uses: a folder with the extension, built beforehand.

pack.json                 what it was built from and for
module/                   dynloss_ext/_C*.so and _build_info.json
gpu_guard                 the torch-free harness of the kernels, where the sources have it
site/NAME.tar.xz          a Python package each, unpacked where that machine lacks it
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: What the stages of the plan run from.
TREE = ("csrc", "dynloss_ext", "python_examples", "tests", "tools", "pyproject.toml", "setup.py", "README.md")
#: What the binaries are compiled from.
SOURCES = {"module": ("csrc/**/*", "setup.py"), "gpu_guard": ("csrc/**/*", "tests/cpp/*.h", "tests/cpp/gpu_guard*")}

_BUILT = ("*.so", "*.py[cod]", "__pycache__", "_build_info.json", "build", "runs", ".*")


def copy_tree(to: Path, root: Path = ROOT) -> None:
    """The tree without what was built or run in it."""
    for name in TREE:
        if (root / name).is_dir():
            shutil.copytree(root / name, to / name, ignore=shutil.ignore_patterns(*_BUILT), dirs_exist_ok=True)
        elif (root / name).is_file():
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, to / name)


def hash_of(files: Iterable[Path], root: Path) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def source_hash(what: str, root: Path = ROOT) -> str:
    found = {path for pattern in SOURCES[what] for path in root.glob(pattern)}
    return hash_of((path for path in found if path.is_file() and not _was_built(path, root)), root)


def tree_hash(root: Path = ROOT) -> str:
    """Of all that the plan runs from: two trees that agree in it do the same, whatever git says of them."""
    files: list[Path] = []
    for name in TREE:
        inside = (root / name).rglob("*") if (root / name).is_dir() else [root / name]
        files += [path for path in inside if path.is_file() and not _was_built(path, root)]
    return hash_of(files, root)


def _was_built(path: Path, root: Path) -> bool:
    relative = path.relative_to(root)
    return any(Path(part).match(pattern) for part in relative.parts for pattern in _BUILT)


def git_commit(root: Path = ROOT) -> str | None:
    """The commit, marked where the tree has changes; None where there is no repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=, with changes", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def read_pack(pack: Path) -> dict[str, Any]:
    """pack.json.

    Raises:
        ValueError: `pack` is no folder that tools/pack_for_gpu.py has finished.
    """
    try:
        content: dict[str, Any] = json.loads((pack / "pack.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--pack: expected a folder made by tools/pack_for_gpu.py, got {pack} ({error})") from None
    return content


def misfit(pack: Path, what: str, here: dict[str, Any], root: Path = ROOT) -> str | None:
    """Why the pack's `what` ("module" or "gpu_guard") is not used, or None where it fits.

    Args:
        here: the `python`, `torch` and `cuda` (minor versions) of this machine; those that it names must agree.
    """
    content = read_pack(pack)
    if what not in content["sources"]:
        return f"the pack has no {what}"
    if content["sources"][what] != source_hash(what, root):
        return f"the pack's {what} was built from other sources (commit {content['commit']})"
    for name, version in here.items():
        if content[name] != version:
            return f"the pack's {what} was built for {name} {content[name]}, this is {version}"
    return None


def unpack_site(pack: Path, site: Path, importable: Callable[[str], bool] | None = None) -> list[str]:
    """Unpacks the packages with a module that is not `importable` here; returns their names."""
    importable = importable or (lambda name: PathFinder.find_spec(name) is not None)
    lacking = []
    for name, modules in read_pack(pack)["packages"].items():
        archive = pack / "site" / f"{name}.tar.xz"
        if archive.is_file() and not all(map(importable, modules)):
            with tarfile.open(archive) as tar:
                tar.extractall(site, filter="data")
            lacking.append(name)
    return lacking


def size_of(folder: Path) -> int:
    """Bytes in the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
