"""The build's decisions and the check at import; the installs themselves run in .ci/run."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import setuptools
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


def test_the_command_says_what_it_does_and_refuses_the_rest() -> None:
    told, refused = python("-m", "dynloss_ext", "--help"), python("-m", "dynloss_ext", "--devices")
    assert told.returncode == 0 and "Prints what is installed" in told.stdout and "cpu: " not in told.stdout
    assert refused.returncode == 2 and "unrecognized arguments: --devices" in refused.stderr


def test_the_command_prints_the_report() -> None:
    command = re.findall(r'^dynloss-ext = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    ((module, function),) = command
    called, run = python("-c", f"from {module} import {function}; {function}()"), python("-m", "dynloss_ext")
    assert called.returncode == 0, called.stderr
    assert called.stdout == run.stdout != "\n"


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


def isolated_build(
    do: str, python: Path, installer: Sequence[str | Path], cwd: Path, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Does `do`, with tools/ importable, in a build that `python` runs, isolated as by pip, called by `installer`."""
    overlay = cwd / "overlay"
    overlay.mkdir(exist_ok=True)
    hide = "import sys; sys.path = [path for path in sys.path if '-packages' not in path]"
    (overlay / "sitecustomize.py").write_text(hide)
    build = f"{hide}; sys.path.insert(0, {str(ROOT / 'tools')!r}); {do}"
    start = f"import subprocess, sys; sys.exit(subprocess.run([{str(python)!r}, '-c', {build!r}]).returncode)"
    command = [installer[0], "-c", start, *installer[1:]]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(overlay), "PYTHONNOUSERSITE": "1"} | environ
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


def find_torch(python: Path, installer: Sequence[str | Path], cwd: Path, **environ: str) -> str | None:
    """What find_torch answers in an isolated build."""
    search = "import json, target_torch; print(json.dumps([target_torch.find_torch(), sys.path]))"
    result = isolated_build(search, python, installer, cwd, **environ)
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


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "2.15.0"])
def test_a_supported_torch_is_built_against(tmp_path: Path, version: str) -> None:
    target = environment(tmp_path / "target", version)
    assert find_torch(target, [sys.executable], tmp_path) == version


def link_setuptools(folder: Path) -> Path:
    """Makes setuptools, and nothing that lies beside it, importable from `folder`."""
    folder.mkdir(exist_ok=True)
    for pattern in ("setuptools*", "_distutils_hack"):
        for part in Path(setuptools.__file__).parents[1].glob(pattern):
            (folder / part.name).symlink_to(part)
    return folder


@pytest.mark.parametrize("version", ["2.9.0", "2.10.1+cpu", "2.16.0", "2.99.0", "3.12.0"])
def test_a_torch_that_is_not_supported_stops_the_build_before_another_is_fetched(tmp_path: Path, version: str) -> None:
    target = environment(tmp_path / "target", version)
    backend = link_setuptools(tmp_path / "backend")
    ask = (
        f"sys.path.append({str(backend)!r}); import build_backend; print(build_backend.get_requires_for_build_wheel())"
    )
    result = isolated_build(ask, target, [sys.executable], tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    refusal = (
        rf"dynloss_ext builds against torch>=2\.11,<2\.\d+, but {tmp_path / 'target'} has torch {re.escape(version)}: "
    )
    assert re.match(refusal, result.stderr), result.stderr


@pytest.mark.parametrize("version", ["2.9.0", "2.99.0"])
def test_pip_without_isolation_leaves_a_torch_that_is_not_supported(tmp_path: Path, version: str) -> None:
    target = environment(tmp_path / "target", version)
    (packages,) = (tmp_path / "target").glob("lib/python*/site-packages")
    link_setuptools(packages)
    before = sorted(packages.iterdir())
    install = ["pip", "--python", target, "install", "--no-index", "--no-deps", "--no-build-isolation", ROOT]
    result = subprocess.run([sys.executable, "-m", *install], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"has torch {version}: nothing was installed" in result.stdout + result.stderr
    assert sorted(packages.iterdir()) == before


def test_a_build_says_which_torch_it_is_for(setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    version = dynloss_ext.__version__
    assert setup_script["version_for"]("2.13", None) == f"{version}+torch2.13"
    assert setup_script["version_for"]("2.13", "13.0") == f"{version}+torch2.13.cu13"
    options: dict[str, Any] = {}
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    monkeypatch.setenv("DYNLOSS_EXT_CUDA", "0")
    monkeypatch.setattr("setuptools.setup", lambda **given: options.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    minor = ".".join(torch.__version__.split(".")[:2])
    assert options["version"] == f"{version}+torch{minor}"
    assert f"torch=={minor}.*" in options["install_requires"]


def test_the_source_distribution_brings_examples_tests_and_documentation(tmp_path: Path) -> None:
    wanted = ["csrc/op.cpp", "docs/index.md", "python_examples/common/run.py", "tests/data/x.npz", "CHANGELOG.md"]
    wanted += ["dynloss_ext/plot/__init__.py", "dynloss_ext/integrations/__init__.py"]
    unwanted = ["docs/_build/html/index.html", "python_examples/x.pyc", "runs/a.npy", "dynloss_ext/_C.so", ".venv/x.py"]
    for name in [*wanted, *unwanted]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "dynloss_ext" / "__init__.py", tmp_path / "dynloss_ext")
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path, check=True, capture_output=True)
    name = f"dynloss_ext-{dynloss_ext.__version__}"
    with tarfile.open(tmp_path / "dist" / f"{name}.tar.gz") as archive:
        brought = {member.removeprefix(f"{name}/") for member in archive.getnames()}
    assert brought.issuperset([*wanted, "tools/target_torch.py", "tools/build_backend.py"])
    assert not brought.intersection(unwanted)


def test_what_is_tried_is_what_is_supported() -> None:
    target = runpy.run_path(str(ROOT / "tools" / "target_torch.py"))
    (major, first), (_, last) = target["_FIRST_MINOR"], target["_LAST_MINOR"]
    assert target["TORCH_REQUIREMENT"] == f"torch>={major}.{first},<{major}.{last + 1}"
    minors = [f"{major}.{minor}" for minor in range(first, last + 1)]
    lists = {
        "tools/build_wheels.sh": re.findall(
            r'set -- "\$python":\{(.+)\}', (ROOT / "tools/build_wheels.sh").read_text()
        ),
        "checks.yml": re.findall(r"torch: \[(.+)\]", (ROOT / ".github/workflows/checks.yml").read_text()),
    }
    for name, (versions,) in lists.items():
        assert re.findall(r"\d+\.\d+(?=\.)", versions) == minors, name
    rows = re.findall(r"^\| (\S+) \| (\d+\.\d+)\.\d+ \|", (ROOT / "tests/MATRIX.md").read_text(), re.MULTILINE)
    assert rows == [(f"3.{python}", minor) for python in range(10, 14) for minor in minors]


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
