"""The build's decisions and the check at import; the installs themselves run in .ci/run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dynloss_ext
from dynloss_ext._extension import BUILD_INFO, BuildInfo, check_torch, read_build_info

ROOT = Path(__file__).parents[1]
CPU_BUILD = BuildInfo("2.13.0+cpu", None, [], "c++", [])
CUDA_BUILD = BuildInfo("2.13.0+cu130", "13.0", ["9.0+PTX"], "c++", [])


def python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on the dynloss_ext under test, whether it is installed or built in place."""
    path = str(Path(dynloss_ext.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path} | environ, capture_output=True, text=True
    )


@pytest.fixture
def build_backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "tools" / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_info_names_the_running_torch() -> None:
    assert BUILD_INFO.torch.split(".")[:2] == torch.__version__.split(".")[:2]
    assert BUILD_INFO.compiler


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.1", "2.13.0+cu126"])
def test_every_patch_of_the_minor_version_is_accepted(version: str) -> None:
    check_torch(CPU_BUILD, version, None)


@pytest.mark.parametrize("version", ["2.14.1", "2.12.0", "3.13.0", "2.1.3"])
def test_another_minor_version_is_refused(version: str) -> None:
    found = ".".join(version.split(".")[:2])
    with pytest.raises(ImportError, match=rf"built for torch 2\.13, found {found}: reinstall"):
        check_torch(CPU_BUILD, version, None)


def test_a_cpu_build_runs_under_a_torch_with_cuda() -> None:
    check_torch(CPU_BUILD, "2.13.0+cu130", "13.0")


@pytest.mark.parametrize(("cuda", "named"), [(None, "no CUDA"), ("12.8", r"CUDA 12\.8")])
def test_a_cuda_build_is_refused_under_another_cuda(cuda: str | None, named: str) -> None:
    check_torch(CUDA_BUILD, "2.13.0", "13.2")
    with pytest.raises(ImportError, match=rf"with CUDA 13\.0, found torch 2\.13\.0 with {named}: reinstall"):
        check_torch(CUDA_BUILD, "2.13.0", cuda)


def test_a_source_folder_without_a_build_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"holds the sources of dynloss_ext, not a built package"):
        read_build_info(tmp_path)


def test_import_under_another_torch_is_refused_before_the_module_loads() -> None:
    result = python("-c", "import torch; torch.__version__ = '1.0.0'; import dynloss_ext")
    assert result.returncode == 1
    assert "found 1.0: reinstall" in result.stderr.splitlines()[-1]
    assert "undefined symbol" not in result.stderr


def test_report_names_versions_build_and_devices() -> None:
    result = python("-m", "dynloss_ext")
    assert result.returncode == 0, result.stderr
    for text in (dynloss_ext.__version__, torch.__version__, BUILD_INFO.compiler, "device    cpu:", "device    cuda"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("version", "supported"),
    [("2.10.1", False), ("2.11.0", True), ("2.14.1+cu130", True), ("2.15.0", False), ("3.0.0", False)],
)
def test_supported_torch_versions(build_backend: ModuleType, version: str, supported: bool) -> None:
    assert build_backend._supported(version) is supported


def fake_environment(folder: Path, version: str) -> Path:
    """A virtual environment that has nothing but the metadata of a torch."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / f"torch-{version}.dist-info").mkdir()
    (packages / f"torch-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    )
    return packages


def ask_for_torch(cwd: Path, *arguments: str, **environ: str) -> tuple[str | None, list[str]]:
    """What find_torch answers in an environment without torch, started by a process with these arguments."""
    script = (
        f"import sys, json; sys.path.insert(0, {str(ROOT / 'tools')!r}); import build_backend as b; import setuptools;"
        "print(json.dumps([b.find_torch(), sys.path]))"
    )
    import setuptools

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", cwd / "isolated"], check=True)
    child = [str(cwd / "isolated" / "bin" / "python"), "-c", script]
    parent = f"import subprocess, sys; sys.exit(subprocess.run({child!r}).returncode)"
    result = subprocess.run(
        [sys.executable, "-c", parent, *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(link_only(setuptools, cwd))} | environ,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    version, path = json.loads(result.stdout)
    return version, path
