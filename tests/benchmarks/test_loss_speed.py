"""pytest tests/benchmarks/test_loss_speed.py --benchmark-json=FILE: each contender alone.

For ratios use compare_losses.py, which times the contenders by turns.
"""

import pytest
import torch
from loss_contenders import CASES, PEERS, Case, contenders

NAMES = {"cpu": ["ours", "eager", "compile", "loss_and_gradient", "copy", "autograd floor"]}
NAMES["cuda"] = [*NAMES["cpu"], *PEERS, "kernel"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize(
    ("device", "case", "name"),
    [(device, case, name) for device in DEVICES for case in CASES[device] for name in NAMES[device]],
    ids=str,
)
def test_loss(benchmark, device: str, case: Case, name: str) -> None:
    contender = contenders(case, device)[name]
    if isinstance(contender, str):
        pytest.skip(f"{name}: {contender}")

    def run() -> None:
        contender.run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case} on {device}"
    benchmark.extra_info["passes per run"] = contender.calls
    benchmark.pedantic(run, rounds=15, warmup_rounds=3, iterations=1)
