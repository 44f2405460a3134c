"""The driver's way for vectors on a device, taken by vectors on the host: the same numbers."""

import pytest
import torch
from curvature_problems import Spiral, dense_hessian, loss_of, mlp

from dynloss_ext import _C, EigenTracker, HessianOperator, eigsh, spectral_density, trace

pytestmark = pytest.mark.filterwarnings("error::dynloss_ext.ConvergenceWarning")


@pytest.fixture
def device_path():
    _C.take_device_path(True)
    yield
    _C.take_device_path(False)


def crowd(size, dtype):
    spectrum = torch.linspace(-1, 1, size, dtype=torch.float64)
    spectrum[[0, size // 2, size - 1]] = torch.tensor([9.0, 7.0, 7.0], dtype=torch.float64)
    return spectrum.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [5, 300, 70_001, 2 * 65_536, 200_003])
def test_known_spectra(device_path, size, dtype):
    """Lengths within a block, of whole blocks and with a rest; k + 2 basis vectors need many restarts."""
    spectrum = crowd(size, dtype)
    for options in ({}, {"max_basis": 5}):
        result = eigsh(lambda v: spectrum * v, 3, n=size, dtype=dtype, tol=1e-4, **options)
        assert result.values.tolist() == pytest.approx([9, 7, 7], rel=1e-5 if dtype == torch.float32 else 1e-6)
        assert torch.allclose(result.vectors.T @ result.vectors, torch.eye(3, dtype=dtype), atol=1e-5)
        residuals = torch.linalg.norm(
            spectrum[:, None] * result.vectors - result.vectors * result.values.to(dtype), dim=0
        )
        assert torch.allclose(result.residuals, residuals.double(), rtol=0.1, atol=1e-5)


def test_float32_sums_hold_at_millions_of_parameters(device_path):
    spectrum = crowd(3_000_000, torch.float32)
    result = eigsh(lambda v: spectrum * v, 3, n=len(spectrum), dtype=torch.float32)
    assert result.values.tolist() == pytest.approx([9, 7, 7], rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(device_path, scale):
    spectrum = scale * crowd(300, torch.float32)
    result = eigsh(lambda v: spectrum * v, 3, n=300, dtype=torch.float32)
    assert (result.values / scale).tolist() == pytest.approx([9, 7, 7], rel=1e-5)


def test_a_tracker_gives_what_it_gives_on_the_host():
    def track():
        spiral, tracker, found = Spiral(), EigenTracker(3, audit_every=4), []
        for _ in range(12):
            spiral.train()
            found.append(tracker.update(HessianOperator(spiral.loss(), spiral.params)))
        return found

    on_host = track()
    _C.take_device_path(True)
    try:
        on_device = track()
    finally:
        _C.take_device_path(False)
    for a, b in zip(on_host, on_device, strict=True):
        assert a.num_hvp == b.num_hvp
        assert torch.allclose(a.values, b.values, rtol=1e-10)
        assert torch.allclose(a.vectors, b.vectors, atol=1e-8)


def test_density_and_trace(device_path):
    params = mlp()
    H = HessianOperator(loss_of(params), params)
    exact = torch.linalg.eigvalsh(dense_hessian(params))
    density = spectral_density(H, num_steps=H.shape[0], num_probes=2)
    assert density.nodes.min() == pytest.approx(float(exact[0]), rel=1e-8)
    assert density.nodes.max() == pytest.approx(float(exact[-1]), rel=1e-8)
    assert trace(H, num_probes=4 * H.shape[0]).value == pytest.approx(float(exact.sum()), rel=1e-8)
