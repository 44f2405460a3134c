"""The comparison of training loops keeps what it has measured, whenever it is interrupted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def compare_training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    import compare_training

    yield compare_training
    for name in ("compare_training", "machine"):
        sys.modules.pop(name, None)


def test_the_report_is_whole_after_every_turn(compare_training: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "new" / "report.json"
    turns: list[list[str]] = []  # what the report holds at each step

    def step() -> None:
        turns.append(list(json.loads(path.read_text())["images_per_second"]["wrn"]) if path.exists() else [])
        if len(turns) == 15:  # five steps of each to warm up, two rounds, and one step of a third
            raise KeyboardInterrupt

    def contenders(*arguments: Any) -> dict[str, Any]:
        return {name: compare_training.Contender(step, lambda: None, images=1) for name in ("plain", "ours")}

    monkeypatch.setattr(compare_training, "contenders", contenders)
    command = ["compare_training.py", "--device", "cpu", "--networks", "wrn", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        compare_training.main()
    assert turns[:10] == [[]] * 10
    assert turns[10:] == [[], ["plain"], ["plain", "ours"], ["plain", "ours"], ["plain", "ours"]]
    report = json.loads(path.read_text())
    assert report["images_per_second"]["wrn"]["ours"]["to_plain"] > 0
    assert report["sizes"] == "paper"
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
