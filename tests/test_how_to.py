"""Each how-to of the documentation runs, as it stands there, from a folder of its own."""

from __future__ import annotations

import importlib.util
import re
import runpy
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot

FOLDER = Path(__file__).parent.parent / "docs" / "how_to"
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("plot_*.py"))}
SLOW = {
    "plot_hugging_face_trainer",
    "plot_lightning",
    "plot_phase_diagram_on_a_cluster",  # these three start processes, each importing torch
    "plot_several_processes",
    "plot_sharded_modules",
    "plot_without_double_backward",
}
OPTIONAL = {
    "plot_hugging_face_trainer": ("transformers", "accelerate"),
    "plot_lightning": ("lightning",),
    "plot_phase_diagram_on_a_cluster": ("pyarrow", "tqdm", "tyro", "dask", "distributed"),
}


def test_the_lists_name_scripts_that_exist() -> None:
    assert SLOW | OPTIONAL.keys() <= SCRIPTS.keys()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SCRIPTS])
def test_how_to(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It raises nothing, prints the numbers that it talks about, and draws one picture."""
    missing = [package for package in OPTIONAL.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}")
    source = SCRIPTS[name].read_text()
    if "plt.figure(plot." in source and tuple(map(int, re.findall(r"\d+", matplotlib.__version__)[:2])) < (3, 11):
        pytest.skip(f"{name} needs matplotlib 3.11, whose pyplot takes figures made elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)  # as `python docs/how_to/NAME.py` and the gallery do
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # the other tests keep theirs
    pyplot.close("all")
    backend = matplotlib.get_backend()
    try:
        with matplotlib.rc_context(), torch.random.fork_rng(), warnings.catch_warnings():
            pyplot.switch_backend("agg")
            runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
            assert len(pyplot.get_fignums()) == 1
            pyplot.savefig(tmp_path / "picture.png")
    finally:
        pyplot.close("all")
        pyplot.switch_backend(backend)
    assert capsys.readouterr().out
