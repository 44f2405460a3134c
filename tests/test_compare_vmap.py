"""The comparison of vmap with a loop over members, at its shortest."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import compare_vmap

    row = compare_vmap.measure(2, 2, 4, 1)
    assert (row["members"], row["width"], row["samples"]) == (2, 2, 4)
    assert all(x > 0.0 for x in row["milliseconds"].values())
