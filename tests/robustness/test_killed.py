"""A few trainings and sweeps are killed and resumed: nothing shows afterwards."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from robustness import killed


@pytest.mark.parametrize(("name", "times"), [("training", 3), ("training by autograd", 3), ("sweep", 3)])
def test_what_is_killed_and_resumed_equals_the_undisturbed(name: str, times: int) -> None:
    result = killed.kill_and_resume(name, times, seed=0)
    assert result["faults"] == [] and result["kills"] >= result["resumed"] == times


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
