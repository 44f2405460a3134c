"""The comparison of plain and replayed steps: its rows, and that each is kept as soon as it is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS = ["spiral step", "spiral product", "spiral refresh", "tracker update", "myrtle5 step", "myrtle5 step, fast"]


@pytest.fixture
def compare_graphs(benchmark_script: Any, one_thread: None) -> Any:
    return benchmark_script("compare_graphs")


def test_the_report_is_whole_after_every_row(compare_graphs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "new" / "graphs.json"
    written = []
    write = compare_graphs.write_report

    def write_and_look(*arguments: Any) -> None:
        write(*arguments)
        written.append(list(json.loads(path.read_text())["rows"]))

    monkeypatch.setattr(compare_graphs, "write_report", write_and_look)
    options = ["--device", "cpu", "--seconds", "0", "--states", "2", "--batch-size", "8", "--small", "--json"]
    monkeypatch.setattr(sys, "argv", ["compare_graphs.py", *options, str(path)])
    compare_graphs.main()
    assert written == [ROWS[: number + 1] for number in range(len(ROWS))]
    rows = json.loads(path.read_text())["rows"]
    assert all(row["fallback"] == "there are no CUDA graphs on a cpu" for row in rows.values())
    assert rows["tracker update"]["update_over_graphed_products"] > 0
    assert all(rows[name]["speedup"] > 0 for name in ROWS if name != "tracker update")
