"""Spectral density and trace against matrices whose spectrum is known."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from dynloss_ext import HessianOperator, diagonal, spectral_density, trace
from dynloss_ext.spectrum import Estimate, SpectralDensity


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


@pytest.fixture(scope="module")
def small() -> torch.Tensor:
    return symmetric(torch.tensor([9.0, 4.0, *torch.linspace(-1, 2, 18).tolist()]))


def assert_errors_match_the_spread(values: torch.Tensor, errors: torch.Tensor) -> None:
    """Of independent estimates, along the first dimension."""
    torch.testing.assert_close(errors.square().mean(0).sqrt(), values.std(0), rtol=0.15, atol=0)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_the_standard_error_of_the_trace_is_the_spread_over_seeds(small: torch.Tensor, method: str) -> None:
    H, settings = arguments(small)
    estimates = [trace(H, method=method, num_probes=12, seed=seed, **settings) for seed in range(800)]
    values, errors = torch.tensor([[e.value, e.stderr] for e in estimates], dtype=torch.float64).unbind(1)
    assert_errors_match_the_spread(values, errors)
    assert float(values.mean()) == pytest.approx(float(small.trace()), abs=4 * float(values.std()) / math.sqrt(800))


def test_the_standard_error_of_the_density_is_its_spread_over_seeds(small: torch.Tensor) -> None:
    H, settings = arguments(small)
    # With as many steps as eigenvalues the nodes, and so the grid, are the same for every seed.
    results = [
        spectral_density(H, num_steps=20, num_probes=5, bandwidth=0.3, grid_size=12, seed=seed, **settings)
        for seed in range(500)
    ]
    torch.testing.assert_close(results[0].grid, results[-1].grid)
    values, errors = (torch.stack([getattr(r, name) for r in results]) for name in ("density", "stderr"))
    peaks = values.mean(0) > 1e-3
    assert int(peaks.sum()) >= 5
    assert_errors_match_the_spread(values[:, peaks], errors[:, peaks])


@pytest.mark.parametrize("scale", [1e-250, 1e-160, 1e160, 1e250])
def test_what_is_finite_in_the_products_stays_finite(small: torch.Tensor, scale: float) -> None:
    H, settings = arguments(small)
    for method in ("hutchinson", "hutch++"):
        estimate = trace(H, method=method, num_probes=12, **settings)
        scaled = trace(lambda v: H(v) * scale, method=method, num_probes=12, **settings)
        assert scaled.value == pytest.approx(estimate.value * scale, rel=1e-9, abs=0)
        assert scaled.stderr == pytest.approx(estimate.stderr * scale, rel=1e-9, abs=0)


def peak_memory(work: Callable[[], object]) -> int:
    """Most bytes that torch held at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held, most = 0, 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [3.0, -1.3, 1e-20])
def test_eigenvalues_equal_to_rounding_are_one_peak(dtype: torch.dtype, value: float) -> None:
    """Curvature that is the same in all directions: of what rounding makes of it no spectrum is drawn."""
    Q = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=dtype))[0]
    density = spectral_density(lambda v: value * (Q @ (Q.T @ v)), n=20, dtype=dtype)
    assert density.bandwidth == pytest.approx(abs(value) / 100, rel=1e-3)
    assert torch.trapezoid(density.density, density.grid) == pytest.approx(1, rel=1e-6)
    assert float(density.grid[density.density.argmax()]) == pytest.approx(value, rel=1e-3)


def test_memory_of_the_density() -> None:
    """Beyond the Lanczos vectors, which are few here, it is linear in probes and in steps."""
    most = peak_memory(
        lambda: spectral_density(lambda v: v, n=10, dtype=torch.float64, num_steps=10, num_probes=50, grid_size=4096)
    )
    assert most < 8 * 4096 * (3 * 50 + 4 * 10)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_density_scales_with_the_operator(small: torch.Tensor, scale: float) -> None:
    H, settings = arguments(small)
    density = spectral_density(H, num_steps=10, num_probes=4, **settings)
    scaled = spectral_density(lambda v: H(v) * scale, num_steps=10, num_probes=4, **settings)
    for name, power in (("grid", 1), ("density", -1), ("stderr", -1)):
        torch.testing.assert_close(getattr(scaled, name) / scale**power, getattr(density, name))


def test_trace_of_a_long_float32_vector_loses_no_digits() -> None:
    n = 3_000_000

    def H(v: torch.Tensor) -> torch.Tensor:  # the projector on (1, 1, ...)
        return v.double().mean().float().expand(n)

    estimate = trace(H, num_probes=6, n=n, dtype=torch.float32)
    assert estimate.value == pytest.approx(1, abs=2e-6)
    assert estimate.stderr < 1e-10


def test_trace_leaves_nothing_of_the_basis_in_the_probes() -> None:
    n = 3_000_000
    parallel = []

    def H(v: torch.Tensor) -> torch.Tensor:
        mean = v.double().mean()
        parallel.append(abs(float(mean)) * math.sqrt(n))
        return mean.float().expand(n)

    trace(H, num_probes=6, n=n, dtype=torch.float32)
    assert max(parallel[-2:]) < 1e-6


def test_memory_of_the_trace() -> None:
    n = 1_000_000

    def peak(method: str) -> float:
        """In vectors of length n."""
        work = partial(trace, lambda v: 2 * v, method=method, num_probes=60, n=n, dtype=torch.float32)
        return peak_memory(work) / (4 * n)

    assert peak("hutchinson") < 9
    assert peak("hutch++") < 20 + 11


def test_a_default_device_does_not_matter(small: torch.Tensor) -> None:
    H, settings = arguments(small)
    settings.pop("device")

    def everything() -> tuple[SpectralDensity, list[Estimate]]:
        density = spectral_density(H, num_steps=6, num_probes=3, **settings)
        # The products of the second one span nothing, so that its basis comes from elsewhere.
        return density, [trace(H, **settings), trace(lambda v: 0 * v, **settings)]

    density, estimates = everything()
    with torch.device("meta"):
        other_density, other_estimates = everything()
    assert other_estimates == estimates
    for name in ("grid", "density", "stderr", "nodes", "weights"):
        assert torch.equal(getattr(other_density, name), getattr(density, name))


def test_hutchpp_varies_less_than_hutchinson_where_few_eigenvalues_are_large(bulk_and_outliers: torch.Tensor) -> None:
    H, settings = arguments(symmetric(bulk_and_outliers))
    spread = {
        method: torch.tensor(
            [trace(H, method=method, num_probes=24, seed=s, **settings).value for s in range(30)]
        ).std()
        for method in ("hutchinson", "hutch++")
    }
    assert spread["hutch++"] < 0.5 * spread["hutchinson"]


@pytest.mark.parametrize("eigenvalues", [[3.0, -1.0, 4.0], [2.0, 2.0, 2.0], [0.0, 0.0, 6.0], [0.0, 0.0, 0.0], [6.0]])
def test_hutchpp_is_exact_where_its_range_is_everything(eigenvalues: list[float]) -> None:
    H, settings = arguments(symmetric(torch.tensor(eigenvalues)))
    for seed in range(20):
        estimate = trace(H, num_probes=9, seed=seed, **settings)
        assert estimate.value == pytest.approx(sum(eigenvalues), abs=1e-14)
        assert estimate.stderr == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hutchpp_is_exact_where_products_are_almost_parallel(dtype: torch.dtype) -> None:
    # After one projection the basis is orthogonal only as far as a product differs from those before.
    eigenvalues = 10.0 ** torch.arange(0, 12, dtype=dtype)
    for seed in range(20):
        estimate = trace(lambda v: eigenvalues * v, num_probes=36, seed=seed, n=12, dtype=dtype)
        assert estimate.value == pytest.approx(float(eigenvalues.sum()), rel=20 * torch.finfo(dtype).eps)


def test_hutchpp_is_exact_on_a_range_smaller_than_its_basis() -> None:
    H, settings = arguments(symmetric(torch.tensor([5.0, -2.0] + [0.0] * 48)))
    estimate = trace(H, num_probes=30, **settings)
    assert estimate.value == pytest.approx(3, abs=1e-12)
    assert estimate.stderr < 1e-12


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("num_probes", [6, 7, 8, 30])
def test_trace_spends_its_probes(small: torch.Tensor, method: str, num_probes: int) -> None:
    H, settings = arguments(small)
    products = []
    trace(lambda v: (products.append(v), H(v))[1], method=method, num_probes=num_probes, **settings)
    assert len(products) == num_probes


def test_random_state_is_left_alone() -> None:
    H, settings = arguments(symmetric(torch.arange(10.0)))
    state = torch.get_rng_state()
    spectral_density(H, num_steps=4, num_probes=2, **settings)
    trace(H, **settings)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected an int >= 1, got 0"),
        ({"num_probes": 1.5}, "num_probes: expected an int, got float"),
        ({"bandwidth": -1.0}, r"bandwidth: expected a number in \(0, inf\), got -1.0"),
        ({"bandwidth": 0}, r"bandwidth: expected a number in \(0, inf\), got 0"),
        ({"bandwidth": "a"}, r"bandwidth: expected a number in \(0, inf\), got 'a'"),
        ({"seed": 1.5}, "seed: expected an int, got float"),
        ({"grid_size": 1}, "grid_size: expected an int >= 2, got 1"),
    ],
)
def test_density_refuses_bad_input(change: dict, message: str) -> None:
    H, settings = arguments(torch.eye(3, dtype=torch.float64))
    with pytest.raises((TypeError, ValueError), match=message):
        spectral_density(H, **{**settings, **change})


def test_trace_refuses_bad_input() -> None:
    H, settings = arguments(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"method: expected 'hutch\+\+' or 'hutchinson', got 'exact'"):
        trace(H, method="exact", **settings)
    with pytest.raises(ValueError, match="num_probes: expected an int >= 6, got 3"):
        trace(H, num_probes=3, **settings)
    with pytest.raises(TypeError, match="seed: expected an int, got str"):
        trace(H, seed="a", **settings)


def test_a_product_that_is_not_finite_is_an_error() -> None:
    settings = {"n": 3, "dtype": torch.float64, "device": "cpu"}
    with pytest.raises(RuntimeError, match="H: expected finite products, got one that is not"):
        spectral_density(lambda v: v * math.nan, num_steps=2, num_probes=1, **settings)
    with pytest.raises(RuntimeError, match="H: expected finite products, got one that is not"):
        trace(lambda v: v * math.inf, **settings)


# ---- diagonal --------------------------------------------------------------------------------------------


def test_the_diagonal_is_the_mean_of_signs_times_products(small: torch.Tensor) -> None:
    H, settings = arguments(small)
    before = torch.get_rng_state()
    found = diagonal(H, num_samples=9, seed=4, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(4)
    z = torch.stack([torch.randint(2, (20,), generator=generator, dtype=torch.int8) for _ in range(9)]).double() * 2 - 1
    samples = z * (z @ small)
    torch.testing.assert_close(found.values, samples.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.stderr, samples.std(0) / 3, rtol=1e-12, atol=1e-14)
    assert not torch.equal(diagonal(H, num_samples=9, seed=5, **settings).values, found.values)


def test_the_standard_error_of_the_diagonal_is_its_spread_over_seeds(small: torch.Tensor) -> None:
    H, settings = arguments(small)
    results = [diagonal(H, num_samples=12, seed=seed, **settings) for seed in range(800)]
    values, errors = (torch.stack([getattr(r, name) for r in results]) for name in ("values", "stderr"))
    assert_errors_match_the_spread(values, errors)
    off_diagonal = (small - small.diagonal().diag()).square().sum(1)
    torch.testing.assert_close(errors.square().mean(0), off_diagonal / 12, rtol=0.1, atol=0)
    assert ((values.mean(0) - small.diagonal()).abs() < 4 * values.std(0) / math.sqrt(800)).all()


@pytest.mark.parametrize("scale", [1e-250, 1e-160, 1e160, 1e250])
def test_a_diagonal_that_is_finite_has_a_finite_error(small: torch.Tensor, scale: float) -> None:
    H, settings = arguments(small)
    found = diagonal(H, num_samples=5, **settings)
    scaled = diagonal(lambda v: H(v) * scale, num_samples=5, **settings)
    torch.testing.assert_close(scaled.values / scale, found.values, rtol=1e-9, atol=0)
    torch.testing.assert_close(scaled.stderr / scale, found.stderr, rtol=1e-9, atol=1e-12)


def test_a_diagonal_in_float32_has_the_dtype_of_its_operator_and_zero_is_one() -> None:
    x = torch.linspace(1, 2, 6).requires_grad_()
    found = diagonal(HessianOperator((x**3).sum(), [x]), num_samples=3)
    torch.testing.assert_close(found.values, 6 * x.detach())
    assert found.stderr.dtype == torch.float32
    assert not diagonal(lambda v: 0 * v, n=4, num_samples=2).values.any()


def test_the_diagonal_refuses_bad_input_and_products_that_are_not_finite() -> None:
    H, settings = arguments(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="num_samples: expected an int >= 2, got 1"):
        diagonal(H, num_samples=1, **settings)
    with pytest.raises(TypeError, match="seed: expected an int, got str"):
        diagonal(H, seed="a", **settings)
    with pytest.raises(TypeError, match="H: expected a HessianOperator or a callable"):
        diagonal(torch.eye(3))
    for wrong in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match="H: expected finite products, got one that is not"):
            diagonal(lambda v, wrong=wrong: v * wrong, n=3)
