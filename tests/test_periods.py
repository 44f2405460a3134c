"""Periods of a loss, against cases with known answers."""

import itertools
import math

import numpy as np
import pytest
import torch

from dynloss_ext import Oscillation
from dynloss_ext.instability import Instability, PeriodSegment, detect_instabilities, detect_periods


def logistic_map(growth, length=1000, transient=3000):
    x, values = 0.3, []
    for _ in range(transient + length):
        x = growth * x * (1 - x)
        values.append(x)
    return np.array(values[transient:])


# Textbook: doublings at 3, 3.4495, 3.5441, 3.5644 and 3.5688; chaos from 3.5699; a window of period 3 at 3.8284 that
# doubles at 3.8415 and 3.8476.
LOGISTIC_PERIODS = [
    (2.8, 1),
    (3.2, 2),
    (3.5, 4),
    (3.55, 8),
    (3.56, 8),
    (3.566, 16),
    (3.5685, 16),
    (3.7, None),
    (3.83, 3),
    (3.845, 6),
    (3.9, None),
    (3.95, None),
]


@pytest.mark.parametrize("length", [64, 1000])
@pytest.mark.parametrize(("growth", "period"), LOGISTIC_PERIODS)
def test_periods_of_the_logistic_map(growth, period, length):
    (segment,) = detect_periods(np.arange(length), logistic_map(growth, length))
    assert (segment.start, segment.stop, segment.period) == (0, length - 1, period)


@pytest.mark.parametrize("scale", [1e-2, 1e6])
@pytest.mark.parametrize(("growth", "period"), LOGISTIC_PERIODS)
def test_periods_do_not_depend_on_the_units_of_the_loss(growth, period, scale):
    loss = 3 * scale + scale * logistic_map(growth, 64)
    assert [s.period for s in detect_periods(np.arange(64), loss)] == [period]


@pytest.mark.parametrize(
    ("growth", "period", "loudest"),  # noise above the distance of the last branches hides them
    [(3.2, 2, 5e-2), (3.5, 4, 3e-2), (3.55, 8, 1e-2), (3.566, 16, 1e-3), (3.83, 3, 3e-2)],
)
def test_noise_invents_no_doubling_and_hides_none_above_it(growth, period, loudest):
    clean = logistic_map(growth, 64 * 50)
    for noise in (1e-4, 1e-3, 1e-2, 5e-2):
        loss = clean + noise * clean.std() * np.random.default_rng(0).normal(size=len(clean))
        found = {s.period for s in detect_periods(np.arange(len(loss)), loss)}
        if noise <= loudest:
            assert found == {period}, noise
        else:
            assert max(found) <= period, noise


STEP = np.arange(64)


@pytest.mark.parametrize(
    "loss",
    [
        1 - 0.02 * STEP + (0.02 + 5e-4 * STEP) * (-1.0) ** STEP,
        1e-4 * STEP**2 + (0.02 + 1e-5 * STEP**2) * (-1.0) ** STEP,
        0.05 * np.exp(-STEP / 20) * (-1.0) ** STEP,
        np.exp(-STEP / 30) + 0.05 * np.exp(-STEP / 20) * (-1.0) ** STEP,
        1e-3 * np.exp(STEP / 20) * (-1.0) ** STEP,
        0.05 * np.sin(2 * np.pi * STEP / 40) + 0.02 * (-1.0) ** STEP,
        5e-3 * np.sin(2 * np.pi * STEP / 14.3) + 0.02 * (-1.0) ** STEP,
    ],
    ids=["linear", "quadratic", "decaying", "decaying with its mean", "growing", "on a slow swing", "on a swing"],
)
def test_a_period_2_that_drifts_stays_2(loss):
    assert [s.period for s in detect_periods(STEP, loss)] == [2]


def triangle(period, length=960):
    return 2 * np.abs(np.arange(length) / period % 1 - 0.5)


KINKED = {
    "triangle": lambda t: 2 * np.abs(t % 1 - 0.5),
    "saw": lambda t: t % 1,
    "square": lambda t: (t % 1 < 0.5) * 1.0,
}


@pytest.mark.parametrize("period", [50, 64, 237])
@pytest.mark.parametrize("wave", KINKED)
@pytest.mark.parametrize(("growth", "cycle"), [(3.2, 2), (3.5, 4), (3.55, 8), (3.83, 3), (3.7, None), (3.95, None)])
def test_kinks_and_jumps_neither_hide_a_period_nor_make_chaos_of_it(growth, cycle, wave, period):
    step = np.arange(960)
    for size in (0.1, 1.0, 3.0):
        loss = logistic_map(growth, 960) + size * KINKED[wave](step / period) - 1e-4 * step
        noise = 1e-4 * np.random.default_rng(0).normal(size=960)
        assert [s.period for s in detect_periods(step, loss + noise)] == [cycle], size


FROZEN_PERIODS = [10, 11, 12.5, 15, 16, 20, 26, 33, 48, 50, 51, 77.5, 100, 500, 5000]


@pytest.mark.parametrize("waveform", ["triangle", "sine", "square"])
@pytest.mark.parametrize("period", FROZEN_PERIODS)
def test_a_frozen_network_has_no_dynamics(period, waveform):
    """Fixed class losses while Γ(t) moves: all that F does is the drive's."""
    step = torch.arange(1500)
    turns = (False, True) if period == int(period) else (False,)  # closed ones have whole periods
    for classes, amplitude, closed in itertools.product((3, 10), (1.5, 70), turns):
        class_losses = np.random.default_rng(classes).exponential(size=classes)
        drive = Oscillation(classes, amplitude, period, waveform=waveform, closed=closed)
        loss = drive.weights(step).numpy() @ class_losses / classes
        found = {s.period for s in detect_periods(step, loss)}
        assert found == {1} if period >= 50 else found <= {1, 16}, (classes, amplitude, closed)
        assert [s.period for s in detect_periods(step, loss, drive=drive)] == [1]


@pytest.mark.parametrize("waveform", ["triangle", "sine", "square"])
@pytest.mark.parametrize("period", [20, 50, 200])
def test_a_short_window_around_a_kink_is_no_chaos(period, waveform):
    """As `detect_instabilities` finds them where one turn of a fast drive ends."""
    step = torch.arange(1000)
    loss = Oscillation(3, 70, period, waveform=waveform).weights(step).numpy() @ [0.2, 1.0, 0.7]
    for width, offset in itertools.product((11, 14, 20), (0, 3, 7)):
        start = 2 * period - offset
        (found,) = detect_periods(step, loss, start=start, stop=start + width - 1)
        assert found == PeriodSegment(start, start + width - 1, 1)


def test_steps_beyond_a_gap_are_no_neighbours():
    step = np.concatenate([np.arange(100, 150), np.arange(160, 200), np.arange(210, 300)])
    loss = np.concatenate([np.zeros(50), 0.1 * (-1.0) ** np.arange(40), np.zeros(90)])
    assert detect_periods(step, loss, start=160, stop=199) == [PeriodSegment(160, 199, 2)]
    assert detect_periods(step, loss, start=180, stop=199) == [PeriodSegment(180, 199, 2)]


@pytest.mark.parametrize(("period", "classes", "repeat"), [(5, 3, 15), (2, 3, 6), (4, 4, 16), (1, 2, 2)])
@pytest.mark.parametrize("waveform", ["sine", "square"])
def test_a_fast_drive_has_its_own_period_unless_it_is_taken_out(period, classes, repeat, waveform):
    step = torch.arange(640)
    drive = Oscillation(classes, 70, period, waveform=waveform)
    frozen = drive.weights(step).numpy() @ np.random.default_rng(0).exponential(size=classes)
    if period > 1 or waveform == "square":  # at T = 1 a sine weighs every class alike
        assert [s.period for s in detect_periods(step, frozen)] == [repeat]
    assert [s.period for s in detect_periods(step, frozen, drive=drive)] == [1]


@pytest.mark.parametrize("period", [5, 20, 50, 500])
@pytest.mark.parametrize(("growth", "cycle"), [(3.2, 2), (3.5, 4), (3.83, 3), (3.7, None)])
def test_dynamics_upon_a_drive_of_any_speed(growth, cycle, period):
    """A = 70 has cusps between its turns that no straight pieces are."""
    drive = Oscillation(3, 70, period)
    for size in (0.1, 3.0):
        frozen = size * drive.weights(torch.arange(640)).numpy() @ [0.2, 1.0, 0.7]
        found = detect_periods(np.arange(640), frozen + logistic_map(growth, 640), drive=drive)
        assert [s.period for s in found] == [cycle], size


def test_a_triangle_wave_repeats_itself_or_is_smooth():
    for period in (10, 12, 15, 16):
        assert [s.period for s in detect_periods(np.arange(960), triangle(period))] == [period]
    for period in (17, 20, 30, 50, 64, 500, 5000):
        assert [s.period for s in detect_periods(np.arange(960), triangle(period))] == [1]


def test_a_period_above_the_largest_reads_as_its_divisor_that_fits_or_as_chaos():
    step = np.arange(256)
    pattern = np.random.default_rng(0).normal(size=32)
    assert [s.period for s in detect_periods(step, pattern[step % 32])] == [None]
    halves_alike = pattern[step % 16] + 0.01 * pattern[step % 32]
    assert [s.period for s in detect_periods(step, halves_alike)] == [16]
    assert [s.period for s in detect_periods(step, halves_alike, max_period=32, segment=96)] == [32]


@pytest.mark.parametrize("length", [11, 12, 16, 24, 32, 48])
def test_chaos_in_a_short_window_is_rarely_called_periodic(length):
    chaos = logistic_map(3.9, 300 * length).reshape(300, length)
    found = [detect_periods(np.arange(length), loss) for loss in chaos]
    assert sum(segment.period is not None for (segment,) in found) <= 9  # 3 %; near an unstable cycle it repeats


@pytest.mark.parametrize(("max_period", "segment"), [(1, 11), (2, 11), (3, 13), (7, 21), (16, 48)])
def test_the_shortest_segment_still_reads_the_largest_period(max_period, segment):
    loss = np.random.default_rng(0).normal(size=max_period)[np.arange(segment) % max_period]
    options = {"max_period": max_period, "min_amplitude": 0}
    assert [s.period for s in detect_periods(np.arange(segment), loss, segment=segment, **options)] == [max_period]
    with pytest.raises(ValueError, match=rf"segment: expected an int >= {segment} for .*, got {segment - 1}"):
        detect_periods(np.arange(segment), loss, segment=segment - 1, **options)


def test_short_windows_try_periods_up_to_a_third_of_their_length():
    step = np.arange(24)
    pattern = np.random.default_rng(0).normal(size=9)
    assert [s.period for s in detect_periods(step[:11], (-1.0) ** step[:11])] == [2]
    assert [s.period for s in detect_periods(step, pattern[step % 8])] == [8]
    assert [s.period for s in detect_periods(step, pattern[step % 9])] == [None]


def test_a_cascade_is_measured_in_order_and_tiles_the_window():
    growths = (2.8, 3.2, 3.5, 3.56, 3.7, 3.2)
    loss = np.concatenate([logistic_map(growth, 640) for growth in growths])
    segments = detect_periods(np.arange(100, 100 + len(loss)), loss)
    assert [s.period for s in segments] == [1, 2, 4, 8, None, 2]
    assert [s.start for s in segments] == [100 + 640 * i for i in range(6)]
    assert all(a.stop + 1 == b.start for a, b in itertools.pairwise(segments))


@pytest.mark.parametrize("period", [2, 3, 4, 5, 7, 8, 12, 16])
def test_period_is_found_on_a_trend_with_growing_amplitude(period):
    pattern = np.random.default_rng(period).normal(size=period)
    step = np.arange(256)
    loss = 5 - 0.02 * step + 0.01 * (1 + step / 256) * pattern[step % period]
    assert [s.period for s in detect_periods(step, loss)] == [period]


def test_smooth_motion_and_tiny_oscillations_have_period_one():
    step = np.arange(400)
    smooth = np.exp(-step / 50) + 0.2 * np.sin(step / 10)
    assert [s.period for s in detect_periods(step, smooth)] == [1]
    assert [s.period for s in detect_periods(step, smooth + 5e-5 * (-1.0) ** step)] == [1]
    slow = np.sin(2 * np.pi * step / 20)  # moves, but not from step to step
    assert [s.period for s in detect_periods(step, slow)] == [1]
    assert [s.period for s in detect_periods(step, smooth + 2e-2 * (-1.0) ** step)] == [2]


def test_noise_and_divergence_are_chaotic():
    noise = np.random.default_rng(0).normal(size=256)
    assert [s.period for s in detect_periods(np.arange(256), noise)] == [None]
    noise[100] = np.inf
    assert [s.period for s in detect_periods(np.arange(256), noise)] == [None]


@pytest.mark.parametrize("loss", [np.zeros(100), np.full(100, 0.1), 7 + 0.1 * np.arange(100)])
def test_rounding_is_no_oscillation(loss):
    assert [s.period for s in detect_periods(np.arange(100), loss, min_amplitude=0)] == [1]


def test_tiny_oscillations_count_where_min_amplitude_allows():
    loss = 1e-7 * (-1.0) ** np.arange(100)
    assert [s.period for s in detect_periods(np.arange(100), loss, min_amplitude=0)] == [2]


@pytest.mark.parametrize("length", [0, 5, 10])
def test_a_window_too_short_to_tell_has_no_segment(length):
    assert detect_periods(np.arange(length), logistic_map(3.9, length)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_every_real_type_are_accepted(dtype):
    loss = torch.tensor([0.5, 1.5], dtype=dtype).repeat(50).requires_grad_()
    assert [s.period for s in detect_periods(torch.arange(100), loss)] == [2]
    (window,) = detect_instabilities(torch.arange(100), loss, torch.tensor([0]), torch.tensor([2.0], dtype=dtype))
    assert window == Instability(0, 99, 2.0, 2.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"min_amplitude": math.nan}, ValueError, r"min_amplitude: expected a number in \[0, inf\), got nan"),
        ({"min_amplitude": -1e-3}, ValueError, "min_amplitude: expected .* got -0.001"),
        ({"min_amplitude": "3"}, TypeError, "min_amplitude: expected a number .* got '3'"),
        ({"tolerance": math.nan}, ValueError, r"tolerance: expected a number in \(0, inf\), got nan"),
        ({"tolerance": None}, TypeError, "tolerance: expected .* got None"),
        ({"max_period": 2.5}, TypeError, "max_period: expected an int, got float"),
        ({"segment": "64"}, TypeError, "segment: expected an int, got str"),
        ({"start": "3"}, TypeError, "start: expected a number .* got '3'"),
        ({"stop": "3"}, TypeError, "stop: expected a number .* got '3'"),
        ({"drive": 5000}, TypeError, "drive: expected an Oscillation or None, got int"),
        ({"drive": Oscillation(3, torch.ones(2), 5)}, ValueError, "drive: expected a single .*, got an ensemble of 2"),
    ],
)
def test_bad_bounds_of_detect_periods_are_named(change, error, message):
    with pytest.raises(error, match=message):
        detect_periods(np.arange(100), np.zeros(100), **change)


def test_bad_arguments_of_detect_periods_are_named():
    with pytest.raises(ValueError, match="segment: expected an int >= 48 for max_period=16, got 32"):
        detect_periods(np.arange(100), np.zeros(100), segment=32)
    with pytest.raises(ValueError, match=r"step: expected every step .* got some where one is missing"):
        detect_periods(np.arange(0, 200, 2), np.zeros(100))
    with pytest.raises(TypeError, match="loss: expected real numbers, got dtype <U1"):
        detect_periods(np.arange(3), ["a", "b", "c"])


@pytest.mark.parametrize("size", [1.0, 1e4, 1e5, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_smooth_losses_are_smooth_in_any_dtype_and_of_any_size(dtype, size):
    """A summed loss in float32 moves in jagged steps of its rounding."""
    loss = (size * (1 - 1e-6 * torch.arange(256, dtype=torch.float64))).to(dtype)
    assert [part.period for part in detect_periods(np.arange(256), loss)] == [1]
    if dtype != torch.bfloat16:
        assert [part.period for part in detect_periods(np.arange(256), loss.numpy())] == [1]


@pytest.mark.parametrize("size", [1e-300, 1e-3, 1e300])
def test_periods_of_losses_of_any_size(size):
    loss = size * np.tile([1.0, 2.0, 1.3, 2.4], 64)
    assert [part.period for part in detect_periods(np.arange(256), loss, min_amplitude=0)] == [4]
