"""The build's decisions and the check at import; the installs themselves run in .ci/run."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

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


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that setup.py defines, nothing being built."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("CUDA_HOME", "CUDA_PATH", "DYNLOSS_EXT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_nvcc(toolkit: Path, release: str = "13.0", architectures: str = "") -> Path:
    """A program that answers as nvcc does what setup.py asks of it."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
  *--dryrun*) echo '#$ _HERE_={nvcc.parent}' >&2;;
  --version) echo 'Cuda compilation tools, release {release}, V{release}.88';;
  --list-gpu-arch) echo '{architectures}';;
esac
"""
    )
    nvcc.chmod(0o755)
    return nvcc


def test_the_toolkit_is_the_one_that_nvcc_names(setup_script: dict[str, Any], tmp_path: Path) -> None:
    toolkit = tmp_path / "toolkit"
    nvcc = fake_nvcc(toolkit)
    wrapper, link = tmp_path / "wrapper", tmp_path / "link"
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    link.symlink_to(nvcc)
    for path in (nvcc, wrapper, link):
        assert setup_script["toolkit_of"](path) == toolkit
    assert setup_script["toolkit_of"](tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ("75 80 86 90 100 110 120", "8.0;9.0;10.0;12.0+PTX"),
        ("80 86 89 90", "8.0;9.0+PTX"),
        ("90 100 103", "9.0;10.0+PTX"),
    ],
)
def test_default_architectures_are_those_nvcc_knows(
    setup_script: dict[str, Any], tmp_path: Path, known: str, chosen: str
) -> None:
    nvcc = fake_nvcc(tmp_path, architectures="\n".join(f"compute_{number}" for number in known.split()))
    assert setup_script["default_architectures"](nvcc) == chosen


def test_architectures_without_asynchronous_copies_are_refused(setup_script: dict[str, Any]) -> None:
    check = setup_script["check_architectures"]
    for architectures in ("8.0", "8.6;9.0a;12.0+PTX", "10.0 8.9", "Ampere;Hopper"):
        check(architectures)
    for architectures in ("7.5", "9.0;7.0+PTX"):
        with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected 8\.0 and later, got .*7\."):
            check(architectures)


def test_cuda_is_chosen_by_torch_nvcc_and_wish(
    setup_script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = setup_script["choose_cuda"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert choose("13.0") is None  # no nvcc
    monkeypatch.setenv("DYNLOSS_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match="DYNLOSS_EXT_CUDA=1, but nvcc was not found"):
        choose("13.0")
    with pytest.raises(SystemExit, match="this torch was built without CUDA"):
        choose(None)
    fake_nvcc(tmp_path)
    assert choose("13.2") == tmp_path
    with pytest.raises(SystemExit, match=r"release 13\.0, but torch was built for CUDA 12\.8"):
        choose("12.8")
    monkeypatch.setenv("DYNLOSS_EXT_CUDA", "0")
    assert choose("13.0") is None
    monkeypatch.setenv("DYNLOSS_EXT_CUDA", "")
    assert choose("13.0") == tmp_path
    assert choose(None) is None
    monkeypatch.setenv("DYNLOSS_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="DYNLOSS_EXT_CUDA must be 0, 1 or unset, not 'yes'"):
        choose("13.0")


def find_torch(python: Path, installer: Sequence[str | Path], cwd: Path, **environ: str) -> str | None:
    """What find_torch answers to a build that `python` runs, isolated as by pip, called by `installer`."""
    overlay = cwd / "overlay"
    overlay.mkdir(exist_ok=True)
    hide = "import sys; sys.path = [path for path in sys.path if '-packages' not in path]"
    (overlay / "sitecustomize.py").write_text(hide)
    search = (
        f"{hide}; sys.path.insert(0, {str(ROOT / 'tools')!r}); import json, target_torch;"
        " print(json.dumps([target_torch.find_torch(), sys.path]))"
    )
    start = f"import subprocess; subprocess.run([{str(python)!r}, '-c', {search!r}], check=True)"
    command = [installer[0], "-c", start, *installer[1:]]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(overlay), "PYTHONNOUSERSITE": "1"} | environ
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, path = json.loads(result.stdout)
    assert path[-1].endswith("site-packages") is (version is not None)
    return cast("str | None", version)


def test_torch_is_found_where_pip_builds_in_the_targets_interpreter(tmp_path: Path) -> None:
    target = environment(tmp_path / "target", "2.13.0+cpu")
    assert find_torch(target, [sys.executable], tmp_path) == "2.13.0+cpu"


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


def setup_with(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    """tools/setup.sh with a Python that knows its version alone."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup.sh", folder / "tools")
    (folder / "python3").write_text(
        f"#!/bin/sh\ncase $2 in *version_info*) {version} ;; *) echo no more; exit 7 ;; esac\n"
    )
    (folder / "python3").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(["sh", "tools/setup.sh"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("version", "got"), [("echo 3.9", "3.9"), ("echo 2.7", "2.7"), ("echo 3.0", "3.0"), ("exit 127", "missing")]
)
def test_setup_asks_for_a_python_first(tmp_path: Path, version: str, got: str) -> None:
    run = setup_with(tmp_path, version)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith(f"python3: expected Python 3.10 or newer, got {got}; PYTHON=")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python3", "tools"]


@pytest.mark.parametrize("version", ["3.10", "3.14", "4.0"])
def test_setup_goes_on_with_a_newer_python(tmp_path: Path, version: str) -> None:
    run = setup_with(tmp_path, f"echo {version}")
    assert run.returncode == 7 and "expected Python" not in run.stderr
