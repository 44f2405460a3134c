"""The comparison of basis sizes, at its shortest."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import compare_basis_sizes

    row = compare_basis_sizes.measure("cheap", 1000, 2, 1)
    assert (row["product"], row["k"]) == ("cheap", 2) and 900 < row["parameters"] < 1100
    assert list(row["products"]) == list(row["milliseconds"]) == ["k + 6", "k + 12", "default", "twice"]
    assert row["products"]["k + 6"] >= row["products"]["twice"] > 2
    assert all(x > 0.0 for x in row["milliseconds"].values())
