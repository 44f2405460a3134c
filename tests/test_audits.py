"""What eigsh finds beyond its Krylov space, and what it says of that which it may have missed."""

import math
import warnings

import numpy as np
import pytest
import torch
from curvature_problems import Known, check_eigenpairs

from dynloss_ext import ConvergenceWarning, eigsh

pytestmark = pytest.mark.filterwarnings("error::dynloss_ext.ConvergenceWarning")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("tol", [1e-1, 1e-6])
def test_copies_are_found_from_every_start(n, seed, tol):
    """At a loose tolerance the rounding errors have no time to bring the copies up: only the audit does."""
    operator = Known([7.0, 7.0, 7.0, 0.1, 0.099, *np.linspace(0, 0.01, n - 5)], seed=seed)
    check_eigenpairs(operator, operator.solve(3, tol=tol, seed=seed), 3, rtol=tol**2)


@pytest.mark.parametrize("max_basis", [4, 5, 8, 24])
def test_copies_in_a_crowd_are_missed_no_more_often_than_is_said(max_basis):
    """The second 7 has nothing of itself in the Krylov space of the start; the bulk begins at 4."""
    missed, said = 0, 0.0
    spectrum = torch.tensor([7.0, 7.0, 5.0, *np.linspace(-1, 4, 300)], dtype=torch.float64)
    for seed in range(60):
        result = eigsh(lambda v: spectrum * v, 2, n=303, dtype=torch.float64, seed=seed, max_basis=max_basis)
        assert result.status == "converged"
        assert 0 < result.miss_probability < 0.08
        said += result.miss_probability
        missed += abs(result.values[1].item() - 7.0) > 1e-2
    assert missed <= said
    assert missed < 5


def test_what_an_audit_has_found_need_not_be_found_again():
    """Its Ritz vector comes into the basis as the probe saw it; a worse one costs three products more to refine."""
    spectrum = torch.tensor([7.0, 7.0, 5.0, *np.linspace(-1, 4, 300)], dtype=torch.float64)
    results = [eigsh(lambda v: spectrum * v, 2, n=303, dtype=torch.float64, seed=seed) for seed in range(12)]
    assert sum(result.num_hvp for result in results) <= 12 * 36


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("n", [6, 10, 14])
def test_copies_half_in_the_basis_are_found(n, which):
    """The second 3 and the second -3 are in equal parts in the complement of the basis and in a Ritz vector that has
    not converged: what either shows alone is zero."""
    spectrum = torch.cat([torch.tensor([3.0, 3.0, -3.0, -3.0]), torch.linspace(-2, 2, n - 4)]).double()
    expected = {"LA": [3, 3, 2], "SA": [-2, -3, -3], "LM": [3, 3, 3]}[which]
    for seed in range(50):
        result = eigsh(lambda v: spectrum * v, 3, which=which, n=n, dtype=torch.float64, tol=1e-6, seed=seed)
        values = result.values.abs() if which == "LM" else result.values
        assert values.tolist() == pytest.approx(expected, rel=1e-6)
        assert result.miss_probability < 1e-6
        assert result.num_hvp <= 2 * n


def test_misses_where_the_space_is_small_are_as_rare_as_is_said():
    spectrum = torch.cat([torch.tensor([3.0, 3.0, -3.0, -3.0]), torch.linspace(-2, 2, 20)]).double()
    missed = []
    for seed in range(500):
        result = eigsh(lambda v: spectrum * v, 3, n=24, dtype=torch.float64, tol=1e-6, seed=seed)
        if result.values[1] < 3 - 1e-3:
            missed.append(result.miss_probability)
    assert sum(p < 1e-3 for p in missed) <= 3
    assert len(missed) < 0.08 * 500 / 2


@pytest.mark.parametrize(("dtype", "spread", "tol"), [(torch.float32, 1e-4, 1e-5), (torch.float64, 1.5e-10, 1e-12)])
def test_audits_end_where_all_eigenvalues_are_nearly_equal(dtype, spread, tol):
    """What rounding leaves of the basis in the probe must not be magnified into an eigenvalue."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        operator = Known(1 + spread * torch.randn(40, generator=generator, dtype=torch.float64), dtype, seed)
        result = operator.solve(1, tol=tol, seed=seed)
        assert result.status == "converged"
        assert result.num_hvp < 100
        assert result.values.item() == pytest.approx(operator.expected(1).item(), abs=spread)


@pytest.mark.parametrize("asymmetry", [0.0, 2e-4, 5e-4])
def test_audits_see_what_is_beyond_the_noise_of_single_components(asymmetry):
    """Products that are inexact in a few directions say nothing of the others."""
    n = 20_000
    generator = torch.Generator().manual_seed(1)  # the audits' seed is 0, whose vectors the start must know nothing of
    x = 0.3 * torch.rand(n, dtype=torch.float64, generator=generator)
    x[:12] = torch.linspace(0.6, 0.95, 12, dtype=torch.float64)
    x[0], x[12] = 1.0, 1.01
    start = 0.003 * torch.randn(n, dtype=torch.float64, generator=generator)
    start[:12], start[12] = 1.0, 0.0

    def product(v):
        w = v * x
        w[:12] += asymmetry * (v[:12].roll(1) - v[:12].roll(-1))
        return w

    assert eigsh(product, 1, v0=start).values.item() == pytest.approx(1.01, rel=1e-4)


def test_an_audit_that_is_deceived_again_and_again_ends():
    """Products whose noise is larger than their eigenvalues differ: what comes up is noise."""
    ends = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        operator = Known(1 + 1e-4 * torch.randn(40, generator=generator), torch.float32, seed)

        def product(v, operator=operator, generator=generator):
            return operator(v) + 1e-4 * torch.randn(40, generator=generator) / 40**0.5

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            ends.append(eigsh(product, 1, n=40, dtype=torch.float32, tol=1e-8, seed=seed).num_hvp)
    assert max(ends) < 300


def test_an_audit_that_the_crowd_outlasts_says_so():
    """At the edge of a bulk, 24 products cannot tell what lies a thousandth beyond the third value."""
    diagonal = torch.linspace(-1, 1, 20_000, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="audit was inconclusive: eigenpairs may be missing"):
        result = eigsh(lambda v: diagonal * v, 3, n=20_000, dtype=torch.float64)
    assert result.status == "converged, audit inconclusive"
    assert result.miss_probability >= 0.5
    assert result.converged.all()
    diagonal[-3:] += torch.tensor([1.0, 2.0, 3.0])
    result = eigsh(lambda v: diagonal * v, 3, n=20_000, dtype=torch.float64)
    assert result.status == "converged"
    assert result.miss_probability < 0.08


def test_the_whole_space_leaves_nothing_to_miss():
    assert Known(np.linspace(-3, 4, 12)).solve(12).miss_probability == 0
    assert Known([3.0, -1.0]).solve(1).miss_probability == 0


def test_an_audit_that_has_seen_all_of_the_complement_leaves_nothing_to_miss():
    """Few different eigenvalues: the space of any vector ends after as many steps, but for rounding."""
    for seed in range(5):
        result = Known([5.0, *[1.0] * 50, *[0.5] * 50], seed=seed).solve(1, seed=seed)
        assert result.status == "converged"
        assert result.miss_probability == 0


def test_vector_missing_from_the_start_is_found():
    """Two exact eigenvectors are the start: they converge at once, and the larger one is orthogonal to both."""
    operator = Known([9.0, 5.0, 4.0, *np.linspace(0, 1, 200)])
    result = operator.solve(2, tol=1e-6, v0=operator.Q[:, 1:3].contiguous())
    check_eigenpairs(operator, result, 2, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "small", "large"), [(torch.float32, 1e-9, 1e12), (torch.float64, 1e-150, 1e150)])
def test_what_an_audit_finds_may_be_beyond_the_range_of_what_was_seen(dtype, small, large):
    spectrum = torch.zeros(100, dtype=dtype)
    spectrum[:2] = torch.tensor([small, large], dtype=dtype)
    result = eigsh(lambda v: spectrum * v, 1, v0=torch.eye(100, dtype=dtype)[:, 0])
    assert result.status == "converged"
    assert result.values.item() == pytest.approx(large, rel=1e-5)


def test_nothing_has_converged_before_its_audit():
    operator = Known([9.0, 5.0, *np.linspace(-1, 1, 100)])

    last = operator.solve(2, tol=1e-2).num_hvp

    def fails_late(v):
        return operator(v) if operator.calls < 2 * last - 1 else torch.full_like(v, math.nan)

    with pytest.warns(ConvergenceWarning, match="non-finite product"):
        result = eigsh(fails_late, 2, n=102, dtype=torch.float64, tol=1e-2)
    assert result.residuals[0] < 1e-2 * 9
    assert not result.converged.any()
    assert math.isnan(result.miss_probability)

    with pytest.warns(ConvergenceWarning, match="max_hvp"):
        cut_short = operator.solve(2, tol=1e-2, max_hvp=last - 1)
    assert cut_short.residuals.max() < 1e-2 * 5
    assert not cut_short.converged.any()
    assert math.isnan(cut_short.miss_probability)


def test_what_an_audit_finds_costs_no_second_run():
    """The basis has room for the audit's vectors here: 142 products where they are computed again."""
    diagonal = torch.cat([torch.tensor([9.0, 4.0, 4.0, 1.0]), torch.linspace(-1, 0.5, 300)]).double()
    results = [eigsh(lambda v: diagonal * v, 3, n=304, dtype=torch.float64, seed=seed) for seed in range(5)]
    assert all(torch.allclose(result.values, diagonal[:3], rtol=1e-5) for result in results)
    assert sum(result.num_hvp for result in results) < 125
