"""Instabilities, crossings and the optimizer's stability limit, against cases with known answers."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import dynloss_ext
from dynloss_ext import instability
from dynloss_ext.instability import (
    Crossing,
    Instability,
    PeriodChange,
    PeriodSegment,
    branch_means,
    crossings,
    detect_instabilities,
    detect_periods,
    instability_threshold,
    period_changes,
)

ROOT = Path(__file__).parent.parent
FULL_REFERENCE = ROOT.parent / "shared" / "data" / "spiral_reference.npz"
CUT = ROOT / "tests" / "data" / "spiral_reference_5000.npz"


def jumpy_loss(length, windows, jump=0.01):
    """A flat loss that alternates by `jump` between `start` and `stop`: stop - start jumps."""
    loss = np.zeros(length)
    for start, stop in windows:
        step = np.arange(start, stop + 1)
        loss[start : stop + 1] += jump * ((step - start) % 2)
        loss[stop + 1 :] = loss[stop]
    return loss


# ---- windows ---------------------------------------------------------------------------------------------


def test_windows_start_before_the_first_jump_and_stop_after_the_last():
    steps = np.arange(5000)
    lambda_step = np.arange(0, 5000, 25)
    lambda_max = lambda_step / 1000
    found = detect_instabilities(steps, jumpy_loss(5000, [(1000, 1100), (3000, 3041)]), lambda_step, lambda_max)
    assert [(w.start, w.stop) for w in found] == [(1000, 1100), (3000, 3041)]
    assert [(w.lambda_start, w.lambda_stop) for w in found] == [(1.0, 1.1), (3.0, 3.05)]
    assert instability_threshold(found) == pytest.approx((1.0 + 1.1 + 3.0 + 3.05) / 4)


@pytest.mark.parametrize(("max_gap", "count"), [(199, 2), (200, 1)])
def test_gaps_up_to_max_gap_are_merged(max_gap, count):
    loss = jumpy_loss(2000, [(500, 600), (799, 900)])
    assert len(detect_instabilities(np.arange(2000), loss, [], [], max_gap=max_gap)) == count


def test_windows_with_few_jumps_are_dropped():
    loss = jumpy_loss(2000, [(500, 509)])  # nine jumps
    assert detect_instabilities(np.arange(2000), loss, [], []) == []
    assert len(detect_instabilities(np.arange(2000), loss, [], [], min_samples=9)) == 1


def test_a_calm_run_has_no_instability_and_no_threshold():
    found = detect_instabilities(np.arange(100), np.linspace(1, 0.99, 100), [0, 50], [1.0, 1.1])
    assert found == []
    assert math.isnan(instability_threshold(found))


def test_a_diverged_run_is_unstable_to_its_end():
    loss = jumpy_loss(1000, [(500, 600)])
    loss[600:] = np.nan
    (window,) = detect_instabilities(np.arange(1000), loss, [0, 500], [1.0, np.inf])
    assert (window.start, window.stop) == (500, 999)
    assert math.isnan(instability_threshold([window]))  # λ is infinite at both ends: no finite threshold


def test_recorded_steps_may_be_sparse():
    loss = jumpy_loss(200, [(50, 70)])
    (window,) = detect_instabilities(1000 + 10 * np.arange(200), loss, [], [])
    assert (window.start, window.stop) == (1500, 1700)
    assert math.isnan(window.lambda_start)


def test_lambda_rule_marks_jumps_between_neighbouring_eigenvalues():
    lambda_step = np.arange(0, 4000, 25)
    lambda_max = np.ones(len(lambda_step))
    lambda_max[40:44] = [1.2, 1.6, 2.1, 1.5]  # from step 1000 on
    lambda_max[44:] = 1.45
    (window,) = detect_instabilities(np.arange(4000), np.zeros(4000), lambda_step, lambda_max, rule="lambda")
    assert window == Instability(975, 1075, 1.0, 1.5)
    assert detect_instabilities([], [], lambda_step, lambda_max, rule="lambda", lambda_jump=0.7) == []


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_default_jump_is_relative_to_the_spread_of_the_loss(scale):
    loss = scale * (7 + jumpy_loss(5000, [(1000, 1100), (3000, 3041)], jump=0.3))
    assert [(w.start, w.stop) for w in detect_instabilities(np.arange(5000), loss, [], [])] == [
        (1000, 1100),
        (3000, 3041),
    ]
    calm = np.full(5000, 7 * scale) * (1 + 1e-16 * (-1.0) ** np.arange(5000))
    assert detect_instabilities(np.arange(5000), calm, [], []) == []


@pytest.mark.parametrize(("period", "windows"), [(5000, 1), (1000, 2), (50, 2), (None, 1)])
def test_the_default_gap_is_relative_to_the_oscillation(period, windows):
    loss = jumpy_loss(2000, [(500, 600), (950, 1050)])
    assert len(detect_instabilities(np.arange(2000), loss, [], [], period=period)) == windows


@pytest.mark.parametrize("period", [12, 50, 500, 5000])
def test_a_smooth_swing_of_the_drive_is_no_jump(period):
    step = np.arange(3 * period)
    loss = 2 * np.abs(step / period % 1 - 0.5)  # moves by 2/T a step
    assert detect_instabilities(step, loss, [], [], period=period) == []


def test_limit_rule_marks_the_records_above_the_stability_limit():
    lambda_step = np.arange(0, 4000, 25)
    lambda_max = np.ones(len(lambda_step))
    lambda_max[40:50] = [2.1, 1.5] * 5
    lambda_max[100:103] = [2.5, 2.2, np.nan]
    found = detect_instabilities([], [], lambda_step, lambda_max, rule="limit", limit=2.0)
    assert [(w.start, w.stop) for w in found] == [(1000, 1200), (2500, 2550)]
    assert [(w.lambda_start, w.lambda_stop) for w in found] == [(2.1, 2.1), (2.5, pytest.approx(np.nan, nan_ok=True))]
    with pytest.raises(TypeError, match=r"limit: expected a number .* got None"):
        detect_instabilities([], [], lambda_step, lambda_max, rule="limit")


def test_one_window_over_the_whole_run_is_warned_of():
    loss = np.linspace(10, 0, 1000)
    with pytest.warns(UserWarning, match=r"rule='loss': expected calm stretches .* bound 0.001 or max_gap=500"):
        detect_instabilities(np.arange(1000), loss, [], [], loss_jump=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detect_instabilities(np.arange(1000), loss, [], [])
        detect_instabilities(np.arange(1000), jumpy_loss(1000, [(0, 850)]), [], [])


def test_tensors_are_accepted():
    loss = torch.from_numpy(jumpy_loss(2000, [(500, 600)]))
    (window,) = detect_instabilities(torch.arange(2000), loss, torch.tensor([0]), torch.tensor([2.0]))
    assert window == Instability(500, 600, 2.0, 2.0)


@pytest.mark.skipif(not FULL_REFERENCE.exists(), reason="../shared/data/spiral_reference.npz is not here")
@pytest.mark.parametrize("max_gap", [100, 500, 1000])
def test_reference_trajectory_has_ten_windows_at_two(max_gap):
    with np.load(FULL_REFERENCE) as data:
        loss, lambda_step, lambda_max = data["weighted_loss"], data["eig_step"], data["eig_top5"][:, 0]
    found = detect_instabilities(np.arange(len(loss)), loss, lambda_step, lambda_max, max_gap=max_gap)
    assert len(found) == 10
    assert instability_threshold(found) == pytest.approx(2.02, abs=5e-3)
    assert found[1].start == 4223
    assert found[-1].stop < 46_000
    if max_gap == 500:
        assert found == detect_instabilities(np.arange(len(loss)), loss, lambda_step, lambda_max, period=5000)
        steps = np.arange(len(loss))
        cascades = [[s.period for s in detect_periods(steps, loss, start=w.start, stop=w.stop)] for w in found]
        assert cascades[:4] == [[1], [2, 1], [2, 1], [2, 4, 8, None, 2]]


def test_first_instability_of_the_shipped_cut():
    with np.load(CUT) as data:
        loss, lambda_step, lambda_max = data["weighted_loss"], data["eig_step"], data["eig_top5"][:, 0]
    descent, instability = detect_instabilities(np.arange(len(loss)), loss, lambda_step, lambda_max)
    assert (descent.start, descent.stop) == (0, 288)
    assert (instability.start, instability.stop) == (4223, 4999)
    assert instability.lambda_start == lambda_max[lambda_step == 4225]
    steps = np.arange(len(loss))
    assert [s.period for s in detect_periods(steps, loss, start=descent.start, stop=descent.stop)] == [1]
    assert [s.period for s in detect_periods(steps, loss, start=4223)] == [2]


# ---- crossings of a threshold ----------------------------------------------------------------------------


def alternating(step):
    return np.where(step % 2, 0.7, -0.7)


@pytest.mark.parametrize("stride", [1, 25])
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_crossings_are_those_of_the_mean_over_both_branches(stride, noise):
    """λ is 2 + sin, on branches 0.7 above and below it, so that each record is on the other side of the last."""
    step = np.arange(0, 2000 * stride, stride)
    turns = np.arange(2000)
    means = 2 + np.sin(2 * np.pi * (turns - 300.2) / 1000)
    values = means + alternating(turns) + noise * np.random.default_rng(0).uniform(-1, 1, 2000)
    found = crossings(step, values, 2.0)
    assert [(round(c.step / stride / 10), c.upward) for c in found] == [
        (30, True),
        (80, False),
        (130, True),
        (180, False),
    ]
    if noise == 0:
        assert [c.step / stride for c in found] == [300, 800, 1300, 1800]
    assert len(crossings(step, values, 2.0, branches=1)) > 100  # what the mean is for


@pytest.mark.parametrize(("branches", "at"), [(1, 6), (2, 5), (3, 6), (4, 5), (5, 6)])
def test_a_crossing_lies_in_the_middle_of_the_means_beside_it(branches, at):
    """A ramp that passes zero between records 5 and 6, where means of an even number do, as they are off by a half."""
    ramp = np.arange(12.0) - (5.5 if branches % 2 else 5.0) + 1e-9 * (branches % 2 - 1)
    assert crossings(range(12), ramp - 1e-9, 0.0, branches=branches, margin=0) == [Crossing(at, 0, True)]


def test_each_column_has_its_own_crossings_in_order_of_time():
    step = np.arange(400)
    values = np.stack([step / 100, 4 - step / 100, np.full(400, 2.5)], 1)
    assert crossings(step, values, 2.5) == [Crossing(150, 1, False), Crossing(250, 0, True)]
    assert crossings(step, values[:, 0], 2.5) == [Crossing(250, 0, True)]
    assert crossings(step, torch.from_numpy(values), 2.5) == crossings(step, values, 2.5)
    assert crossings(step, values, 9.0) == []


def test_the_margin_decides_what_counts_as_a_crossing():
    values = 2 + 0.015 * np.sin(np.arange(1000) / 20)
    assert crossings(range(1000), values, 2.0) == []  # within a hundredth of 2
    assert len(crossings(range(1000), values, 2.0, margin=0.01)) == 15
    there_and_back = np.concatenate([np.linspace(1, 2.01, 50), np.linspace(2.01, 1, 50)])
    assert crossings(range(100), there_and_back, 2.0) == []


def test_a_crossing_within_noise_is_one_and_dated_to_its_last_passage():
    values = np.concatenate([np.full(10, 1.5), [2.01, 1.99] * 5, np.full(10, 2.5)])
    assert crossings(range(30), values, 2.0, branches=1) == [Crossing(20, 0, True)]


@pytest.mark.parametrize("missing", [np.nan, np.inf])
def test_nothing_crosses_where_records_are_not_finite(missing):
    values = np.r_[np.full(10, 1.0), missing, np.full(10, 3.0), np.full(10, 1.0)]
    assert crossings(range(31), values, 2.0) == [Crossing(20, 0, False)]


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_branch_means_are_means_of_neighbours(branches):
    values = np.random.default_rng(1).normal(size=(20, 3))
    step, means = branch_means(np.arange(20) * 5, values, branches=branches)
    expected = [values[i : i + branches].mean(0) for i in range(21 - branches)]
    np.testing.assert_allclose(means, expected, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(step, 5 * (branches // 2 + np.arange(21 - branches)))


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (1, 3), (5, 0)])
def test_too_few_records_have_no_mean(shape):
    assert crossings(range(shape[0]), np.zeros(shape), 2.0) == []
    assert branch_means(range(shape[0]), np.zeros(shape))[1].shape == (max(0, shape[0] - 1), *shape[1:])


def descent(curvatures):
    """Gradient descent, learning rate 1, on Σ aᵢ(t) xᵢ²/2 + xᵢ³/10 - xᵢ⁴/4: F and the eigenvalues of its Hessian.

    x = 0 doubles its period where an aᵢ rises through 2, to a cycle of xᵢ ≈ ± √(aᵢ - 2), whose mean curvature is lower.
    """
    noise = np.random.default_rng(0).normal(scale=1e-4, size=curvatures.shape)
    x, losses, eigenvalues = np.zeros(curvatures.shape[1]), [], []
    for a, kick in zip(curvatures, noise, strict=True):
        losses.append(np.sum(a * x**2 / 2 + x**3 / 10 - x**4 / 4))
        eigenvalues.append(np.sort(a + 0.6 * x - 3 * x**2)[::-1])
        x = x - (a * x + 0.3 * x**2 - x**3) + kick
    return np.array(losses), np.array(eigenvalues)


def test_gradient_descent_doubles_its_period_where_a_curvature_crosses_two_over_the_learning_rate():
    step = np.arange(2000)
    first = np.interp(step, [0, 700, 1000, 2000], [1.3, 2.0, 2.15, 2.15])
    second = np.interp(step, [0, 1500, 2000], [0.5, 2.0, 2.5])
    losses, eigenvalues = descent(np.stack([first, second], 1))
    rising = [c for c in crossings(step, eigenvalues, 2.0) if c.upward]
    assert [c.step for c in rising] == pytest.approx([700, 1500], abs=3)
    assert rising[0].index == 0
    changes = period_changes(detect_periods(step, losses))
    assert [(c.before, c.after) for c in changes] == [(1, 2)]  # two cycles of period 2 beside each other have period 2
    assert 0 <= changes[0].step - rising[0].step <= 192  # what grows out of noise takes its time


def test_the_logistic_map_doubles_first_where_its_curvature_crosses_two_and_then_within_a_cycle_whose_mean_is_two():
    """1 - f' is the curvature. It is r - 1 at the fixed point; on the cycle of period 2 its mean is 2 for every r."""
    step = np.arange(3200)
    growth = 2.9 + 2e-4 * step
    noise = np.random.default_rng(0).normal(scale=1e-5, size=len(step))
    x = [1 - 1 / 2.9]
    for r, kick in zip(growth[:-1], noise, strict=False):
        x.append(r * x[-1] * (1 - x[-1]) + kick)
    x = np.array(x)
    curvature = 1 - growth * (1 - 2 * x)
    found = crossings(step, curvature, 2.0, branches=8)
    changes = period_changes(detect_periods(step, x))
    doubled = {(c.before, c.after): growth[c.step] for c in changes}
    assert found[0].upward
    assert growth[found[0].step] == pytest.approx(3.0, abs=2e-3)
    assert doubled[1, 2] == pytest.approx(3.0, abs=0.08)
    assert doubled[2, 4] == pytest.approx(1 + math.sqrt(6), abs=0.03)
    second = next(c.step for c in changes if c.after == 4)
    assert all(abs(c.step - second) > 500 for c in found)


def test_changes_of_period_are_those_between_neighbours():
    segments = [PeriodSegment(10 * i, 10 * i + 9, period) for i, period in enumerate((1, 2, 2, None, 4))]
    assert period_changes(segments) == [PeriodChange(10, 1, 2), PeriodChange(30, 2, None), PeriodChange(40, None, 4)]
    assert period_changes(iter(segments[:1])) == period_changes([]) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": np.zeros(9)}, ValueError, "values: expected 10 values, as many as in step, got 9"),
        ({"values": np.zeros((10, 2, 2))}, ValueError, r"values: expected shape \(S,\) or \(S, k\), got \(10, 2, 2\)"),
        ({"values": ["a"] * 10}, TypeError, "values: expected real numbers"),
        ({"step": np.zeros(10)}, ValueError, "step: expected finite, strictly increasing"),
        ({"threshold": math.inf}, ValueError, "threshold: expected a number .* got inf"),
        ({"threshold": "2"}, TypeError, "threshold: expected a number .* got '2'"),
        ({"branches": 0}, ValueError, "branches: expected an int >= 1, got 0"),
        ({"branches": 2.0}, TypeError, "branches: expected an int, got float"),
        ({"margin": -1.0}, ValueError, r"margin: expected a number in \[0, inf\), got -1.0"),
    ],
)
def test_bad_arguments_of_crossings_are_named(change, error, message):
    arguments = {"step": np.arange(10), "values": np.zeros(10), "threshold": 2.0}
    with pytest.raises(error, match=message):
        crossings(**{**arguments, **change})


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "paper"}, "rule: expected 'loss', 'lambda' or 'limit', got 'paper'"),
        ({"loss": np.zeros(9)}, "loss: expected 10 values, as many as in step, got 9"),
        ({"loss": np.zeros((10, 1))}, r"loss: expected 1 dimension, got shape \(10, 1\)"),
        ({"lambda_max": np.zeros((2, 3))}, r"lambda_max: expected 1 dimension, got shape \(2, 3\)"),
        ({"step": np.zeros(10)}, "step: expected finite, strictly increasing"),
        ({"step": np.where(np.arange(10) == 3, np.nan, np.arange(10))}, "step: expected finite"),
        ({"step": np.arange(10, dtype=np.uint64)[::-1]}, "step: expected finite, strictly increasing"),
        ({"lambda_step": [0, math.nan]}, "lambda_step: expected finite"),
        ({"lambda_step": [math.nan], "lambda_max": [1.0]}, "lambda_step: expected finite"),
        ({"loss_jump": 0.0}, r"loss_jump: expected a number in \(0, inf\), got 0.0"),
        ({"max_gap": -1}, "max_gap: expected an int >= 1, got -1"),
        ({"min_samples": 0}, "min_samples: expected an int >= 1, got 0"),
        ({"period": 0}, r"period: expected a number in \(0, inf\), got 0"),
        ({"rule": "limit", "limit": math.nan}, r"limit: expected a number in \[0, inf\), got nan"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"step": np.arange(10), "loss": np.zeros(10), "lambda_step": [0, 5], "lambda_max": [1.0, 1.0]}
    with pytest.raises(ValueError, match=message):
        detect_instabilities(**{**arguments, **change})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss_jump", "a number .*'3'"),
        ("lambda_jump", "a number .*'3'"),
        ("max_gap", "an int, got str"),
        ("min_samples", "an int, got str"),
        ("period", "a number .*'3'"),
    ],
)
def test_bounds_that_are_no_numbers_are_named(name, message):
    with pytest.raises(TypeError, match=f"{name}: expected {message}"):
        detect_instabilities(np.arange(10), np.zeros(10), [], [], **{name: "3"})


def test_public_names_are_exported():
    assert set(instability.__all__) <= set(dynloss_ext.__all__)
    assert all(getattr(dynloss_ext, name) is getattr(instability, name) for name in instability.__all__)
