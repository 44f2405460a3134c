"""The driver's way for vectors on a device, taken by vectors on the host: the same numbers, read rarely."""

import pytest
import torch
from curvature_problems import Spiral, dense_hessian, loss_of, mlp

from dynloss_ext import _C, ConvergenceWarning, EigenTracker, HessianOperator, eigsh, spectral_density, trace

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


def test_a_scale_that_shows_late(device_path):
    """The first products are small; the unit in which no square of a product overflows changes on the way."""
    spectrum = torch.full((60,), 1e-3)
    spectrum[:3] = torch.tensor([9e14, 8e14, 7e14])
    start = torch.ones(60)
    start[:3] = 1e-12
    result = eigsh(lambda v: spectrum * v, 3, v0=start, tol=1e-4)
    assert (result.values / 1e14).tolist() == pytest.approx([9, 8, 7], rel=1e-5)


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


def test_reads_are_rare(device_path):
    """What a decision needs is read at once: at most once for a product, and twice besides."""
    spiral, tracker = Spiral(), EigenTracker(3, audit_every=4)
    for _ in range(12):
        spiral.train()
        H = HessianOperator(spiral.loss(), spiral.params)
        before = _C.num_reads()
        num_hvp = tracker.update(H).num_hvp
        assert 0 < _C.num_reads() - before <= num_hvp + 2
    before = _C.num_reads()
    num_hvp = spectral_density(H, num_probes=1).num_hvp
    assert _C.num_reads() - before <= num_hvp + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[0.0], [5.0], [5.0, -2.0], [5.0, 5.0, 5.0, -2.0]])
def test_krylov_spaces_that_end(device_path, values, dtype):
    """Then what was proposed blindly is nothing, which shows in the next reading: the search goes on elsewhere."""
    spectrum = torch.zeros(40, dtype=dtype)
    spectrum[: len(values)] = torch.tensor(values, dtype=dtype)
    for k in (1, 3, 6):
        result = eigsh(lambda v: spectrum * v, k, n=40, dtype=dtype)
        expected = spectrum.double().sort(descending=True).values[:k]
        assert torch.allclose(result.values, expected, rtol=1e-5, atol=1e-4)
        assert torch.allclose(result.vectors.T @ result.vectors, torch.eye(k, dtype=dtype), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [0.0, 1e-14])
@pytest.mark.parametrize(("n", "k"), [(10, 8), (30, 6), (200, 7)])
def test_a_first_product_that_is_next_to_nothing(device_path, n, k, tiny, dtype):
    """It is no measure of the rounding in those that follow."""
    spectrum = torch.zeros(n, dtype=dtype)
    spectrum[0], spectrum[-1] = 1.31, tiny
    for seed in range(10):
        result = eigsh(lambda v: spectrum * v, k, which="SA", v0=torch.eye(n, dtype=dtype)[:, -1], seed=seed)
        assert torch.allclose(result.vectors.T @ result.vectors, torch.eye(k, dtype=dtype), atol=1e-5)
        assert result.values.abs().max() < 1e-5


@pytest.mark.parametrize("k", [1, 3, 8])
def test_spaces_that_end_cost_little_more_than_on_the_host(k):
    def count():
        return eigsh(lambda v: 1.0 * v, k, n=50, dtype=torch.float64).num_hvp

    on_host = count()
    _C.take_device_path(True)
    try:
        assert on_host <= count() <= on_host + 2
    finally:
        _C.take_device_path(False)


def test_all_eigenpairs(device_path):
    spectrum = torch.arange(1.0, 8.0, dtype=torch.float64)
    result = eigsh(lambda v: spectrum * v, 7, n=7, dtype=torch.float64, tol=1e-8)
    assert torch.allclose(result.values, spectrum.flip(0), rtol=1e-12)


@pytest.mark.parametrize("good", range(12))
def test_products_that_are_not_finite(device_path, good):
    """They are noticed a product or two late: what the products before them told is returned."""
    spectrum, calls = crowd(300, torch.float64), []

    def product(v):
        calls.append(v)
        return spectrum * v * (torch.nan if len(calls) > good else 1)

    with pytest.warns(ConvergenceWarning):
        result = eigsh(product, 3, n=300, dtype=torch.float64, tol=1e-10)
    assert result.status == "non-finite product"
    assert not result.converged.any()
    assert good < result.num_hvp == len(calls) <= good + 3
    assert result.values.isnan().sum() == max(3 - good, 0)
    found = 3 - int(result.values.isnan().sum())
    V = result.vectors[:, :found]
    residuals = torch.linalg.norm(spectrum[:, None] * V - V * result.values[:found], dim=0)
    assert torch.allclose(result.residuals[:found], residuals, rtol=1e-3)


@pytest.mark.parametrize("max_hvp", range(3, 14))
def test_a_budget(device_path, max_hvp):
    spectrum = crowd(300, torch.float64)
    with pytest.warns(ConvergenceWarning):
        result = eigsh(lambda v: spectrum * v, 3, n=300, dtype=torch.float64, tol=1e-10, max_hvp=max_hvp)
    assert (result.status, result.num_hvp) == ("max_hvp", max_hvp)
    V = result.vectors
    residuals = torch.linalg.norm(spectrum[:, None] * V - V * result.values, dim=0)
    assert torch.allclose(result.residuals, residuals, rtol=1e-3)


def test_density_and_trace(device_path):
    params = mlp()
    H = HessianOperator(loss_of(params), params)
    exact = torch.linalg.eigvalsh(dense_hessian(params))
    density = spectral_density(H, num_steps=H.shape[0], num_probes=2)
    assert density.nodes.min() == pytest.approx(float(exact[0]), rel=1e-8)
    assert density.nodes.max() == pytest.approx(float(exact[-1]), rel=1e-8)
    assert trace(H, num_probes=4 * H.shape[0]).value == pytest.approx(float(exact.sum()), rel=1e-8)
