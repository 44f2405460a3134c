"""The examples of the docstrings and of the pages run, and the reference leaves no name out."""

import doctest
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynloss_ext
from dynloss_ext import plot, reference

DOCS = Path(__file__).parent.parent / "docs"
MODULES = sorted(
    {info.name.partition(".")[2] for info in pkgutil.walk_packages(dynloss_ext.__path__, "dynloss_ext.")}
    - {"_C", "__main__", "integrations.lightning", "integrations.transformers"}  # which have no examples to run
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MADE = {"_build", "gallery", "generated", "mirrored"}  # by a build of the site
PAGES = {
    str(p.relative_to(DOCS)): p.read_text() for p in DOCS.rglob("*.md") if p.relative_to(DOCS).parts[0] not in MADE
}


def run(test: doctest.DocTest) -> str:
    """What fails in it; empty if nothing does."""
    report: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"dynloss_ext.{name}")
    names = {"torch": __import__("torch"), **vars(dynloss_ext), **vars(module)}
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names):
        assert not (failures := run(test)), failures


def test_what_is_called_most_has_an_example() -> None:
    """Every public function, and every class that is not just a result."""
    results = {"Crossing", "DiagonalEstimate", "Estimate", "EigenResult", "Instability", "PeriodChange"}
    results |= {"PeriodSegment", "SpectralDensity"}
    for name in set(dynloss_ext.__all__) - results - {"reference", "ConvergenceWarning", "Perceptron"}:
        assert ">>>" in inspect.getdoc(getattr(dynloss_ext, name)), name


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```pycon" in text])
def test_the_sessions_of_a_page_run(page: str) -> None:
    """All blocks of a page as one session."""
    session = "\n".join(re.findall(r"^```pycon\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE))
    test = doctest.DocTestParser().get_doctest(session, {}, page, page, 0)
    assert not (failures := run(test)), failures


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(text for page, text in PAGES.items() if page.startswith("reference/"))
    listed = set(re.findall(r"auto(?:function|class|exception):: (\w+)", pages))
    assert set(dynloss_ext.__all__) - {"reference"} <= listed
    assert "automodule:: dynloss_ext.reference" in pages and reference.__all__
    drawn = re.search(r"automodule:: dynloss_ext\.plot\n   :members: (.*)", pages)[1].split(", ")
    public = inspect.getmembers(plot, inspect.isfunction)
    assert set(drawn) == {name for name, f in public if f.__module__.startswith(plot.__name__)}


def test_the_citation_is_of_this_version() -> None:
    citation = (DOCS.parent / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == dynloss_ext.__version__.partition("+")[0]


def test_every_committed_result_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the build calls: a page for each file, with the machine that is known; figures are drawn or committed."""
    monkeypatch.syspath_prepend(DOCS / "tables")
    spec = importlib.util.spec_from_file_location("measured", DOCS / "tables" / "measured.py")
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    measured.write(tmp_path)
    for source in (*measured.RESULTS.glob("*.json"), *measured.TABLES.glob("*.json")):
        page = (tmp_path / f"{source.stem}.md").read_text()
        assert ("*Machine: " in page) == ('"machine"' in source.read_text()), source.name
        shown = [text for text in PAGES.values() if f"generated/{source.stem}.md\n" in text]
        assert shown, source.name
        for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
            committed = Path(os.path.normpath(DOCS / "generated" / figure))
            assert (tmp_path / figure).is_file() or committed.is_file(), (source.name, figure)
            assert all(f"generated/{source.stem}.md\n:relative-images:\n" in text for text in shown), source.name
    ours = json.loads((measured.RESULTS / "loss_cpu_2_threads.json").read_text())["cases"]["512x10-float32"]["ours"]
    assert f"| 512x10-float32 | {ours:.3g} |" in (tmp_path / "loss_cpu_2_threads.md").read_text()


def test_every_committed_result_is_measured_anew_by_one_command(tmp_path: Path) -> None:
    """Of redo.sh, with options that its scripts know; those of a GPU have a plan of their own."""
    redo, results = DOCS.parent / "tests" / "benchmarks" / "redo.sh", DOCS.parent / "tests" / "benchmarks" / "results"
    names = {path.stem for path in results.glob("*.json") if not path.stem.startswith("gpu_check")}
    assert set(re.search(r"names=\((.*?)\)", redo.read_text(), re.DOTALL)[1].split()) == names
    shown = {name for line in re.findall(r"redo\.sh (.+)", PAGES["benchmarks.md"]) for name in line.split()}
    assert shown == names
    told = tmp_path / "python"
    told.write_text('#!/bin/sh\necho "$@"\nfor last; do :; done\ntouch "$last"\n')
    told.chmod(0o755)
    environment = os.environ | {"PYTHON": str(told), "RESULTS": str(tmp_path), "DATA": "folder"}
    done = subprocess.run(["bash", redo], env=environment, capture_output=True, text=True, check=True)
    assert {path.stem for path in tmp_path.glob("*.json")} == names
    commands = [line.split() for line in done.stdout.splitlines() if line.startswith("tests/benchmarks/")]
    assert len(commands) == len(names) + 2  # three of eigensolvers_cpu
    for script, *options in commands:
        known = (DOCS.parent / script).read_text()
        for option in options:
            assert not option.startswith("--") or f'add_argument("{option}"' in known, (script, option)


def test_the_extra_of_the_gallery_installs_what_its_scripts_import() -> None:
    """`.ci/run` leaves the scripts to `.ci/long`: nobody else would notice."""
    text = (DOCS.parent / "pyproject.toml").read_text()
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\](?: *#[^\n]*)?$", text, re.MULTILINE | re.DOTALL))

    def installed(extra: str) -> set[str]:
        found = set()
        for requirement in re.findall(r'"([^"]+)"', extras[extra]):
            if own := re.fullmatch(r"dynloss_ext\[(.+)\]", requirement):
                found |= {name for part in own[1].split(",") for name in installed(part)}
            else:
                found.add(re.split(r"[^\w-]", requirement)[0].replace("-", "_"))
        return found

    known = installed("gallery") | {"torch", "numpy", "matplotlib", "dynloss_ext", *sys.stdlib_module_names}
    known |= {path.stem for folder in ("python_examples", "docs/how_to") for path in (DOCS.parent / folder).iterdir()}
    imported = {
        name
        for path in (DOCS / "how_to").glob("*.py")
        for name in re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    }
    assert {"lightning", "transformers"} <= imported
    assert imported <= known
