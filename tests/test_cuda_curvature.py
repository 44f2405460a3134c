"""Curvature of networks on a CUDA device against the CPU's."""

from __future__ import annotations

import pytest
import torch
from curvature_problems import Spiral

from dynloss_ext import (
    EigenTracker,
    GaussNewtonOperator,
    HessianOperator,
    ModuleEnsemble,
    Oscillation,
    eigsh,
    ntk_eigenvalues,
    spectral_density,
    trace,
)

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error::dynloss_ext.ConvergenceWarning"),
]


def trained(steps, dtype=torch.float64):
    """The spiral network after some steps on the CPU, and a copy of it on the device."""
    on_cpu = Spiral()
    for _ in range(steps):
        on_cpu.train()
    return on_cpu.to("cpu", dtype), on_cpu.to(DEVICE, dtype)


def operator(spiral):
    return HessianOperator(spiral.loss(), spiral.params)


def test_products():
    on_cpu, on_device = trained(50)
    assert torch.allclose(operator(on_device).to_dense().cpu(), operator(on_cpu).to_dense(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eigsh(which, dtype):
    on_cpu, on_device = trained(50, dtype)
    H = operator(on_device)
    result = eigsh(H, 3, which=which, tol=1e-3)
    assert torch.allclose(result.values, eigsh(operator(on_cpu), 3, which=which, tol=1e-3).values, rtol=1e-4)
    assert result.vectors.device.type == DEVICE.type
    assert result.values.device.type == result.residuals.device.type == "cpu"
    values = result.values.to(result.vectors)
    residuals = torch.linalg.norm(H @ result.vectors - values * result.vectors, dim=0).double().cpu()
    assert torch.allclose(residuals, result.residuals, rtol=0.1, atol=1e-5)


def test_tracker():
    on_cpu, on_device = trained(50)
    host, device = EigenTracker(3, audit_every=4), EigenTracker(3, audit_every=4)
    for _ in range(12):
        expected, actual = host.update(operator(on_cpu)), device.update(operator(on_device))
        assert torch.allclose(actual.values, expected.values, rtol=1e-5)
        for spiral in (on_cpu, on_device):
            spiral.train()
    state = device.state_dict()
    device.load_state_dict(state)
    assert torch.allclose(device.update(operator(on_device)).values, host.update(operator(on_cpu)).values, rtol=1e-5)


def test_batches():
    on_cpu, on_device = trained(50)

    def loss_of(rows):
        return on_device.loss(rows) * len(rows), len(rows)

    batches = list(torch.arange(len(on_device.X), device=DEVICE).split(128))
    H = HessianOperator.from_batches(loss_of, on_device.params, batches)
    assert torch.allclose(H.to_dense().cpu(), operator(on_cpu).to_dense(), rtol=1e-10, atol=1e-13)


def test_gauss_newton():
    on_cpu, on_device = trained(50)
    dense = []
    for spiral in (on_cpu, on_device):
        outputs = spiral.logits()
        loss = torch.nn.functional.cross_entropy(outputs, spiral.y)
        dense.append(GaussNewtonOperator(loss, outputs, spiral.params).to_dense().cpu())
    assert torch.allclose(dense[1], dense[0], rtol=1e-10, atol=1e-13)


def test_density_and_trace():
    on_cpu, on_device = trained(50)
    H = operator(on_device)
    exact = torch.linalg.eigvalsh(operator(on_cpu).to_dense())
    assert spectral_density(H, num_probes=2).nodes.max() == pytest.approx(float(exact[-1]), rel=1e-6)
    estimate = trace(H, num_probes=90)
    assert abs(estimate.value - float(exact.sum())) < 6 * estimate.stderr


def test_ntk():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)).double()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    expected = ntk_eigenvalues(model, inputs, 3)
    assert torch.allclose(ntk_eigenvalues(model.to(DEVICE), inputs.to(DEVICE), 3).cpu(), expected, rtol=1e-10)


@pytest.mark.parametrize("vmap", [True, False])
def test_an_ensemble_of_modules(vmap):
    torch.manual_seed(0)
    networks = [
        torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.BatchNorm1d(9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
        for _ in range(3)
    ]
    inputs, target = torch.randn(3, 12, 4, dtype=torch.float64), torch.randint(3, (3, 12))
    oscillation = Oscillation(3, torch.tensor([1.0, 8.0, 70.0]), 10)
    results = []
    for device in ("cpu", DEVICE):
        members = [network.to(device, torch.float64) for network in networks]
        made = ModuleEnsemble(members, oscillation, lr=[0.1, 1.7e308, 0.3], momentum=0.5, vmap=vmap)
        pair = inputs.to(device), target.to(device)
        records = made.train(*pair, 20)
        values = made.eigenvalues(2, *pair, tol=1e-8).values
        results.append(
            [records.weighted_loss, records.loss, records.accuracy, values, *made.member(2).cpu().parameters()]
        )
        assert made.finite.tolist() == [True, False, True]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10, equal_nan=True)


def test_few_words_from_the_device():
    """One small copy to the host for a product at most, and three besides: what a decision needs, and no vector."""
    _, on_device = trained(50)
    tracker = EigenTracker(3)
    tracker.update(operator(on_device))
    H = operator(on_device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        products = tracker.update(H).num_hvp
    copies = sum(event.count for event in profile.key_averages() if "Memcpy DtoH" in event.key)
    assert 0 < copies <= products + 3
