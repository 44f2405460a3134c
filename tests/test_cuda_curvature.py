"""Curvature of networks on a CUDA device against the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from curvature_problems import Spiral
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynloss_ext import (
    _C,
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
from dynloss_ext._evaluation import graph_nodes

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


class Attention(nn.Module):
    """Two heads of eight over sixteen tokens: what fused kernels take."""

    def __init__(self):
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(9, 16), nn.Linear(16, 48), nn.Linear(16, 9)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = self.qkv(x).view(*tokens.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + attended.transpose(1, 2).reshape(x.shape)).flatten(0, 1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_differences_of_gradients_of_fused_attention(dtype):
    """Which recorded products refuse; within four of its noise of torch's own Hessian on the CPU in float64."""
    torch.manual_seed(0)
    on_cpu, tokens = Attention(), torch.randint(9, (4, 17))
    on_device, inputs, target = copy.deepcopy(on_cpu).to(DEVICE), tokens[:, :-1], tokens[:, 1:].flatten()
    fused = set()

    def loss():
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            logits = on_device(inputs.to(DEVICE))
        found = F.cross_entropy(logits.float(), target.to(DEVICE))
        names = {node.name() for node in graph_nodes([found])}
        fused.add(any("ScaledDotProduct" in name for name in names))
        return found

    with sdpa_kernel(SDPBackend.MATH):
        on_cpu.double()
        exact = HessianOperator(F.cross_entropy(on_cpu(inputs), target), on_cpu.parameters()).to_dense()
    H = HessianOperator.from_gradients(loss, on_device.parameters())
    V = F.normalize(torch.randn(len(exact), 6, dtype=torch.float64), dim=0)
    V = torch.cat([V, torch.linalg.eigh(exact).eigenvectors[:, -2:]], 1)
    product = H @ V.to(DEVICE, H.dtype)
    assert product.device.type == DEVICE.type
    error = (product.double().cpu() - exact @ V).norm(dim=0).max()
    print(f"error {error:.1e}, noise {H.noise:.1e}, norm {torch.linalg.matrix_norm(exact, 2):.1e}")
    assert error <= 4 * H.noise <= 4 * torch.linalg.matrix_norm(exact, 2)
    assert fused == {True}


def test_differences_put_back_buffers_and_the_random_state_of_the_device():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    model.to(DEVICE, torch.float64)
    inputs = torch.randn(20, 3, dtype=torch.float64, device=DEVICE)
    target = torch.arange(20, device=DEVICE) % 3
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model(inputs)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state(), torch.cuda.get_rng_state(DEVICE)
    H = HessianOperator.from_gradients(lambda: F.cross_entropy(model(inputs), target), model.parameters())
    v = torch.linspace(-1, 1, H.shape[0], dtype=torch.float64, device=DEVICE)
    product = H @ v
    assert torch.equal(torch.get_rng_state(), random[0])
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), random[1])
    torch.rand(7, device=DEVICE)  # which random numbers come next is nothing to H
    assert torch.allclose(H @ v, product, rtol=1e-9)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None


def test_gauss_newton():
    on_cpu, on_device = trained(50)
    dense = []
    for spiral in (on_cpu, on_device):
        outputs = spiral.logits()
        loss = F.cross_entropy(outputs, spiral.y)
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
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    expected = ntk_eigenvalues(model, inputs, 3)
    assert torch.allclose(ntk_eigenvalues(model.to(DEVICE), inputs.to(DEVICE), 3).cpu(), expected, rtol=1e-10)


@pytest.mark.parametrize("vmap", [True, False])
def test_an_ensemble_of_modules(vmap):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)) for _ in range(3)]
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
    """One small copy to the host for a product at most, and three besides: what a decision needs, and no vector.

    What is read for decisions comes by pinned memory.
    """
    _, on_device = trained(50)
    tracker = EigenTracker(3)
    tracker.update(operator(on_device))
    H = operator(on_device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        before = _C.num_reads()
        products = tracker.update(H).num_hvp
        reads = _C.num_reads() - before
    copies = {event.key: event.count for event in profile.key_averages() if "Memcpy DtoH" in event.key}
    assert 0 < sum(copies.values()) <= products + 3
    assert sum(count for key, count in copies.items() if "Pinned" in key) == reads
