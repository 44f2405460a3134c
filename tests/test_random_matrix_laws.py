"""The laws that docs/how_to/plot_random_matrix_theory.py draws: their moments, and random matrices themselves."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "how_to" / "plot_random_matrix_theory.py"


@pytest.fixture(scope="module")
def laws() -> dict[str, Any]:
    """What the script defines before it samples anything."""
    definitions, _, _ = SCRIPT.read_text().partition("# Random matrices of")
    names: dict[str, Any] = {}
    exec(compile(definitions, str(SCRIPT), "exec"), names)
    return names


def moments(law, reach, phi, epsilon, highest=4):
    """The zeroth to the highest, by a grid of midpoints."""
    edges = np.linspace(-reach, reach, 8001)
    x = (edges[1:] + edges[:-1]) / 2
    density = law(x, phi, epsilon)
    assert (density >= 0).all()
    return [float((density * x**n).sum() * (edges[1] - edges[0])) for n in range(highest + 1)]


def of_cumulants(k1, k2, k3, k4):
    """Moments from free cumulants: sums over the partitions without crossings."""
    return [1, k1, k2 + k1**2, k3 + 3 * k1 * k2 + k1**3, k4 + 4 * k1 * k3 + 2 * k2**2 + 6 * k1**2 * k2 + k1**4]


@pytest.mark.parametrize(("phi", "epsilon"), [(0.25, 0.0), (0.25, 0.01), (0.25, 1.0), (0.8, 0.3), (3.0, 2.0)])
def test_moments_of_the_sum(laws, phi, epsilon):
    """The n-th free cumulant of a Wishart matrix is φⁿ⁻¹, that of a Wigner matrix 2ε at n = 2 and else 0."""
    found = moments(laws["sum_law"], 25.0, phi, epsilon)
    assert found == pytest.approx(of_cumulants(1, phi + 2 * epsilon, phi**2, phi**3), rel=2e-3)


@pytest.mark.parametrize(("phi", "epsilon"), [(0.25, 1.0), (0.5, 0.5), (0.9, 0.2)])
def test_moments_of_the_product(laws, phi, epsilon):
    found = moments(laws["product_law"], 3.0, phi, epsilon)
    expected = of_cumulants(0, epsilon * phi / 2, 0, epsilon**2 * phi**3 / 4)
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-12)


def shares_below(law, x, reach, *parameters):
    edges = np.linspace(-reach, reach, 8001)
    middles = (edges[1:] + edges[:-1]) / 2
    cumulative = np.append(0, law(middles, *parameters).cumsum() * (edges[1] - edges[0]))
    return np.interp(x, edges, cumulative)


def assert_distributed(eigenvalues, law, reach, *parameters):
    """As many eigenvalues below each of them as the law says, up to four of all: they keep their distances."""
    counts = np.arange(len(eigenvalues)) + 0.5
    expected = shares_below(law, np.sort(eigenvalues), reach, *parameters) * len(eigenvalues)
    assert np.abs(expected - counts).max() < 4


@pytest.mark.parametrize(("phi", "epsilon"), [(0.25, 0.0), (0.25, 1.0), (0.8, 0.3)])
def test_eigenvalues_of_a_wishart_plus_a_wigner_matrix(laws, phi, epsilon):
    random, size = np.random.default_rng(0), 400
    factor, noise = random.normal(size=(size, round(size / phi))), random.normal(size=(size, size))
    wigner = (noise + noise.T) / math.sqrt(2 * size)
    matrix = factor @ factor.T / factor.shape[1] + math.sqrt(2 * epsilon) * wigner
    assert_distributed(np.linalg.eigvalsh(matrix), laws["sum_law"], 8.0, phi, epsilon)


@pytest.mark.parametrize(("phi", "epsilon"), [(0.25, 1.0), (0.5, 0.5), (0.9, 0.2)])
def test_eigenvalues_of_blocks_of_residuals_times_inputs(laws, phi, epsilon):
    """A hidden unit's block: residuals and inputs of the samples that it is active for, half of all 2n / φ."""
    random, units = np.random.default_rng(0), 200
    samples = round(2 * units / phi)
    residuals = math.sqrt(2 * epsilon) * random.normal(size=(units, samples // 2))
    values = np.linalg.svd(residuals @ random.normal(size=(samples // 2, units)) / samples, compute_uv=False)
    assert_distributed(np.concatenate([values, -values]), laws["product_law"], 3.0, phi, epsilon)


@pytest.mark.parametrize("phi", [0.1, 0.25, 0.6])
def test_from_the_critical_energy_on_there_are_negative_eigenvalues(laws, phi):
    critical, x = laws["critical_energy"](phi), np.linspace(-1, 0, 4001)
    assert not laws["sum_law"](x, phi, 0.99 * critical).any()
    assert laws["sum_law"](x, phi, 1.05 * critical).any()


def test_negative_eigenvalues_grow_with_the_power_three_halves(laws):
    critical, roots = laws["critical_energy"](0.25), np.linspace(0, 0.3, 2001)
    shares = [
        (laws["sum_law"](-(roots**2), 0.25, critical * (1 + d)) * roots).sum() for d in (0.001, 0.002)
    ]  # over λ = -root²
    assert math.log2(shares[1] / shares[0]) == pytest.approx(1.5, abs=0.02)
