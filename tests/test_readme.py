"""The Python of the README and of the pages in docs/ runs as it stands there."""

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


def test_the_files_that_the_readme_and_the_pages_name_exist() -> None:
    for page in [ROOT / "README.md", *PAGES]:
        for name in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / name).exists(), (page, name)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
