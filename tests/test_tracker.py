"""EigenTracker along sequences of operators."""

import io
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from curvature_problems import Spiral

from dynloss_ext import ConvergenceWarning, EigenTracker, HessianOperator

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


def test_the_hessian_by_hand():
    spiral = Spiral()
    for _ in range(30):
        spiral.train()
    assert torch.allclose(spiral.hessian(), HessianOperator(spiral.loss(), spiral.params).to_dense(), atol=1e-14)


@pytest.mark.slow
def test_a_thousand_consecutive_states_none_missed():
    """Through the first instability of the spiral: every eigenvalue within 1e-4 at tol 1e-3, at most 8 products."""
    tracker, spiral = EigenTracker(3), Spiral()
    worst = 0.0
    for step in range(4800):
        if step >= 3800:
            exact = torch.linalg.eigvalsh(spiral.hessian())[-3:].flip(0)
            result = tracker.update(HessianOperator(spiral.loss(), spiral.params))
            worst = max(worst, float(((result.values - exact) / exact).abs().max()))
        spiral.train()
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


def test_one_eigenvector_hands_its_identity_on_once():
    """Where two new ones have the same share of it."""
    before = torch.diag(torch.tensor([10.0, 1.0, 9.0, 0.5, 0.3, 0.1], dtype=torch.float64))
    after = torch.diag(torch.tensor([9.5, 9.5, 1.0, 0.5, 0.3, 0.1], dtype=torch.float64))
    after[0, 1] = after[1, 0] = 0.5  # eigenvectors (e0 ± e1)/√2
    tracker = EigenTracker(k=2)
    for matrix in (before, after):
        tracker.update(matrix.__matmul__, audit=True, n=6, dtype=torch.float64)
    assert sorted(tracker.identities.tolist()) == [0, 2]


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


@pytest.mark.parametrize("max_basis", [5, 8, 24])
def test_a_newcomer_in_a_crowd_is_found_by_an_audit(max_basis):
    """Whatever memory there is: the audit keeps no basis of its own."""
    base = torch.tensor([7.0, 6.5, 6.0, *np.linspace(-1, 5.8, 300)], dtype=torch.float64)
    with_newcomer = base.clone()
    with_newcomer[50] = 6.8
    missed, said = 0, 0.0
    for seed in range(30):
        tracker = EigenTracker(3, seed=seed, max_basis=max_basis)
        tracker.update(lambda v: base * v, n=303, dtype=torch.float64)
        tracker.result.vectors.copy_(torch.eye(303, 3))
        result = tracker.update(lambda v: with_newcomer * v, audit=True)
        missed += abs(result.values[1].item() - 6.8) > 1e-2
        said += result.miss_probability
    assert missed <= 2
    assert said < 30 * 0.08


def test_only_audits_say_what_may_be_missing():
    base = torch.linspace(0, 9, 50, dtype=torch.float64)
    tracker = EigenTracker(2, audit_every=3)
    said = [tracker.update(lambda v: base * v, n=50, dtype=torch.float64).miss_probability for _ in range(6)]
    assert [not math.isnan(p) for p in said] == [True, False, False, True, False, False]


def test_an_audit_that_did_not_converge_is_made_up_for():
    base = torch.cat([torch.tensor([9.0, 6.0, 5.0]), torch.linspace(0, 1, 97)]).double()
    tracker = EigenTracker(3, audit_every=4)
    audited = []
    for i in range(9):
        broken = i == 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            calls = itertools.count()
            result = tracker.update(
                lambda v, broken=broken, calls=calls: base * v * (math.nan if broken and next(calls) >= 4 else 1),
                n=100,
                dtype=torch.float64,
            )
        audited.append(not math.isnan(result.miss_probability))
    assert audited == [True, False, False, False, False, True, False, False, False]


def test_state_dict_goes_on_with_the_same_numbers():
    """With everything in it that a tracker counts: a newcomer among the vectors, a long interval, another seed."""
    at = rotating()
    times = np.linspace(0, 1, 10)
    newcomer = torch.zeros(120, dtype=torch.float64)
    newcomer[7] = 30.0

    def run(tracker, part):
        results = []
        for t in part:
            matrix = at(t)[0] + (torch.diag(newcomer) if t > 0.2 else 0)
            results.append(tracker.update(matrix.__matmul__, n=120, dtype=torch.float64, audit=0.2 < t < 0.3))
        return results

    def make(seed):
        return EigenTracker(3, audit_every=3, seed=seed, max_interval=8, rest=0.2)

    whole, first, second = make(5), make(5), make(6)
    expected = run(whole, times)
    run(first, times[:5])
    assert max(first.identities) > 2
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert [second.due(i) for i in range(9)] == [first.due(i) for i in range(9)]
    assert not second.due(1)
    for a, b in zip(run(second, times[5:]), expected[5:], strict=True):
        assert torch.equal(a.values, b.values)
        assert a.num_hvp == b.num_hvp
        assert a.miss_probability == b.miss_probability or math.isnan(b.miss_probability)
    assert torch.equal(second.identities, whole.identities)
    assert second.num_hvp == whole.num_hvp
    assert second.num_updates == whole.num_updates
    # A vector that is new after the restart gets the number that it gets without one.
    for tracker in (whole, second):
        tracker.update(lambda v: torch.linspace(-1, 1, 120, dtype=torch.float64) * v, audit=True)
    assert torch.equal(second.identities, whole.identities)


@pytest.mark.parametrize("other", [{"k": 2}, {"tol": 0.1}, {"audit_every": 7}, {"max_interval": 4}, {"rest": 0.5}])
def test_state_of_another_tracker_is_refused(other):
    with pytest.raises(ValueError, match=r"state: expected one of a tracker with .* got one with"):
        EigenTracker(**other).load_state_dict(EigenTracker().state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"settings": None}, "state: expected one of a tracker with .* got one with None"),
        ({"result": {"values": 3}}, "state: expected .* got .* for result"),
        ({"start": 5}, "state: expected .* got 5 for start"),
        ({"identities": [0, 1, 2]}, r"state: expected .* got \[0, 1, 2\] for identities"),
        ({"identities": torch.arange(7)}, "state: expected .* got .* for identities"),
        ({"num_updates": "many"}, "state: expected .* got 'many' for num_updates"),
    ],
)
def test_what_is_no_state_is_refused(change, match):
    tracker = EigenTracker(3)
    before = tracker.state_dict()
    with pytest.raises(ValueError, match=match):
        tracker.load_state_dict(before | change)
    assert str(tracker.state_dict()) == str(before)
    with pytest.raises(ValueError, match=r"state: expected all entries .* got none named"):
        tracker.load_state_dict({"settings": {}})
    with pytest.raises(TypeError, match="state: expected a dict from state_dict, got NoneType"):
        tracker.load_state_dict(None)


def test_default_device_does_not_matter():
    base = torch.linspace(0, 9, 50, dtype=torch.float64)
    with torch.device("meta"):
        tracker = EigenTracker(2)
        result = tracker.update(lambda v: base * v, n=50, dtype=torch.float64, device="cpu")
        tracker.update(lambda v: -base * v)
    assert result.values.device.type == tracker.identities.device.type == "cpu"


def test_the_warning_is_shown_once():
    at = rotating()
    tracker = EigenTracker(3, tol=1e-10, max_hvp=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", ConvergenceWarning)
        for t in (0.0, 0.1, 0.2):
            tracker.update(at(t)[0].__matmul__, n=120, dtype=torch.float64)
    assert len(caught) == 1


def test_budget_per_update():
    at = rotating()
    tracker = EigenTracker(3, tol=1e-10, max_hvp=7)
    for t in (0.0, 0.1, 0.2):
        with pytest.warns(ConvergenceWarning, match="EigenTracker.update stopped by max_hvp"):
            result = tracker.update(at(t)[0].__matmul__, n=120, dtype=torch.float64)
        assert result.num_hvp == 7
    assert not result.converged.all()


@pytest.mark.parametrize("good", [0, 1, 2, 4])
def test_an_update_with_a_product_that_was_not_finite_is_passed_over(good):
    """It is reported; the next update goes on from the one before it, with an audit."""
    base = torch.cat([torch.tensor([9.0, 6.0, 4.0]), torch.linspace(-1, 1, 97)]).double()
    tracker = EigenTracker(3)
    tracker.update(lambda v: base * v, n=100, dtype=torch.float64)
    swapped = base[[1, 0, *range(2, 100)]]
    tracker.update(lambda v: swapped * v, audit=True)
    identities = tracker.identities.tolist()
    vectors = tracker.result.vectors
    calls = itertools.count()
    with pytest.warns(ConvergenceWarning, match="non-finite product"):
        result = tracker.update(lambda v: swapped * v * (math.nan if next(calls) >= good else 1), audit=True)
    assert result is tracker.result
    assert result.values.isnan().sum() == max(3 - good, 0)
    assert tracker.identities.tolist() == identities
    other = EigenTracker(3)
    other.load_state_dict(tracker.state_dict())
    for survivor in (tracker, other):
        recovered = survivor.update(lambda v: swapped * v)
        assert recovered.values.tolist() == pytest.approx([9, 6, 4], rel=1e-6)
        assert recovered.num_hvp < 12  # not from scratch
        assert recovered.miss_probability < 0.08
        assert survivor.identities.tolist() == identities
        assert torch.allclose(recovered.vectors, vectors, atol=1e-3)  # with their signs


def test_a_first_update_without_a_finite_product():
    base = torch.linspace(0, 5, 60, dtype=torch.float64)
    tracker = EigenTracker(2)
    with pytest.warns(ConvergenceWarning):
        tracker.update(lambda v: v * math.nan, n=60, dtype=torch.float64)
    result = tracker.update(lambda v: base * v, n=60, dtype=torch.float64)
    assert result.values[0] == pytest.approx(5.0, rel=1e-4)
    assert result.miss_probability < 0.08
    assert tracker.identities.tolist() == [0, 1]


def test_a_budget_too_small_for_audits_spoils_only_those():
    base = torch.cat([torch.tensor([9.0, 6.0, 5.0]), torch.linspace(-1, 4.5, 997)]).double()
    start = EigenTracker(3, audit_every=5)
    start.update(lambda v: base * v, n=1000, dtype=torch.float64)
    vectors = start.result.vectors
    tracker = EigenTracker(3, audit_every=5, max_hvp=12)
    tracker._start = vectors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        status = [tracker.update(lambda v: base * v).status for _ in range(15)]
    assert status == ([*["converged, not audited"] * 4, "max_hvp"] * 3)


@pytest.mark.parametrize(("which", "lead"), [("LA", 9.0), ("SA", -9.0), ("LM", -9.0), ("LM", 9.0)])
def test_schedule(which, lead):
    """The eigenvalue that is wanted most sets the pace; the other end of the spectrum rests."""
    tracker = EigenTracker(2, which=which, max_interval=8, rest=0.01)
    assert tracker.due(0)
    intervals = []
    for scale in (1, 1, 1, 1, 1, 2, 2):
        base = torch.cat([torch.tensor([scale * lead, 4.0, -4.0]), torch.linspace(-1, 1, 60)]).double()
        tracker.update(lambda v, base=base: base * v, n=63, dtype=torch.float64)
        intervals.append(next(i for i in range(1, 99) if tracker.due(i)))
    assert intervals == [1, 2, 4, 8, 8, 1, 2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 0}, "k: expected an int >= 1, got 0"),
        ({"which": "BE"}, "which: expected .* got 'BE'"),
        ({"tol": 2.0}, "tol: expected .* got 2.0"),
        ({"audit_every": 0}, "audit_every: expected an int >= 1, got 0"),
        ({"max_basis": 4}, "max_basis: expected an int >= 5, got 4"),
        ({"max_hvp": 2}, "max_hvp: expected an int >= 3, got 2"),
        ({"max_interval": 0}, "max_interval: expected an int >= 1, got 0"),
        ({"rest": -1.0}, "rest: expected a number .* got -1.0"),
        ({"rest": "a"}, "rest: expected a number .* got 'a'"),
        ({"seed": 1.5}, "seed: expected an int, got float"),
        ({"tol": "x"}, "tol: expected a number .* got 'x'"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        EigenTracker(**options)


def test_another_size_is_refused():
    tracker = EigenTracker(1)
    tracker.update(lambda v: 2 * v, n=5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"H: expected .* last update's, 5, torch.float64 on cpu, got 6,"):
        tracker.update(lambda v: 2 * v, n=6, dtype=torch.float64)
