"""What compare_ensembles.py times on a GPU, on the CPU; the rest of it takes minutes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch


def test_steps_on_a_device(benchmark_script: Callable[[str], ModuleType]) -> None:
    ensembles = benchmark_script("compare_ensembles")
    results = ensembles.on_device("cpu", 3, 1)
    assert [row["title"].split(", ")[2:4] for row in results] == [["float64", "cpu"]] * 2 + [["float32", "cpu"]] * 2
    for row in results:
        assert list(row["microseconds"]) == ["fused", "fused, alone", "autograd", "baddbmm"]
        assert all(0 < us < 1e6 for us in row["microseconds"].values())


def test_all_contenders_take_the_same_steps(benchmark_script: Callable[[str], ModuleType]) -> None:
    ensembles = benchmark_script("compare_ensembles")
    fused = ensembles.ensemble(2, 7, torch.float64)
    batched, alone = ensembles.Batched(2, 7, torch.float64), ensembles.Autograd(7, torch.float64)
    fused.train(3)
    batched.steps(3)
    alone.steps(3)
    for p, q in zip(fused.parameters.values(), (batched.w1, batched.b1, batched.w2, batched.b2), strict=True):
        torch.testing.assert_close(p, q.detach())
    one = sorted(p.numel() for p in alone.params)
    assert one == sorted(p[0].numel() for p in fused.parameters.values())
