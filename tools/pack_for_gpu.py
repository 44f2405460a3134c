"""Makes the folder that tools/gpu_check.py takes to a GPU: `python tools/pack_for_gpu.py --out gpu_pack`.

Needs no GPU. The folder holds the extension, compiled against torch 2.11 with CUDA 13.0 for Python 3.12 and for the
compute capability 9.0 alone, the harness for compute-sanitizer, and the packages which the plan imports and such a
machine may lack: at most 60 MiB in all. quack-kernels is not among them, since the library that compiles its kernels
is larger than that. Nothing in it may need more than glibc 2.35 and the libstdc++ of GCC 12.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_packing import ROOT, SOURCES, git_commit, size_of, source_hash, tree_hash, unpack_site

TARGET = {"python": "3.12", "torch": "2.11", "cuda": "13.0"}
ARCHITECTURE = "9.0"
LIMIT = 60 << 20
#: The newest symbol versions that Ubuntu 22.04 has.
NEWEST = {"GLIBC": "2.35", "GLIBCXX": "3.4.30", "CXXABI": "1.3.13", "GOMP": "5.0.1"}
BUILD_TOOLS = ("setuptools>=77,<82", "ninja")
NVCC = "cuda-toolkit[nvcc,cccl]==13.0.*"
PACKAGES = ("pytest", "pytest-xdist", "hypothesis", "scipy", "tqdm", "tyro", "matplotlib")
#: Without what they ask for: torch is there.
BARE_PACKAGES = ("liger-kernel", "hessian-eigenthings==1.0.0a5", "pyhessian")
THERE = ("numpy", "torch", "triton")  # on any machine with torch
DROPPED = ("tests", "*.pyi", "*.data")


def run(*command: str | Path, **options: Any) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, **options)


# ---- the Python to build for


def choose_python(given: Path | None, scratch: Path) -> Path:
    """An interpreter with the target's torch: the one given, or one of an environment made here."""
    python = given
    if python is None:
        python = scratch / "venv/bin/python"
        if not python.exists():
            run(find_python(), "-m", "venv", scratch / "venv")
        run(python, "-m", "pip", "install", "-q", f"torch=={TARGET['torch']}.*", "numpy")
    code = "import sys, torch; print(*sys.version_info[:2], torch.__version__, torch.version.cuda)"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
    expected = "Python {python} with torch {torch} for CUDA {cuda}".format(**TARGET)
    if answer.returncode:
        sys.exit(f"--python: expected {expected}, got {python}, where {answer.stderr.splitlines()[-1]}")
    major, minor, torch, cuda = answer.stdout.split()
    found = {"python": f"{major}.{minor}", "torch": ".".join(torch.split(".")[:2]), "cuda": cuda}
    if found != TARGET:
        sys.exit(f"--python: expected {expected}, got Python {found['python']} with torch {torch} for CUDA {cuda}")
    return python.absolute()  # not resolve(): that of an environment is a link


def find_python() -> str:
    name = f"python{TARGET['python']}"
    found = shutil.which(name)
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        sys.exit(f"--python: expected an interpreter, since no {name} was found")
    return found


# ---- binaries


def build_environment(python: Path, scratch: Path) -> dict[str, str]:
    """With what a build needs besides torch, in a folder of its own; with nvcc where there is none."""
    tools = scratch / "tools"
    has_nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME") or Path("/usr/local/cuda/bin/nvcc").exists()
    wanted = BUILD_TOOLS if has_nvcc else (*BUILD_TOOLS, NVCC)
    if not (tools / "ninja").exists() or not (has_nvcc or nvcc_in(tools)):
        shutil.rmtree(tools, ignore_errors=True)
        run(python, "-m", "pip", "install", "-q", "--target", tools, *wanted)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    nvcc = {"NVCC": str(nvcc_in(tools))} if not shutil.which("nvcc") and nvcc_in(tools) else {}
    return (
        environment
        | nvcc
        | {
            "PYTHONPATH": str(tools),
            "PATH": os.pathsep.join((str(tools / "bin"), os.environ["PATH"])),
            "DYNLOSS_EXT_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": ARCHITECTURE,
            "MAX_JOBS": str(len(os.sched_getaffinity(0))),
        }
    )


def nvcc_in(tools: Path) -> Path | None:
    return next(tools.glob("nvidia/cu*/bin/nvcc"), None)


def build_module(python: Path, scratch: Path, environment: dict[str, str], to: Path) -> None:
    library = scratch / "lib"
    shutil.rmtree(library, ignore_errors=True)
    folders = ("--build-base", scratch, "--build-lib", library, "--build-temp", scratch / "objects")
    run(python, "setup.py", "-q", "build", *folders, cwd=ROOT, env=environment)
    to.mkdir()
    for pattern in ("_C*.so", "_build_info.json"):
        (built,) = (library / "dynloss_ext").glob(pattern)
        shutil.copy(built, to)


def check_symbols(binary: Path) -> dict[str, str]:
    """The newest version of each library's symbols that a binary needs; ends the program where one is too new."""
    text = subprocess.run(["objdump", "-p", binary], check=True, capture_output=True, text=True).stdout
    needed: dict[str, str] = {}
    for name, version in re.findall(rf"\b({'|'.join(NEWEST)})_([\d.]+)", text.partition("Version References:")[2]):
        needed[name] = max(needed.get(name, "0"), version, key=version_key)
    for name, version in needed.items():
        if version_key(version) > version_key(NEWEST[name]):
            sys.exit(
                f"{binary.name}: expected at most {name}_{NEWEST[name]}, needs {name}_{version}: use an older system"
            )
    return needed


def version_key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


# ---- packages


def download(python: Path, wheels: Path) -> list[Path]:
    """Wheels for the target, whatever this machine is."""
    shutil.rmtree(wheels, ignore_errors=True)
    newest = int(NEWEST["GLIBC"].split(".")[1])
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, newest + 1)] + ["manylinux2014_x86_64"]
    options: list[str | Path] = [
        "-q",
        "--only-binary=:all:",
        "--python-version",
        TARGET["python"],
        "--implementation",
        "cp",
        "-d",
        wheels,
    ]
    options += [f"--platform={name}" for name in platforms]
    run(python, "-m", "pip", "download", *options, *PACKAGES)
    run(python, "-m", "pip", "download", *options, "--no-deps", *BARE_PACKAGES)
    return sorted(path for path in wheels.glob("*.whl") if name_of(path) not in THERE)


def name_of(wheel: Path) -> str:
    return wheel.name.split("-")[0].lower().replace("_", "-")


def compress(wheel: Path, scratch: Path, site: Path) -> list[str]:
    """Puts a wheel's content into site/NAME.tar.xz, without its tests; returns the modules in it."""
    kept = scratch / "compressed" / f"{wheel.stem}.tar.xz"
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        for pattern in DROPPED:
            for path in list(Path(folder).rglob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            part = kept.with_suffix(".part")
            with tarfile.open(part, "w:xz") as tar:
                for path in sorted(Path(folder).iterdir()):
                    tar.add(path, path.name)
            os.replace(part, kept)
        modules = [path.parent.name for path in Path(folder).glob("*/__init__.py")]
        modules += [path.name.split(".")[0] for path in Path(folder).iterdir() if path.suffix in (".py", ".so")]
    shutil.copy(kept, site / f"{name_of(wheel)}.tar.xz")
    return sorted(set(modules))


# ---- the pack


def make(python: Path, scratch: Path, out: Path, without: Sequence[str]) -> dict[str, Any]:
    environment = build_environment(python, scratch)
    sources = {what: source_hash(what) for what in SOURCES}  # before the build: they may change meanwhile
    symbols = {}
    build_module(python, scratch, environment, out / "module")
    if (ROOT / "tests/cpp/gpu_guard.sh").exists():
        architecture = f"sm_{ARCHITECTURE.replace('.', '')}"
        run("bash", "tests/cpp/gpu_guard.sh", "build", out / "gpu_guard", architecture, cwd=ROOT, env=environment)
    else:
        del sources["gpu_guard"]
    for binary in (*out.glob("module/*.so"), *out.glob("gpu_guard")):
        symbols[binary.name] = check_symbols(binary)
    (out / "site").mkdir()
    wheels = [wheel for wheel in download(python, scratch / "wheels") if name_of(wheel) not in without]
    return {
        **TARGET,
        "architecture": ARCHITECTURE,
        "commit": git_commit(),
        "tree": tree_hash(),
        "sources": sources,
        "symbols": symbols,
        "packages": {name_of(wheel): compress(wheel, scratch, out / "site") for wheel in wheels},
    }


def check_size(out: Path) -> int:
    size = size_of(out)
    if size > LIMIT:
        found = f"expected at most {LIMIT >> 20} MiB, got {size / 2**20:.1f}"
        sys.exit(f"{out}: {found}: leave a package out (--without NAME)")
    return size


def verify(python: Path, out: Path) -> None:
    """As the plan will do it, in a clean folder: unpack, load, compute, import."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        load = ("--work", work, "--pack", out.absolute(), "--json", work / "load.json")
        run(python, ROOT / "tools/gpu_load.py", *load, cwd=work, env=environment)
        module = json.loads((work / "load.json").read_text())["module"]
        if module != "from the pack":
            sys.exit(f"{out}: expected its module to be used, got one {module}")
        unpack_site(out, work / "site", lambda name: False)
        environment["PYTHONPATH"] = os.pathsep.join((str(work / "tree"), str(work / "site")))
        run(python, "tools/gpu_smoke.py", "--device", "cpu", cwd=work / "tree", env=environment)
        modules = "scipy.sparse.linalg, matplotlib.pyplot, pytest, xdist, hypothesis, tqdm, tyro"
        names = [name for name in modules.split(", ") if (out / "site" / f"{package_of(name)}.tar.xz").exists()]
        run(python, "-c", f"import {', '.join(names)}", cwd=work, env=environment)


def package_of(module: str) -> str:
    return {"xdist": "pytest-xdist"}.get(module, module.partition(".")[0])


def show(out: Path, size: int, pack: dict[str, Any]) -> None:
    print(f"\n{out}: {size / 2**20:.1f} MiB of at most {LIMIT >> 20}, commit {pack['commit']}")
    for path in sorted((path for path in out.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size):
        print(f"{path.stat().st_size:12,}  {path.relative_to(out)}")
    for name, needed in pack["symbols"].items():
        print(f"{name} needs", ", ".join(f"{library}_{version}" for library, version in sorted(needed.items())))
    if "gpu_guard" not in pack["sources"]:
        print("without gpu_guard: the sources have no tests/cpp/gpu_guard.sh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "gpu_pack", help="folder to make, or an earlier pack to replace"
    )
    parser.add_argument("--python", type=Path, help="one with the target's torch (default: an environment made for it)")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="packages to leave out")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "build/gpu_pack", help="objects and wheels, for next time"
    )
    arguments = parser.parse_args()
    out, scratch = arguments.out.absolute(), arguments.scratch.absolute()
    if out.exists() and any(out.iterdir()):
        if not (out / "module").is_dir():
            parser.error(f"--out: expected a new folder or an earlier pack, got {out}")
        shutil.rmtree(out)
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    python = choose_python(arguments.python, scratch)
    try:
        pack = make(python, scratch, out, arguments.without)
        size = check_size(out)
        (out / "pack.json").write_text(json.dumps(pack, indent=2) + "\n")  # last: a folder without it is unfinished
        verify(python, out)
    except BaseException as error:
        (out / "pack.json").unlink(missing_ok=True)
        if isinstance(error, subprocess.CalledProcessError):
            sys.exit(f"pack_for_gpu: failed with exit status {error.returncode}: {' '.join(map(str, error.cmd))}")
        raise
    show(out, size, pack)


if __name__ == "__main__":
    main()
