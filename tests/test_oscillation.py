"""Γ(step): against exact rational arithmetic, the paper's definition and its authors' clock."""

import copy
import math
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cross_entropy_cases import close
from hypothesis import given, settings
from hypothesis import strategies as st

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, reference


def exact_triangle(classes, amplitude, period, step, order=None, closed=False):
    """Eq. 2-3 of the paper in rational arithmetic, rounded once at the end."""
    turn = Fraction(period + 1 if closed else period)
    amplitude, period = Fraction(amplitude), Fraction(period)
    turns, t = step // turn, step % turn
    rise = 2 * (amplitude - 1) * t / period
    raised = 1 + rise if t < period / 2 else 2 * amplitude - 1 - rise
    active = int(turns) % classes
    g = [Fraction(1)] * classes
    g[order[active] if order is not None else active] = raised
    return [float(classes * value / sum(g)) for value in g]


@settings(max_examples=150, deadline=None)
@given(
    classes=st.integers(1, 12),
    amplitude=st.floats(1, 1e4),
    period=st.one_of(st.integers(1, 10_000), st.floats(0.5, 1e5)),
    step=st.integers(0, 2**40),
    closed=st.booleans(),
    data=st.data(),
)
def test_triangle_equals_rational_arithmetic(classes, amplitude, period, step, closed, data):
    order = data.draw(st.permutations(range(classes)))
    period = math.ceil(period) if closed else period
    oscillation = Oscillation(classes, amplitude, period, class_order=order, closed=closed)
    exact = exact_triangle(classes, amplitude, period, step, order, closed)
    # g is a difference of numbers up to 2A: its rounding, not that of the phase.
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(oscillation.weights(step), expected, rtol=1e-12, atol=1e-12 * amplitude)


@pytest.mark.parametrize("base", [2**24, 2**31, 2**32, 2**40, 2**53 - 20])
@pytest.mark.parametrize("period", [5000, 10, 12.5, 1e6 + 0.1])
def test_neighbouring_steps_stay_apart_far_beyond_float32(base, period):
    oscillation = Oscillation(3, 70, period)
    steps = torch.arange(base, base + 20)
    expected = torch.tensor([exact_triangle(3, 70, period, int(s)) for s in steps], dtype=torch.float64)
    close(oscillation.weights(steps), expected)
    assert len(set(oscillation.weights(steps).amax(1).tolist())) >= 5
    logits, target = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([1])
    for index, step in enumerate(steps.tolist()):
        for given_step in (step, torch.tensor(step)):
            loss = dynamic_cross_entropy(logits, target, oscillation, given_step)
            assert loss.item() == pytest.approx(expected[index, 1].item() * math.log(3), rel=1e-12)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("period", [1, 7, 5000, 12.5, 0.3, 1e-9, 1e6 + 0.1, 2**40 + 1, 2.0**53, 3 * 2.0**60, 1e30])
def test_phases_are_exact_in_the_whole_range_of_int64(period, closed):
    """Beyond 2**53 float64 cannot tell neighbouring steps apart; the period is the rational number that it is."""
    if closed and period != int(period):
        period = math.ceil(period)
    for start in (0, 17, 1 - 2**53):
        oscillation = Oscillation(3, 70, period, closed=closed, start_step=start, class_order=[2, 0, 1])
        near = [base + d for base in (2**53, 2**54, 2**60, 2**62, 5 * 10**18) for d in range(-3, 4)]
        steps = [*near, *range(2**63 - 5, 2**63), *range(-(2**63), 3 - 2**63)]
        weights = oscillation.weights(torch.tensor(steps))
        close(weights, torch.stack([reference.weights(oscillation, s) for s in steps]))
        for step, gamma in list(zip(steps, weights, strict=True))[::5]:
            logits, target = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([1])
            assert torch.equal(oscillation.weights(step), gamma)
            for given_step in (step, torch.tensor(step)):
                loss = dynamic_cross_entropy(logits, target, oscillation, given_step)
                assert loss.item() == pytest.approx(gamma[1].item() * math.log(3), rel=1e-12)
    stopped = Oscillation(3, 70, period, closed=closed, stop_step=2**53 - 1)
    assert torch.equal(stopped.weights(torch.tensor([2**53 - 1, 2**63 - 1])), torch.ones(2, 3, dtype=torch.float64))


def test_the_phase_of_the_last_steps_by_hand():
    # 2**63 - 1 = 7 · n and n mod 3 = 1: a turn begins there, and four steps before it is class 0's, t = 3.
    gamma = Oscillation(3, 64, 7).weights(torch.tensor([2**63 - 1, 2**63 - 5]))
    g = 1 + 2 * 63 * 3 / 7
    close(gamma, 3 * torch.tensor([[1, 1, 1], [g, 1, 1]], dtype=torch.float64) / torch.tensor([[3.0], [g + 2]]))


def test_turns_are_exact_too():
    oscillation = Oscillation(3, 70, torch.tensor([0.3, 7, 2.0**52]), start_step=1 - 2**53)
    elapsed = 2**54 - 2
    turns = [elapsed // Fraction(period) for period in oscillation.period.tolist()]
    assert oscillation.turn(2**53 - 1).tolist() == turns
    for step in (2**63 - 1, -(2**63)):
        turns = [(step - 1 + 2**53) // Fraction(period) for period in oscillation.period.tolist()]
        assert oscillation.turn(step).tolist() == [min(max(turn, -(2**63)), 2**63 - 1) for turn in turns]


def test_the_steps_of_a_criterion_go_on_beyond_those_of_float64():
    logits, target = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.arange(5) % 3
    criterion = DynamicCrossEntropyLoss(Oscillation(3, 70, 7))
    criterion.set_step(2**62 + 3)
    compiled = torch.compile(dynamic_cross_entropy, backend="eager", fullgraph=True)
    for step in range(2**62 + 3, 2**62 + 10):
        gamma = reference.weights(criterion.oscillation, step)
        expected = (gamma[target] * torch.nn.functional.cross_entropy(logits, target, reduction="none")).mean()
        (gradient,) = torch.autograd.grad(expected, logits)
        for loss in (criterion(logits, target), compiled(logits, target, criterion.oscillation, step)):
            close(loss, expected)
            close(torch.autograd.grad(loss, logits)[0], gradient)
        criterion.step()


def test_one_cycle_by_hand():
    weights = Oscillation(2, 3, 4).weights(torch.arange(9))
    raised = [2 * g / (g + 1) for g in (1, 2, 3, 2)]
    expected = [[g, 2 - g] for g in raised] + [[2 - g, g] for g in raised] + [[1, 1]]
    close(weights, torch.tensor(expected, dtype=torch.float64))


def test_closed_turn_has_both_ends_at_one_and_lasts_one_step_more():
    weights = Oscillation(3, 70, 4, closed=True).weights(torch.arange(15))
    assert torch.equal(weights[[0, 4, 5, 9, 10, 14]], torch.ones(6, 3, dtype=torch.float64))
    assert weights[[2, 7, 12]].argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("waveform", ["triangle", "sine"])
def test_no_step_of_a_closed_turn_lies_beyond_its_end(waveform):
    """Where the raw weight would be below 1, and with a high amplitude negative: -3 for A = 2, T = 0.5."""
    for period in (0.5, 7.25, torch.tensor([3.0, 2.5])):
        with pytest.raises(ValueError, match=r"period: expected a whole number of steps, as closed=True needs, got"):
            Oscillation(3, 2, period, waveform=waveform, closed=True)
    for amplitude in (2, 70, 1e10):
        for period in (1, 2, 3, 7, 49, 1e4):
            weights = Oscillation(3, amplitude, period, waveform=waveform, closed=True).weights(torch.arange(20_002))
            assert (weights[: int(period) + 1, 0] >= 1 - 1e-5).all()
            assert (weights >= 0).all()


@pytest.mark.parametrize("waveform", ["triangle", "sine", "square"])
def test_waveform_against_its_definition(waveform):
    classes, amplitude, period = 5, 20.0, 8.0
    weights = Oscillation(classes, amplitude, period, waveform=waveform).weights(torch.arange(80))
    for s in range(80):
        t = s % 8
        g = {
            "triangle": 1 + 19 * (1 - abs(t - 4) / 4),
            "sine": 1 + 19 * math.sin(math.pi * t / 8),
            "square": 20.0,
        }[waveform]
        expected = torch.ones(classes, dtype=torch.float64)
        expected[s // 8 % 5] = g
        close(weights[s], classes * expected / expected.sum())


@pytest.mark.parametrize("waveform", ["triangle", "sine", "square"])
@pytest.mark.parametrize("closed", [False, True])
def test_weights_sum_to_the_number_of_classes_and_equal_the_twin(waveform, closed):
    oscillation = Oscillation(
        7,
        33.3,
        11 if closed else 11.7,
        waveform=waveform,
        closed=closed,
        class_order=[6, 0, 5, 1, 4, 2, 3],
        start_step=-5,
        stop_step=190,
    )
    steps = torch.arange(-20, 210)
    weights = oscillation.weights(steps)
    close(weights.sum(1), torch.full((230,), 7.0, dtype=torch.float64))
    close(weights, torch.stack([reference.weights(oscillation, int(s)) for s in steps]))


def test_before_start_and_from_stop_on_the_weights_are_one():
    oscillation = Oscillation(3, 70, 10, start_step=100, stop_step=113)
    ones = torch.ones(3, dtype=torch.float64)
    for step in (-(2**53) + 1, -1, 0, 99, 113, 114, 2**53 - 1):
        assert torch.equal(oscillation.weights(step), ones)
    # The first turn begins at start_step.
    assert torch.equal(oscillation.weights(105), Oscillation(3, 70, 10).weights(5))
    assert torch.equal(oscillation.weights(112), Oscillation(3, 70, 10).weights(12))


def test_amplitude_one_is_the_plain_cross_entropy():
    assert torch.equal(Oscillation(4, 1, 10).weights(torch.arange(50)), torch.ones(50, 4, dtype=torch.float64))


def test_class_order_raises_the_classes_in_that_order():
    oscillation = Oscillation(4, 70, 10, class_order=(2, 0, 3, 1))
    assert oscillation.weights(torch.arange(5, 85, 10)).argmax(1).tolist() == [2, 0, 3, 1, 2, 0, 3, 1]
    for order in (range(4), [0, 1, 2, 3], np.arange(4), torch.arange(4)):
        assert Oscillation(4, 70, 10, class_order=order).weights(25).argmax() == 2


def test_table_repeats_as_it_is():
    gamma = torch.rand(5, 3)
    oscillation = Oscillation.from_table(gamma, start_step=2, stop_step=20)
    close(oscillation.weights(torch.arange(2, 20)), gamma.double()[torch.arange(18) % 5])
    assert torch.equal(oscillation.weights(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(oscillation.weights(20), torch.ones(3, dtype=torch.float64))
    gamma.zero_()
    assert oscillation.weights(2).sum() > 0, "a copy is kept"
    close(Oscillation.from_table(torch.eye(3)).weights(2**53 - 1), torch.eye(3).double()[(2**53 - 1) % 3])


def test_ensemble_has_one_oscillation_per_member():
    amplitudes, periods = [1.0, 5.0, 70.0], [3, 10, 12.5]
    for oscillation, singles in (
        (
            Oscillation(4, torch.tensor(amplitudes), torch.tensor(periods, dtype=torch.float64)),
            [Oscillation(4, a, t) for a, t in zip(amplitudes, periods, strict=True)],
        ),
        (Oscillation(4, 5, torch.tensor([3, 9])), [Oscillation(4, 5, 3), Oscillation(4, 5, 9)]),
        (Oscillation(4, torch.tensor([5.0]), 3), [Oscillation(4, 5, 3)]),
    ):
        assert oscillation.ensemble_size == len(singles)
        steps = torch.arange(40)
        close(oscillation.weights(steps), torch.stack([o.weights(steps) for o in singles], 1))
        close(oscillation.weights(17), torch.stack([o.weights(17) for o in singles]))
    tables = torch.rand(2, 5, 3, dtype=torch.float64)
    close(Oscillation.from_table(tables).weights(torch.arange(7)), tables.movedim(0, 1)[torch.arange(7) % 5])


def test_a_turn_raises_one_class():
    open_, closed = (Oscillation(3, 7, 10, closed=closed, start_step=4, stop_step=47) for closed in (False, True))
    assert [open_.turn(step).item() for step in (3, 4, 13, 14, 46, 47, 54)] == [-1, 0, 0, 1, 4, 4, 5]
    assert [closed.turn(step).item() for step in (3, 4, 14, 15)] == [-1, 0, 0, 1]
    for oscillation in (open_, closed):
        for step in range(4, 47):
            gamma = oscillation.weights(step)
            if gamma.unique().numel() > 1:
                assert gamma.argmax() == oscillation.turn(step) % 3
    several = Oscillation(3, 7, torch.tensor([10.0, 2.5]))
    assert several.turn(12).tolist() == [1, 4] and several.turn(0).dtype == torch.int64
    with pytest.raises(TypeError, match=r"^step: expected an int"):
        open_.turn(1.5)


def test_function_is_called_with_the_step():
    oscillation = Oscillation.from_function(lambda step: [step, 2.0, 3.0], 3)
    close(oscillation.weights(5), torch.tensor([5.0, 2, 3], dtype=torch.float64))
    assert oscillation.weights(torch.tensor([5, 6]))[1, 0] == 6
    assert oscillation.weights(torch.empty(0, dtype=torch.int64)).shape == (0, 3)


def test_shapes_and_dtype_of_weights():
    single, ensemble = Oscillation(3, 2, 5), Oscillation(3, torch.tensor([2.0, 3.0]), 5)
    empty = torch.empty(0, dtype=torch.int64)
    shapes = [tuple(o.weights(s).shape) for o in (single, ensemble) for s in (1, torch.arange(4), empty)]
    assert shapes == [(3,), (4, 3), (0, 3), (2, 3), (4, 2, 3), (0, 2, 3)]
    assert single.weights(1).dtype == torch.float64


def test_is_plain_immutable_data():
    oscillation = Oscillation(3, 70, 10, class_order=[1, 0, 2], stop_step=50)
    oscillation.amplitude.zero_()
    oscillation.period.zero_()
    assert oscillation.amplitude == 70
    assert oscillation.period == 10
    for twin in (copy.deepcopy(oscillation), pickle.loads(pickle.dumps(oscillation))):
        assert twin == oscillation
        assert hash(twin) == hash(oscillation)
        assert torch.equal(twin.weights(5), oscillation.weights(5))
    others = [
        Oscillation(3, 71, 10, class_order=[1, 0, 2], stop_step=50),
        Oscillation(3, 70, 10, stop_step=50),
        Oscillation(3, 70, 10, class_order=[1, 0, 2]),
        Oscillation(3, 70, 10, class_order=[1, 0, 2], stop_step=50, closed=True),
        Oscillation.from_table(torch.ones(2, 3)),
    ]
    assert all(oscillation != other for other in others)
    assert oscillation != 3
    assert "70" in repr(oscillation)


def test_extreme_parameters_stay_finite():
    for amplitude, period in ((1e100, 10), (1e100, 1e100), (2, 1e-9), (70, 2**53)):
        weights = Oscillation(3, amplitude, period, class_order=[2, 1, 0], start_step=1 - 2**53).weights(
            torch.tensor([0, 1, 7, 2**53 - 1])
        )
        close(weights.sum(1), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_and_dtype_do_not_matter(device):
    """As under torch.set_default_device("cuda"): the description stays on the CPU."""
    table = torch.rand(3, 4)

    def built():
        return (
            Oscillation(4, torch.tensor([5.0, 6.0], device="cpu"), 10.3, class_order=[1, 0, 3, 2]).weights(7),
            Oscillation(4, 5, 10, closed=True).weights(7),
            Oscillation.from_table(table).weights(7),
            Oscillation.from_function(lambda step: [1.0, 2.0, 3.0, 0.3], 4).weights(7),
        )

    expected = built()
    with torch.device(device):
        found = built()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        found += built()
    finally:
        torch.set_default_dtype(default)
    for weights, want in zip(found, expected * 2, strict=True):
        assert torch.equal(weights, want)


def test_tracing_leaves_no_fake_tensor_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    oscillation, meta = Oscillation(4, 5, 10), torch.device("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        oscillation.on(meta)
    assert type(oscillation.on(meta)[0]) is torch.Tensor


def test_built_in_inference_mode_trains_later():
    with torch.inference_mode():
        oscillations = Oscillation(3, 5, 10, class_order=[1, 0, 2]), Oscillation.from_table(torch.rand(3, 3))
    for oscillation in oscillations:
        x = torch.randn(4, 3, requires_grad=True)
        loss = dynamic_cross_entropy(x, torch.tensor([0, 1, 2, 0]), oscillation, 3)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.autograd.grad(g.square().sum(), x)[0].isfinite().all()


def test_authors_trajectory_runs_on_the_closed_clock():
    """The first 300 rows of the authors' run: row i is taken after update i, with the weights of step i + 1."""
    data = np.load(Path(__file__).parent / "data" / "spiral_reference_5000.npz")
    x, y = torch.from_numpy(data["X"]), torch.from_numpy(data["y"]).long()
    parameters = [torch.from_numpy(data[name]).requires_grad_() for name in ("w1", "b1", "w2", "b2")]
    oscillation = Oscillation(3, 70, 5000, closed=True, stop_step=65013)

    def loss(step):
        hidden = torch.relu(x @ parameters[0] + parameters[1])
        return dynamic_cross_entropy(hidden @ parameters[2] + parameters[3], y, oscillation, step)

    values = []
    current = loss(0)
    for step in range(300):
        gradients = torch.autograd.grad(current, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= gradient
        current = loss(step + 1)
        values.append(current.item())
    np.testing.assert_allclose(values, data["weighted_loss"][:300], rtol=1e-12)


def test_stop_steps_of_an_ensemble():
    oscillation = Oscillation(3, 70, torch.tensor([10.0, 20.0, 30.0]), stop_step=[5, None, 12])
    weights = oscillation.weights(torch.arange(40))
    for member, (period, stop) in enumerate([(10, 5), (20, None), (30, 12)]):
        assert torch.equal(weights[:, member], Oscillation(3, 70, period, stop_step=stop).weights(torch.arange(40)))
        assert torch.equal(reference.weights(oscillation, 11, member), weights[11, member])
    shared = Oscillation(3, 70, 10, stop_step=torch.tensor([5, 6]))
    assert shared.ensemble_size == 2 and shared != Oscillation(3, 70, 10, stop_step=[5, 7])
    assert shared == Oscillation(3, torch.tensor([70.0, 70.0]), 10, stop_step=[5, 6])
    assert hash(shared) == hash(pickle.loads(pickle.dumps(shared))) and "stop_step=[5" in repr(shared)
    assert shared.config()["stop_step"].tolist() == [5, 6]
    with pytest.raises(ValueError, match="stop_step: expected one step or 3, one per oscillation, got 2"):
        Oscillation(3, 70, torch.ones(3), stop_step=[5, 6])
    with pytest.raises(ValueError, match="stop_step: expected a step >= start_step = 6, got 5"):
        Oscillation(3, 70, 10, start_step=6, stop_step=[5, 6])
    with pytest.raises(ValueError, match="stop_step: expected a step or one per oscillation"):
        Oscillation(3, 70, 10, stop_step=[])
    with pytest.raises(TypeError, match="stop_step: expected an int"):
        Oscillation(3, 70, 10, stop_step=[5, "6"])


@pytest.mark.parametrize("options", [
    {}, {"stop_step": 7, "start_step": 2}, {"class_order": [2, 0, 1], "closed": True, "waveform": "sine"}
])  # fmt: skip
def test_one_for_all_members_and_one_of_many(options):
    steps, one = torch.arange(40), Oscillation(3, 70, 10, **options)
    many = one.expand(4)
    assert many == Oscillation(3, torch.full((4,), 70.0), 10, **options) and many.expand(4) is many
    assert torch.equal(many.weights(steps), one.weights(steps)[:, None].expand(-1, 4, -1))
    assert many.member(-1) == one and one.ensemble_size is None
    logits = torch.randn(4, 5, 3, dtype=torch.float64)
    losses = dynamic_cross_entropy(logits, torch.arange(5) % 3, many, 4)
    assert torch.equal(losses[2], dynamic_cross_entropy(logits[2], torch.arange(5) % 3, many.member(2), 4))


def test_members_of_tables_and_with_stops_of_their_own():
    table = torch.rand(4, 5, 3, dtype=torch.float64)
    assert Oscillation.from_table(table).member(2) == Oscillation.from_table(table[2])
    assert Oscillation.from_table(table[1], stop_step=9).expand(3) == Oscillation.from_table(
        table[1].expand(3, -1, -1), stop_step=9
    )
    stopped = Oscillation(3, 70, torch.tensor([10.0, 20.0]), stop_step=[5, None])
    assert stopped.member(0) == Oscillation(3, 70, 10, stop_step=5)
    assert stopped.member(1) == Oscillation(3, 70, 20)
    with pytest.raises(ValueError, match="size: expected 2, that of this ensemble, got 3"):
        stopped.expand(3)
    with pytest.raises(IndexError, match="member: expected one of 2, got 2"):
        stopped.member(2)
    with pytest.raises(ValueError, match="oscillation: expected an ensemble, got a single one"):
        stopped.member(0).member(0)
    with pytest.raises(ValueError, match="size: expected an int >= 1, got 0"):
        stopped.expand(0)
    with pytest.raises(ValueError, match="oscillation: expected one without a Python function"):
        Oscillation.from_function(lambda step: torch.ones(3), 3).expand(2)
