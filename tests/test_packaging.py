"""The build's decisions and the check at import; the installs themselves run in .ci/run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

import dynloss_ext
from dynloss_ext._extension import BUILD_INFO, BuildInfo, check_torch, read_build_info

ROOT = Path(__file__).parents[1]
CPU_BUILD = BuildInfo("2.13.0+cpu", None, [], "c++", [])
CUDA_BUILD = BuildInfo("2.13.0+cu130", "13.0", ["9.0+PTX"], "c++", [])


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on the dynloss_ext under test, whether it is installed or built in place."""
    folder = Path(dynloss_ext.__file__).parents[1]  # Python looks for modules in its working folder first
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


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
    for text in (dynloss_ext.__version__, torch.__version__, BUILD_INFO.compiler, "cpu: ", "cuda"):
        assert text in result.stdout


def environment(folder: Path, torch_version: str | None = None) -> Path:
    """The interpreter of a virtual environment that has the metadata of a torch, or none."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    if torch_version is not None:
        (packages,) = folder.glob("lib/python*/site-packages")
        metadata = packages / f"torch-{torch_version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n")
    return folder / "bin" / "python"


def find_torch(python: Path, installer: Sequence[str | Path], cwd: Path, **environ: str) -> str | None:
    """What find_torch answers to a build that `python` runs, isolated as by pip, called by `installer`."""
    search = (
        "import json, sys; sys.path = [path for path in sys.path if '-packages' not in path];"
        f" sys.path.insert(0, {str(ROOT / 'tools')!r}); import target_torch;"
        " print(json.dumps([target_torch.find_torch(), sys.path]))"
    )
    start = f"import subprocess; subprocess.run([{str(python)!r}, '-c', {search!r}], check=True)"
    command = [installer[0], "-c", start, *installer[1:]]
    environ = {"PATH": os.environ["PATH"]} | environ
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, path = json.loads(result.stdout)
    assert path[-1].endswith("site-packages") is (version is not None)
    return cast("str | None", version)


def test_torch_is_found_where_pip_builds_in_the_targets_interpreter(tmp_path: Path) -> None:
    target = environment(tmp_path / "target", "2.13.0+cpu")
    assert find_torch(target, [sys.executable], tmp_path, PYTHONPATH="", PYTHONNOUSERSITE="1") == "2.13.0+cpu"


def test_torch_is_found_where_the_build_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    isolated = environment(tmp_path / "isolated")
    target = environment(tmp_path / "target", "2.12.0")
    bare = environment(tmp_path / "bare")
    folder = tmp_path / "project" / "deeper"
    folder.mkdir(parents=True)
    assert find_torch(isolated, [bare], folder) is None
    assert find_torch(isolated, [target], folder) == "2.12.0"
    assert find_torch(isolated, [bare, "--python", target], folder) == "2.12.0"
    assert find_torch(isolated, [bare, f"--python={target}"], folder) == "2.12.0"
    assert find_torch(isolated, [bare, "-p", "../../target"], folder) == "2.12.0"
    assert find_torch(isolated, [bare], folder, VIRTUAL_ENV=str(tmp_path / "target")) == "2.12.0"
    (tmp_path / "target").rename(tmp_path / "project" / ".venv")
    assert find_torch(isolated, [bare], folder) == "2.12.0"


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.10.1", False), ("2.11.0", True), ("2.14.1+cu130", True), ("2.15.0", False), ("3.12.0", False)],
)
def test_only_a_supported_torch_is_built_against(tmp_path: Path, version: str, fits: bool) -> None:
    target = environment(tmp_path / "target", version)
    assert find_torch(target, [sys.executable], tmp_path) == (version if fits else None)
