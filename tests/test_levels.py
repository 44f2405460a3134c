"""All eigenvalues above a level: their number follows the problem."""

import pytest
import torch
from curvature_problems import Known, Spiral, dense_hessian, loss_of, mlp

from dynloss_ext import ConvergenceWarning, EigenTracker, HessianOperator, eigsh

BULK = torch.linspace(-1, 1, 60, dtype=torch.float64)


def spectrum(*outliers):
    return torch.cat([torch.tensor(outliers, dtype=torch.float64), BULK])


def options(known, **others):
    return {"n": len(known.spectrum), "dtype": torch.float64, **others}


@pytest.mark.parametrize(
    "outliers", [[], [9.0], [9.0, 5.0, 2.5], [9.0, 7.0, 7.0, 7.0, 3.0], [2.0 + i for i in range(13)]]
)
@pytest.mark.parametrize("k", [1, 3, 30])
def test_all_above_the_level_and_the_next_one_are_found(outliers, k):
    known = Known(spectrum(*outliers))
    found = eigsh(known, k, above=1.5, tol=1e-9, **options(known))
    expected = known.spectrum.sort(descending=True).values[: len(outliers) + 1]
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-9)
    assert found.status == "converged" and found.converged.all()
    assert found.num_hvp == known.calls
    assert found.vectors.shape == (len(known.spectrum), len(expected))
    residuals = torch.linalg.norm(known.matrix @ found.vectors - found.vectors * found.values, dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e-11)


def test_more_than_max_k_are_said_to_be_there():
    known = Known(spectrum(9.0, 8.0, 7.0, 6.0))
    with pytest.warns(ConvergenceWarning, match="eigsh found all of its max_k eigenvalues above the level"):
        found = eigsh(known, above=1.5, max_k=4, **options(known))
    assert found.status == "max_k"
    assert len(found.values) == 4
    assert eigsh(known, above=1.5, max_k=5, **options(known)).status == "converged"


@pytest.mark.parametrize(("max_k", "more"), [(4, True), (5, False)])
def test_a_search_that_ends_early_with_all_above_says_that_there_may_be_more(max_k, more):
    known = Known(spectrum(9.0, 8.0, 7.0, 6.0))
    with pytest.warns(ConvergenceWarning, match="max_hvp") as warned:
        found = eigsh(known, k=max_k, above=1.5, max_k=max_k, max_hvp=16, tol=1e-12, **options(known))
    assert found.status == "max_hvp"
    (message,) = [str(warning.message) for warning in warned]
    assert message.endswith("; all of them lie above the level: there may be more") == more


def test_a_level_below_the_whole_spectrum_gives_all_of_it():
    known = Known([3.0, 2.0, 1.0, -4.0])
    found = eigsh(known, 2, above=-5.0, tol=1e-9, **options(known))
    assert found.status == "converged"
    torch.testing.assert_close(found.values, known.spectrum, rtol=1e-9, atol=0)


@pytest.mark.parametrize("left", [2, 6])
def test_the_products_of_all_searches_count_against_max_hvp(left):
    """Too few for another search, and too few to finish it."""
    known = Known(spectrum(*[5.0 + i / 10 for i in range(10)]))
    alone = eigsh(known, 1, tol=1e-9, **options(known)).num_hvp
    known.calls = 0
    with pytest.warns(ConvergenceWarning, match="max_hvp"):
        found = eigsh(known, 1, above=1.5, max_k=4, max_hvp=alone + left, tol=1e-9, **options(known))
    assert found.status == "max_hvp"
    assert found.num_hvp == known.calls == alone + (left if left > 2 else 0)


def test_a_tracker_follows_the_number_above_the_level():
    """Up to eight outliers that come and go, one by one and several at once."""
    counts = [0, 1, 2, 2, 5, 8, 8, 7, 4, 1, 0, 3]
    tracker = EigenTracker(2, above=1.5, max_k=12, tol=1e-6, audit_every=1)  # as each update is a jump
    for update, count in enumerate(counts):
        outliers = [10.0 - i + 0.05 * update for i in range(count)]
        known = Known(torch.cat([torch.tensor(outliers, dtype=torch.float64), torch.linspace(-1, 1, 72 - count)]))
        found = tracker.update(known, **options(known))
        torch.testing.assert_close(found.values, known.expected(count + 1), rtol=1e-9, atol=1e-6)
        assert len(tracker.identities) == count + 1
        assert len(set(tracker.identities.tolist())) == count + 1
    assert tracker.num_updates == len(counts)


def test_identities_stay_while_others_come_and_go():
    tracker = EigenTracker(1, above=1.5, tol=1e-8)

    def update(*values):
        known = Known(torch.cat([torch.tensor(values, dtype=torch.float64), BULK[:40]]))
        tracker.update(known, **options(known))
        return tracker.identities.tolist()[: len(tracker.result.values) - 1]

    first = update(9.0, 7.0, 1.0, 1.1)
    assert update(9.1, 7.1, 5.0, 1.1)[:2] == first
    longer = update(9.1, 7.1, 5.1, 6.0)
    assert [longer[0], longer[1], longer[3]][:2] == first
    assert len(set(longer)) == 4
    crossed = update(7.0, 9.2, 1.0, 6.0)
    assert crossed == [first[1], first[0], longer[2]]


def test_identities_stay_where_values_cross_in_an_update_that_looks_for_more():
    tracker = EigenTracker(3, above=1.5, tol=1e-8)
    for values in ((9.0, 7.0, 1.2, 1.1), (7.0, 9.2, 5.0, 6.0)):
        known = Known(torch.cat([torch.tensor(values, dtype=torch.float64), BULK[:40]]))
        tracker.update(known, **options(known))
    assert tracker.identities.tolist()[:2] == [1, 0]
    assert tracker.identities[3] == 2  # what was the next one
    assert tracker.identities[2] > 2  # which none of the old vectors shows


def test_one_that_falls_below_the_level_is_the_next_one():
    tracker = EigenTracker(3, above=1.5, tol=1e-8)
    for third in (5.0, 1.3):
        known = Known(spectrum(9.0, 7.0, third, 1.2))
        found = tracker.update(known, **options(known))
    torch.testing.assert_close(found.values, torch.tensor([9.0, 7.0, 1.3], dtype=torch.float64))
    assert tracker.identities.tolist() == [0, 1, 2]


def test_an_update_costs_what_one_with_its_number_costs():
    known = Known(spectrum(9.0, 7.0, 5.0))
    level, fixed, many = (
        EigenTracker(4, above=1.5, max_basis=24),
        EigenTracker(4, max_basis=24),
        EigenTracker(10, above=1.5),
    )
    for _ in range(3):
        costs = [tracker.update(known, **options(known)).num_hvp for tracker in (level, fixed, many)]
    assert costs[0] == costs[1]
    assert costs[2] < 10  # ten pairs would cost a product each
    assert torch.equal(level.result.values, fixed.result.values)


def test_a_saved_tracker_goes_on_with_the_number_it_had():
    whole, saved = EigenTracker(above=1.5, tol=1e-6), EigenTracker(above=1.5, tol=1e-6)
    for tracker in (whole, saved):
        for update in range(3):
            tracker.update(Known(spectrum(9.0 + update, 8.0, 7.0, 6.0)), n=64, dtype=torch.float64)
    resumed = EigenTracker(above=1.5, tol=1e-6)
    resumed.load_state_dict(saved.state_dict())
    last = Known(spectrum(9.0, 8.0, 7.5, 1.0))
    a, b = (tracker.update(last, n=64, dtype=torch.float64) for tracker in (whole, resumed))
    assert torch.equal(a.values, b.values) and a.num_hvp == b.num_hvp
    with pytest.raises(ValueError, match=r"state: expected one of a tracker with .*'above': 1.6"):
        EigenTracker(above=1.6, tol=1e-6).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="state: expected one of a tracker with"):
        EigenTracker(tol=1e-6).load_state_dict(saved.state_dict())


def test_a_product_that_is_not_finite_is_passed_over():
    known = Known(spectrum(9.0, 7.0))
    tracker = EigenTracker(above=1.5)
    tracker.update(known, **options(known))
    with pytest.warns(ConvergenceWarning, match="non-finite product"):
        tracker.update(lambda v: v * float("nan"), **options(known))
    assert tracker.update(known, **options(known)).status == "converged"
    assert tracker.identities.tolist() == [0, 1, 2]


def test_a_hessian_at_levels_all_over_its_spectrum():
    params = mlp()
    H, values = HessianOperator(loss_of(params), params), torch.linalg.eigvalsh(dense_hessian(params)).flip(0)
    for count in (1, 4, 11):
        level = float(values[count - 1] + values[count]) / 2
        found = eigsh(H, above=level, tol=1e-7)
        torch.testing.assert_close(found.values, values[: count + 1], rtol=1e-8, atol=1e-9)


def test_along_a_training_every_eigenvalue_above_the_level_is_there():
    spiral, tracker = Spiral(), EigenTracker(above=0.5, tol=1e-3)
    numbers = set()
    for _ in range(25):
        for _ in range(20):
            spiral.train()
        exact = torch.linalg.eigvalsh(spiral.hessian()).flip(0)
        found = tracker.update(HessianOperator(spiral.loss(), spiral.params))
        count = int((exact > 0.5).sum())
        assert int((found.values > 0.5).sum()) == count
        torch.testing.assert_close(found.values[:count], exact[:count], rtol=1e-3, atol=0)
        numbers.add(count)
    assert len(numbers) > 1


def test_levels_that_are_none_are_refused():
    known = Known(spectrum(9.0))
    for make in (lambda **given: eigsh(known, **given, **options(known)), EigenTracker):
        with pytest.raises(ValueError, match=r"which: expected 'LA' with above, got 'SA'"):
            make(above=1.0, which="SA")
        with pytest.raises(ValueError, match=r"above: expected a number in \(-inf, inf\), got nan"):
            make(above=float("nan"))
        with pytest.raises(TypeError, match=r"above: expected a number"):
            make(above="2/lr")
        with pytest.raises(ValueError, match=r"max_k: expected an int >= 1, got 0"):
            make(above=1.0, max_k=0)
        with pytest.raises(ValueError, match=r"max_basis: expected an int >= 32, got 24"):
            make(above=1.0, max_k=30, max_basis=24)
