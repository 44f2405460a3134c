"""EigenTracker along sequences of operators."""

import io
import warnings

import numpy as np
import pytest
import torch
from curvature_problems import Spiral

from dynloss_ext import ConvergenceWarning, EigenTracker, HessianOperator, eigsh

pytestmark = pytest.mark.filterwarnings("error::dynloss_ext.ConvergenceWarning")


def rotating(n=120, seed=0):
    """t -> symmetric matrix whose eigenvectors turn slowly; the first two values cross at t = 0.5."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    skew = torch.randn(n, n, generator=generator, dtype=torch.float64) / n
    skew = skew - skew.T
    tail = torch.linspace(-2, 2, n - 3, dtype=torch.float64)

    def at(t):
        values = torch.cat([torch.tensor([9 - 4 * t, 5 + 4 * t, 4.0], dtype=torch.float64), tail])
        R = torch.linalg.matrix_exp(0.05 * t * skew) @ Q
        return (R * values) @ R.T, values, R

    return at


def spiral_states(start, count, gap=1):
    spiral = Spiral()
    for _ in range(start):
        spiral.train()
    for _ in range(count):
        for _ in range(gap):
            spiral.train()
        yield HessianOperator(spiral.loss(), spiral.params)


@pytest.mark.slow
def test_a_thousand_consecutive_states_none_missed():
    """Through the first instability of the spiral: every eigenvalue within 1e-4 at tol 1e-3, at most 8 products."""
    tracker = EigenTracker(3)
    worst = 0.0
    for H in spiral_states(3800, 1000):
        exact = eigsh(H, 3, tol=1e-8).values
        worst = max(worst, float(((tracker.update(H).values - exact) / exact).abs().max()))
    assert worst < 1e-4
    assert tracker.num_updates == 1000
    assert tracker.num_hvp <= 8 * 1000


@pytest.mark.parametrize(("tol", "error"), [(1e-3, 1e-4), (1e-6, 1e-6)])
def test_dense_eigenvalues_on_the_spiral(tol, error):
    tracker = EigenTracker(3, tol=tol)
    for H in spiral_states(100, 12, gap=25):
        exact = torch.linalg.eigvalsh(H.to_dense())[-3:].flip(0)
        assert torch.allclose(tracker.update(H).values, exact, rtol=error, atol=0)


def test_identities_follow_the_eigenvectors_through_a_crossing():
    at, tracker = rotating(), EigenTracker(3)
    seen = []
    for t in np.linspace(0, 1, 41):
        matrix, values, _ = at(t)
        previous = tracker.result
        result = tracker.update(matrix.__matmul__, n=len(values), dtype=torch.float64)
        assert torch.allclose(result.values, values.sort(descending=True).values[:3], rtol=1e-4)
        if previous is not None and abs(t - 0.5) > 0.1:
            assert ((previous.vectors * result.vectors).sum(0) > 0.9).all()
        seen.append(tracker.identities.tolist())
    assert seen[0] == [0, 1, 2]
    assert seen[-1] == [1, 0, 2]


def test_a_newcomer_gets_a_new_identity_and_is_found_by_an_audit():
    """The new top eigenvector has exactly nothing of the old ones in it: only an audit can see it."""
    base = torch.cat([torch.tensor([9.0, 6.0, 5.0]), torch.linspace(0, 1, 97)]).double()
    tracker = EigenTracker(3, audit_every=10**6)
    tracker.update(lambda v: base * v, n=100, dtype=torch.float64)
    exact = torch.zeros(100, 3, dtype=torch.float64)
    exact[:3] = torch.eye(3)
    tracker.result.vectors.copy_(exact)
    changed = base.clone()
    changed[50] = 20.0
    blind = tracker.update(lambda v: changed * v)
    assert blind.values.tolist() == pytest.approx([9, 6, 5])
    found = tracker.update(lambda v: changed * v, audit=True)
    assert found.values.tolist() == pytest.approx([20, 9, 6])
    assert tracker.identities.tolist() == [3, 0, 1]


def test_equal_eigenvalues_stay_found_between_audits():
    """The Krylov space of the old vectors' sum has one vector for the three copies; the others are looked up."""
    at = rotating()
    values = torch.cat([torch.tensor([7.0, 7, 7, 5, 4, 3]), torch.linspace(-1, 1, 114)]).double()
    tracker = EigenTracker(3, audit_every=10**6)
    for t in np.linspace(0, 0.2, 5):
        _, _, vectors = at(t)
        matrix = (vectors * values) @ vectors.T
        result = tracker.update(matrix.__matmul__, n=len(values), dtype=torch.float64)
        assert result.values.tolist() == pytest.approx([7, 7, 7], rel=1e-4)


@pytest.mark.parametrize("every", [1, 4])
def test_audits_come_when_due(every):
    base = torch.cat([torch.tensor([9.0, 6.0, 5.0]), torch.linspace(0, 1, 97)]).double()
    tracker = EigenTracker(3, audit_every=every)
    costs = [tracker.update(lambda v: base * v, n=100, dtype=torch.float64).num_hvp for _ in range(9)]
    never = EigenTracker(3, audit_every=10**6)
    plain = [never.update(lambda v: base * v, n=100, dtype=torch.float64).num_hvp for _ in range(9)]
    assert [a > b for a, b in zip(costs[1:], plain[1:], strict=True)] == [i % every == 0 for i in range(1, 9)]


def test_smallest_and_magnitude():
    at = rotating()
    for which, key in (("SA", lambda v: v), ("LM", lambda v: -v.abs())):
        tracker = EigenTracker(2, which=which, tol=1e-6)
        for t in (0.0, 0.3, 0.6):
            matrix, values, _ = at(t)
            expected = values[torch.argsort(key(values))[:2]].sort(descending=True).values
            result = tracker.update(matrix.__matmul__, n=len(values), dtype=torch.float64)
            assert torch.allclose(result.values, expected, rtol=1e-9)


def test_state_dict_goes_on_with_the_same_numbers():
    at = rotating()
    times = np.linspace(0, 1, 10)

    def run(tracker, part):
        return [tracker.update(at(t)[0].__matmul__, n=120, dtype=torch.float64) for t in part]

    whole = EigenTracker(3, audit_every=3)
    expected = run(whole, times)
    first, second = EigenTracker(3, audit_every=3), EigenTracker(3, audit_every=3)
    run(first, times[:5])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for a, b in zip(run(second, times[5:]), expected[5:], strict=True):
        assert torch.equal(a.values, b.values)
        assert a.num_hvp == b.num_hvp
    assert torch.equal(second.identities, whole.identities)
    assert second.num_hvp == whole.num_hvp
    with pytest.raises(ValueError, match="state is of a tracker"):
        EigenTracker(2).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="lacks"):
        EigenTracker(3).load_state_dict({"settings": {}})


def test_budget_per_update():
    at = rotating()
    tracker = EigenTracker(3, tol=1e-10, max_hvp=7)
    for t in (0.0, 0.1, 0.2):
        with pytest.warns(ConvergenceWarning, match=r"EigenTracker.update stopped by max_hvp after 7 products"):
            result = tracker.update(at(t)[0].__matmul__, n=120, dtype=torch.float64)
        assert result.num_hvp == 7
    assert not result.converged.all()


def test_recovers_from_a_product_that_was_not_finite():
    base = torch.linspace(0, 5, 60, dtype=torch.float64)
    tracker = EigenTracker(2)
    tracker.update(lambda v: base * v, n=60, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert tracker.update(lambda v: v * float("nan")).status == "non-finite product"
    lost = tracker.identities.tolist()
    recovered = tracker.update(lambda v: base * v)
    assert recovered.values[0] == pytest.approx(5.0, rel=1e-4)
    first = EigenTracker(2, seed=2).update(lambda v: base * v, n=60, dtype=torch.float64)
    assert recovered.num_hvp == first.num_hvp  # from scratch, with its audit
    assert tracker.identities.tolist() == lost


def test_schedule():
    base = torch.cat([torch.tensor([9.0, 6.0]), torch.linspace(0, 1, 60)]).double()
    tracker = EigenTracker(2, max_interval=8, rest=0.01)
    assert tracker.due(0)
    intervals = []
    for scale in (1, 1, 1, 1, 1, 2, 2):
        tracker.update(lambda v, scale=scale: scale * base * v, n=62, dtype=torch.float64)
        intervals.append(next(i for i in range(1, 99) if tracker.due(i)))
    assert intervals == [1, 2, 4, 8, 8, 1, 2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 0}, "k must be"),
        ({"which": "BE"}, "which must be"),
        ({"tol": 2.0}, "tol must be"),
        ({"audit_every": 0}, "audit_every must be"),
        ({"max_basis": 4}, "max_basis must be"),
        ({"max_hvp": 2}, "max_hvp must be"),
        ({"max_interval": 0}, "max_interval must be"),
        ({"rest": -1.0}, "rest must be"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        EigenTracker(**options)


def test_another_size_is_refused():
    tracker = EigenTracker(1)
    tracker.update(lambda v: 2 * v, n=5, dtype=torch.float64)
    with pytest.raises(ValueError, match="last update"):
        tracker.update(lambda v: 2 * v, n=6, dtype=torch.float64)
