"""Configuration of the documentation: `sh docs/build.sh` builds it, README's extra is `docs`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "tables"))
import benchmark_pages  # noqa: E402

import dynloss_ext  # noqa: E402

project = "dynloss_ext"
author = "The dynloss_ext authors"
copyright = author
version = release = dynloss_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "how_to", "generated"]
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# `eigsh` in a docstring is a link where there is something of that name, and code where not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
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
    "min_reported_time": 0,
    "abort_on_example_error": False,  # the build goes on, and fails at its end
}
suppress_warnings = ["config.cache"]  # of sphinx_gallery_conf


def setup(app):
    """Writes the pages of the benchmarks before anything is read."""
    app.connect("builder-inited", lambda app: benchmark_pages.write(Path(app.srcdir) / "generated"))
