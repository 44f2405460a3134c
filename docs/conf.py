"""Configuration of the documentation: `sh docs/build.sh` builds it, pyproject's extra `docs` is what that needs."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS / "tables"))
import measured  # noqa: E402

import dynloss_ext  # noqa: E402

project = "dynloss_ext"
author = "The dynloss_ext authors"
copyright = author
version = release = dynloss_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "how_to", "generated", "**/sg_execution_times.rst", "sg_execution_times.rst"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# `eigsh` in a docstring is a link where there is something of that name, and code where not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_mock_imports = ["lightning", "transformers"]  # of dynloss_ext.integrations, where they are not installed
python_maximum_signature_line_length = 90
autodoc_class_signature = "mixed"
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"dynloss_ext {version}"
html_copy_source = False

sphinx_gallery_conf = {
    "examples_dirs": "how_to",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
}
suppress_warnings = ["config.cache"]  # of sphinx_gallery_conf

# Pages of the repository that lie outside of docs/, where they are read on a code host: the site has copies of them.
MIRRORED = {
    ROOT / name: page
    for name, page in {
        "README.md": "mirrored/readme",
        "CHANGELOG.md": "mirrored/changelog",
        "CONTRIBUTING.md": "mirrored/contributing",
        "python_examples/figures/README.md": "mirrored/figures",
        "python_examples/figures/bifurcation_crossings/README.md": "mirrored/crossings",
        "python_examples/figures/phase_diagram_spiral/README.md": "mirrored/phase_diagram_spiral",
        "tests/models/README.md": "mirrored/models",
        "tests/robustness/README.md": "mirrored/robustness",
        "tests/MATRIX.md": "mirrored/matrix",
    }.items()
}


def relinked(text: str, source: Path, page: Path) -> str:
    """The Markdown of ``source`` as that of ``page``: its links lead to copies where the site has them."""

    def relink(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        path = Path(os.path.normpath(source.parent / target))
        if path == DOCS / "how_to":
            path = DOCS / "gallery" / "index"
        elif path in MIRRORED:
            path = DOCS / f"{MIRRORED[path]}.md"
        return f"]({os.path.relpath(path, page.parent)}{anchor})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", relink, text)


def mirror() -> None:
    for source, page in MIRRORED.items():
        copy = DOCS / f"{page}.md"
        copy.parent.mkdir(exist_ok=True)
        text = "---\norphan: true\n---\n\n" + relinked(source.read_text(), source, copy)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)


def setup(app):
    def prepare(app):
        measured.write(DOCS / "generated")
        mirror()

    def read(app, name, source):
        page = DOCS / f"{name}.md"
        if page.exists() and not name.startswith("mirrored/"):
            source[0] = relinked(source[0], page, page)

    app.connect("config-inited", lambda app, config: prepare(app))  # before the sources are listed
    app.connect("source-read", read)
