"""Builds `dynloss_ext._C`; the static metadata is in pyproject.toml.

Environment variables: `DYNLOSS_EXT_CUDA` (0: without CUDA, 1: with CUDA or fail; default: with CUDA where
torch has it and nvcc is found), `TORCH_CUDA_ARCH_LIST`, `CUDA_HOME`, `CXX`, `MAX_JOBS`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from target_torch import TORCH_REQUIREMENT, find_torch  # noqa: E402

VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "dynloss_ext" / "__init__.py").read_text(), re.MULTILINE)[0]
REQUIREMENTS = ["numpy>=1.24", "matplotlib>=3.7"]
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
# Without OpenMP at::parallel_for would silently be a loop.
CXX_FLAGS = ["-O2", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden"]


def output_of(*command: str | Path) -> str:
    """What `command` prints, standard error included; empty if it cannot be run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def toolkit_of(nvcc: Path) -> Path | None:
    """The CUDA toolkit that `nvcc` belongs to: it may be a link or a script that starts the real one."""
    here = re.search(r"^#\$ _HERE_=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    return Path(here[1]).resolve().parent if here else None


def find_cuda_toolkit() -> Path | None:
    """The toolkit of $CUDA_HOME, else of the nvcc on $PATH, of the Python packages, or of /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        candidates = [Path(home, "bin", "nvcc")]
    else:
        candidates = [Path(found)] if (found := shutil.which("nvcc")) else []
        for path in sys.path:
            candidates += Path(path).glob("nvidia/cu*/bin/nvcc")
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next(filter(None, map(toolkit_of, candidates)), None)


def choose_cuda(torch_cuda: str | None) -> Path | None:
    """The toolkit to compile the CUDA kernels with, or None to build without them."""
    wish = os.environ.get("DYNLOSS_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"DYNLOSS_EXT_CUDA must be 0, 1 or unset, not {wish!r}")
    if wish == "0" or (wish == "" and torch_cuda is None):
        return None
    if torch_cuda is None:
        sys.exit("DYNLOSS_EXT_CUDA=1, but this torch was built without CUDA: install a CUDA build of torch")
    toolkit = find_cuda_toolkit()
    if toolkit is None:
        if wish == "1":
            sys.exit("DYNLOSS_EXT_CUDA=1, but nvcc was not found: put it on PATH or set CUDA_HOME")
        print("dynloss_ext: nvcc was not found, building without CUDA kernels", file=sys.stderr)
        return None
    release = re.search(r"release (\d+)\.(\d+)", output_of(toolkit / "bin" / "nvcc", "--version"))
    major = torch_cuda.split(".")[0]
    if release is None or release[1] != major:
        sys.exit(
            f"nvcc in {toolkit} is {release and release[0]}, but torch was built for CUDA {torch_cuda}: set"
            f" CUDA_HOME to a CUDA {major} toolkit, or DYNLOSS_EXT_CUDA=0 to build without CUDA kernels"
        )
    return toolkit


def default_architectures(nvcc: Path) -> str:
    """CUDA_ARCHITECTURES as far as nvcc knows them, with PTX of the newest for what comes after it."""
    known = output_of(nvcc, "--list-gpu-arch").split()
    chosen = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    if not chosen:
        sys.exit(f"{nvcc} knows none of {', '.join(CUDA_ARCHITECTURES)}: set TORCH_CUDA_ARCH_LIST")
    return ";".join(chosen) + "+PTX"


def check_architectures(architectures: str) -> None:
    """The kernels copy asynchronously."""
    if any(int(major) < 8 for major in re.findall(r"(\d+)\.\d", architectures)):
        sys.exit(f"TORCH_CUDA_ARCH_LIST: expected 8.0 and later, got {architectures}")


def build_with_note(build_info: dict[str, Any]) -> type:
    """A command that leaves a note beside the module: dynloss_ext/_extension.py reads it before it loads the module."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithNote(BuildExtension):
        def run(self) -> None:
            super().run()
            module = Path(self.get_ext_fullpath("dynloss_ext._C"))
            module.with_name("_build_info.json").write_text(json.dumps(build_info, indent=2) + "\n")

    return BuildWithNote


def extension() -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of setup() that build against the torch that is importable, and the note on the build."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        sys.exit("Python.h was not found: install the Python headers (Debian: apt-get install python3-dev)")
    import torch

    toolkit = choose_cuda(torch.version.cuda)
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # cpp_extension reads it when it is imported
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(toolkit / "bin" / "nvcc")
        check_architectures(architectures)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    from torch.utils.cpp_extension import CppExtension, get_cxx_compiler, include_paths

    compiler = output_of(get_cxx_compiler(), "--version").partition("\n")[0]
    # torch's headers make gcc collect its garbage again and again, a sixth of its time, unless it may use more memory.
    memory = [] if "clang" in compiler else ["--param=ggc-min-heapsize=1048576"]
    build_info = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if toolkit else None,
        "cuda_architectures": re.split("[; ]+", architectures) if toolkit else [],
        "compiler": compiler,
        "flags": CXX_FLAGS,
    }

    sources = [path.relative_to(ROOT) for path in sorted(ROOT.glob("csrc/**/*")) if path.suffix in (".cpp", ".cu")]
    # The version is part of the command, so that objects compiled against another torch are not used again.
    macros = [("DYNLOSS_BUILT_FOR_TORCH", torch.__version__)]
    libraries = []
    include_dirs = [str(ROOT / "csrc")]
    if toolkit is None:
        sources = [path for path in sources if path.parent.name != "cuda"]
    else:
        include_dirs += include_paths(device_type="cuda")
        libraries += ["c10_cuda", "torch_cuda", f":libcudart.so.{torch.version.cuda.split('.')[0]}"]
    module = CppExtension(
        "dynloss_ext._C",
        [str(path) for path in sources],
        include_dirs=include_dirs,
        define_macros=macros,
        libraries=libraries,
        library_dirs=[str(toolkit / folder) for folder in ("lib64", "lib")] if toolkit else [],
        extra_link_args=["-fopenmp"],
        # -isystem: torch's headers are not ours to be warned about
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *memory, *(f"-isystem{folder}" for folder in include_paths())],
            "nvcc": [*NVCC_FLAGS, f"--threads={os.environ.get('MAX_JOBS') or os.cpu_count()}"],  # architectures at once
        },
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": build_with_note(build_info)}}, build_info


def version_for(torch_minor: str, cuda: str | None) -> str:
    """Of a build: 0.2.0+torch2.13, or 0.2.0+torch2.13.cu13 with CUDA kernels, which fit one major version."""
    return f"{VERSION}+torch{torch_minor}" + (f".cu{cuda.split('.')[0]}" if cuda else "")


if "sdist" in sys.argv:  # sources fit every supported torch and need none
    setup(version=VERSION, install_requires=[TORCH_REQUIREMENT, *REQUIREMENTS])
else:
    torch_version = find_torch()
    if torch_version is None:
        sys.exit(f"{TORCH_REQUIREMENT} is needed to build dynloss_ext, and was not found")
    minor = ".".join(torch_version.split(".")[:2])
    options, build_info = extension()
    # A binary that uses ATen fits only the minor version that it was compiled for.
    setup(
        version=version_for(minor, build_info["cuda"]), install_requires=[f"torch=={minor}.*", *REQUIREMENTS], **options
    )
