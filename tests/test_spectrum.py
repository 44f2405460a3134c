"""Spectral density and trace against matrices whose spectrum is known."""

import math

import pytest
import torch

from dynloss_ext import HessianOperator, spectral_density, trace


def symmetric(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    return q @ torch.diag(eigenvalues.double()) @ q.T


def operator(matrix: torch.Tensor) -> dict:
    return {"H": lambda v: matrix @ v, "n": len(matrix), "dtype": matrix.dtype, "device": "cpu"}


def arguments(matrix: torch.Tensor) -> tuple:
    settings = operator(matrix)
    return settings.pop("H"), settings


@pytest.fixture(scope="module")
def bulk_and_outliers() -> torch.Tensor:
    return torch.cat([torch.linspace(-1, 1, 97, dtype=torch.float64), torch.tensor([8.0, 12.0, 20.0])])


def test_quadrature_reproduces_the_moments_of_each_probe(bulk_and_outliers: torch.Tensor) -> None:
    # m nodes integrate polynomials up to degree 2m - 1 exactly: zᵀ Hⁱ z / zᵀz for i < 2m.
    matrix = symmetric(bulk_and_outliers)
    H, settings = arguments(matrix)
    result = spectral_density(H, num_steps=6, num_probes=3, seed=5, **settings)
    generator = torch.Generator().manual_seed(5)
    for nodes, weights in zip(result.nodes, result.weights, strict=True):
        z = torch.randint(2, (100,), generator=generator).mul_(2).sub_(1).double()
        power = z / z.norm()
        for degree in range(12):
            expected = float(z @ power) / z.norm()
            assert float((weights * nodes**degree).sum()) == pytest.approx(float(expected), rel=1e-10)
            power = matrix @ power
    assert result.num_hvp == 18


def test_density_integrates_to_one_and_finds_outliers(bulk_and_outliers: torch.Tensor) -> None:
    H, settings = arguments(symmetric(bulk_and_outliers))
    result = spectral_density(H, num_steps=60, num_probes=20, bandwidth=0.2, grid_size=4000, **settings)
    step = float(result.grid[1] - result.grid[0])
    assert float(result.density.sum()) * step == pytest.approx(1, abs=1e-6)
    for outlier in (8.0, 12.0, 20.0):
        near = (result.grid - outlier).abs() < 1
        mass, error = (float(x[near].sum()) * step for x in (result.density, result.stderr))
        assert abs(mass - 0.01) < 5 * error + 1e-9
        assert mass > 0.002
    exact = torch.exp(-0.5 * ((result.grid[:, None] - bulk_and_outliers) / 0.2) ** 2).mean(1) / (
        0.2 * math.sqrt(2 * math.pi)
    )
    assert ((result.density - exact).abs() < 5 * result.stderr + 1e-6).all()


def test_density_of_an_early_invariant_space_is_exact() -> None:
    eigenvalues = torch.tensor([2.0] * 30 + [5.0] * 10)
    H, settings = arguments(symmetric(eigenvalues))
    result = spectral_density(H, num_steps=25, num_probes=200, **settings)
    assert result.nodes.shape == (200, 25)
    assert result.num_hvp == 400
    at_five = torch.where((result.nodes - 5).abs() < 1e-6, result.weights, 0.0).sum(1)
    assert float(at_five.mean()) == pytest.approx(0.25, abs=5 * float(at_five.std()) / math.sqrt(200))
    torch.testing.assert_close(result.weights.sum(1), torch.ones(200, dtype=torch.float64))


def test_density_of_a_hessian_and_one_probe() -> None:
    x = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    H = HessianOperator((x**2 * torch.arange(1, 8)).sum(), [x])
    result = spectral_density(H, num_steps=50, num_probes=1)
    torch.testing.assert_close(result.nodes[0], 2.0 * torch.arange(1, 8, dtype=torch.float64))
    assert result.stderr.isnan().all()


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_is_within_its_standard_error(bulk_and_outliers: torch.Tensor, method: str) -> None:
    matrix = symmetric(bulk_and_outliers)
    H, settings = arguments(matrix)
    deviations = []
    for seed in range(40):
        estimate = trace(H, method=method, num_probes=24, seed=seed, **settings)
        deviations.append((estimate.value - float(matrix.trace())) / estimate.stderr)
    scores = torch.tensor(deviations)
    assert abs(float(scores.mean())) < 0.8
    assert 0.5 < float(scores.std()) < 2


def test_hutchpp_varies_less_than_hutchinson_where_few_eigenvalues_are_large(bulk_and_outliers: torch.Tensor) -> None:
    H, settings = arguments(symmetric(bulk_and_outliers))
    spread = {
        method: torch.tensor(
            [trace(H, method=method, num_probes=24, seed=s, **settings).value for s in range(30)]
        ).std()
        for method in ("hutchinson", "hutch++")
    }
    assert spread["hutch++"] < 0.5 * spread["hutchinson"]


def test_hutchpp_is_exact_where_its_range_is_everything() -> None:
    matrix = symmetric(torch.tensor([3.0, -1.0, 4.0]))
    H, settings = arguments(matrix)
    estimate = trace(H, num_probes=9, **settings)
    assert estimate.value == pytest.approx(6.0)
    assert estimate.stderr == 0


def test_random_state_is_left_alone() -> None:
    H, settings = arguments(symmetric(torch.arange(10.0)))
    state = torch.get_rng_state()
    spectral_density(H, num_steps=4, num_probes=2, **settings)
    trace(H, **settings)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"num_probes": 1.5}, "num_probes must be an int, got float"),
        ({"bandwidth": -1.0}, "bandwidth must be finite and > 0, got -1.0"),
        ({"grid_size": 1}, "grid_size must be >= 2, got 1"),
    ],
)
def test_density_refuses_bad_input(change: dict, message: str) -> None:
    H, settings = arguments(torch.eye(3, dtype=torch.float64))
    with pytest.raises((TypeError, ValueError), match=message):
        spectral_density(H, **{**settings, **change})


def test_trace_refuses_bad_input() -> None:
    H, settings = arguments(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"method must be 'hutch\+\+' or 'hutchinson', got 'exact'"):
        trace(H, method="exact", **settings)
    with pytest.raises(ValueError, match="num_probes must be >= 6, got 3"):
        trace(H, num_probes=3, **settings)


def test_a_product_that_is_not_finite_is_an_error() -> None:
    settings = {"n": 3, "dtype": torch.float64, "device": "cpu"}
    with pytest.raises(RuntimeError, match="not finite"):
        spectral_density(lambda v: v * math.nan, num_steps=2, num_probes=1, **settings)
    with pytest.raises(RuntimeError, match="not finite"):
        trace(lambda v: v * math.inf, **settings)
