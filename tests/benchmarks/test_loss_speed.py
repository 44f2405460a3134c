"""pytest tests/benchmarks/test_loss_speed.py --benchmark-json=FILE: each contender alone.

For ratios use compare_losses.py, which times the contenders by turns.
"""

import pytest
from loss_contenders import CASES, Case, contenders

NAMES = ["ours", "eager", "compile", "loss_and_gradient", "copy", "autograd floor"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss(benchmark, case: Case, name: str) -> None:
    benchmark.group = str(case)
    benchmark.pedantic(contenders(case)[name], rounds=15, warmup_rounds=3, iterations=1)
