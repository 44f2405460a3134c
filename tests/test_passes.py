"""Traffic of the driver: how often it goes over its basis, as torch.profiler shows it."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dynloss_ext import _C, EigenTracker, eigsh

SIZE = 5000


def passes(solve):
    """What a solver returns; how often each loop over rows ran, and over how many rows in all."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        result = solve()
    calls, rows = Counter(), Counter()
    for event in found.events():
        owner, _, name = event.name.partition("::")
        if owner == "dynloss_ext":
            calls[name] += 1
            rows[name] += event.input_shapes[0][0]
            assert event.input_shapes[0][1] == SIZE
    return result, calls, rows


def spectrum(dtype):
    return torch.linspace(0, 1, SIZE, dtype=torch.float64).pow(40).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_two_passes_over_the_basis_for_a_product(k, dtype):
    """Audits and restarts included; all else that reads rows is little beside these."""
    values = spectrum(dtype)
    result, calls, rows = passes(lambda: eigsh(lambda v: values * v, k, n=SIZE, dtype=dtype))
    assert result.converged.all()
    print(f"{result.num_hvp} products: {dict(calls)}, rows {dict(rows)}")
    assert 1.0 <= calls["orthogonalise"] / result.num_hvp <= 2.1
    assert rows["orthogonalise"] >= 5 * (rows.total() - rows["orthogonalise"])


def test_four_on_a_device():
    """There all overlaps are measured first: to read back which are known would cost more."""
    values = spectrum(torch.float32)
    _C.take_device_path(True)
    try:
        result, _, rows = passes(lambda: eigsh(lambda v: values * v, 3, n=SIZE, dtype=torch.float32))
    finally:
        _C.take_device_path(False)
    on_host, _, rows_on_host = passes(lambda: eigsh(lambda v: values * v, 3, n=SIZE, dtype=torch.float32))
    print(result.num_hvp, dict(rows), on_host.num_hvp, dict(rows_on_host))
    each, each_on_host = rows.total() / result.num_hvp, rows_on_host["orthogonalise"] / on_host.num_hvp
    assert 3 < each / (each_on_host / 2) < 5


def test_two_passes_for_a_product_of_a_tracker():
    values = spectrum(torch.float32)
    tracker = EigenTracker(3)
    tracker.update(lambda v: values * v, n=SIZE, dtype=torch.float32)
    result, calls, _ = passes(lambda: tracker.update(lambda v: 1.01 * values * v, n=SIZE, dtype=torch.float32))
    print(f"{result.num_hvp} products: {dict(calls)}")
    assert calls["orthogonalise"] <= 2 * (result.num_hvp + 3)  # the last vectors too are made orthogonal
