"""The Python of the README and of the pages in docs/ runs as it stands there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dynloss_ext import HessianOperator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CURVATURE = ROOT / "docs" / "guide" / "curvature.md"
MADE = {"_build", "gallery", "generated", "mirrored"}  # by a build of the site
PAGES = [page for page in (ROOT / "docs").rglob("*.md") if page.relative_to(ROOT / "docs").parts[0] not in MADE]
WITH_PYTHON = [ROOT / "README.md", *(page for page in sorted(PAGES) if "```python\n" in page.read_text())]


def run(page: Path) -> dict[str, Any]:
    """What its pieces leave behind, one after the other, as a reader would run them."""
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(code, page.name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run(page)
    if page.name == "README.md":
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if re.match(r"\d+00 |0 ", line)]) == 10
    if page == CURVATURE:
        assert namespace["tracker"].num_updates == 100
        assert namespace["layers"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
        whole = HessianOperator(namespace["loss"], namespace["parameters"]).to_dense()
        assert torch.allclose(namespace["H"].to_dense(), whole, atol=1e-6)


SOLVERS = {
    "`EigenTracker`": "EigenTracker (warm)",
    "`eigsh`, from scratch, with its audit": "eigsh (cold)",
    "SciPy `eigsh` on our product, `ncv=8`, warm": "SciPy ncv=8 (warm)",
    "SciPy `eigsh` on our product, `ncv=8`, from scratch": "SciPy ncv=8 (cold)",
    "SciPy `eigsh` on our product, default": "SciPy (cold)",
    "PyHessian": "PyHessian",
    "hessian-eigenthings": "hessian-eigenthings",
    "curvlinops with SciPy": "curvlinops",
}


def test_the_figures_of_the_readme_are_those_of_the_committed_run() -> None:
    """Of the eigenvalue solvers: the table and the file it cites."""
    results = Path(__file__).parent / "benchmarks" / "results" / "eigensolvers_cpu.json"
    spiral = json.loads(results.read_text())["spiral"]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| (\de-\d+) \|$", README, re.MULTILINE)
    assert len(rows) == len(SOLVERS)
    for name, products, ms, error in rows:
        measured = spiral["solvers"][SOLVERS[re.sub(r" \d+(\.\w+)+", "", name)]]
        assert products == f"{measured['products']:.1f}", name
        assert ms == f"{1e3 * measured['seconds_median']:.1f}", name
        assert float(error) == float(f"{measured['worst_error']:.0e}"), name
    assert f"{spiral['driver']['overhead_median']:.0%}".replace("%", " %") in CURVATURE.read_text()


def test_the_files_that_the_readme_and_the_pages_name_exist() -> None:
    for page in [ROOT / "README.md", *PAGES]:
        for name in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / name).exists(), (page, name)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
