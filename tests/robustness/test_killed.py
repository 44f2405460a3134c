"""A few trainings and sweeps are killed and resumed: nothing shows afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robustness import killed


@pytest.mark.parametrize(("name", "times"), [("training", 3), ("training by autograd", 3), ("sweep", 3)])
def test_what_is_killed_and_resumed_equals_the_undisturbed(name: str, times: int) -> None:
    result = killed.kill_and_resume(name, times, seed=0)
    assert result["faults"] == []
    assert result["kills"] >= result["resumed"] == times <= result["begun"]
    assert 0 < result["with_files_when_resumed"] <= times


def test_what_ends_before_it_is_killed_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: list[float | None] = []

    def run(self: killed.Work, folder: Path, after: float | None = None) -> bool:
        plan.append(after)
        return after is not None and len([x for x in plan if x is not None]) > 3

    monkeypatch.setattr(killed.Work, "run", run)
    monkeypatch.setitem(killed.WORKS, "x", killed.Work(print, [], lambda folder: {}, False))
    result = killed.kill_and_resume("x", 2, seed=0)
    assert result["begun"] > result["resumed"] == 2
    assert result["kills"] == sum(x is not None for x in plan) - 3


def test_one_bit_is_a_difference() -> None:
    whole: dict[str, Any] = {"metrics": {"loss": np.ones(3), "step": np.arange(3)}, "rows": [{"a": 0.5, "b": None}]}
    for change in (
        lambda x: x["metrics"].update(loss=np.nextafter(np.ones(3), 2)),
        lambda x: x["metrics"].update(loss=np.ones(2)),
        lambda x: x["metrics"].update(step=np.arange(3.0)),
        lambda x: x["rows"][0].update(a=np.nextafter(0.5, 1)),
        lambda x: x["rows"].append({}),
        lambda x: x.pop("rows"),
    ):
        other = copy.deepcopy(whole)
        assert killed.difference(other, whole) == ""
        change(other)
        assert killed.difference(other, whole) != ""
