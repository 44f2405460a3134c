"""What the example scripts conclude from a run's metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.report import analyse, cascade, trajectory
from dynloss_ext import Crossing, PeriodSegment, branch_means


def metrics(first_of_third_window):
    """Three windows in which F jumps every step and λ, recorded every 25 steps, is on either branch."""
    step = np.arange(6000)
    inside = (step % 2000 >= 800) & (step % 2000 < 1200)
    loss = 1.0 + inside * np.where(step % 2, 0.05, -0.05)
    eig_step = step[::25]
    branches = np.where(eig_step // 25 % 2, 2.4, 1.6)
    branches[eig_step == 4800] = first_of_third_window
    return {"step": step, "weighted_loss": loss, "eig_step": eig_step, "eigenvalues": branches[:, None]}


def test_branch_threshold_averages_the_branches_and_survives_a_leap():
    for first in (1.6, 9.6):
        analysis = analyse(metrics(first))
        assert len(analysis.oscillating) == 3
        assert analysis.branch_threshold == pytest.approx(2.0, abs=1e-12)


def test_branch_threshold_of_a_run_that_diverged():
    """Its last window has no end, and no eigenvalue there."""
    recorded = metrics(1.6)
    recorded["weighted_loss"][5000:] = np.nan
    recorded["eigenvalues"][recorded["eig_step"] >= 5000] = np.nan
    analysis = analyse(recorded)
    assert analysis.branch_threshold == pytest.approx(2.0, abs=1e-12)
    recorded["eigenvalues"][:] = np.nan
    assert np.isnan(analyse(recorded).branch_threshold)


def test_cascade_in_words():
    periods = (1, 2, 4, None, 2)
    segments = [PeriodSegment(64 * i, 64 * i + 63, period) for i, period in enumerate(periods)]
    assert cascade(segments) == "smooth → 2 → 4 → chaos → 2"
    assert cascade([]) == "too short"


def cascading(stride):
    """F has period 2 from step 1000, 4 from 1320, 2 from 1640 to 2000; λ₂ rises through 2 at 1300, on branches."""
    step = np.arange(3000)
    four = 0.3 * np.array([1.0, -0.6, 0.8, -1.2])[step % 4]
    two = np.where(step % 2, -0.3, 0.3)
    inside = (step >= 1000) & (step < 2000)
    loss = 1 + inside * np.where((step >= 1320) & (step < 1640), four, two)
    means = np.stack([np.full(3000, 2.5), 2 + (step - 1299.9) / 1000, np.full(3000, 0.5)], 1)
    eigenvalues = means + 0.6 * np.where(step % 2, 1, -1)[:, None] * inside[:, None]
    eig_step = step[::stride]
    zeros = {"weights": np.ones((3000, 3)), "loss": loss, "accuracy": np.zeros(3000)}
    return zeros | {"step": step, "weighted_loss": loss, "eig_step": eig_step, "eigenvalues": eigenvalues[eig_step]}


@pytest.mark.parametrize(("stride", "within"), [(1, 3), (25, 30)])
def test_each_change_of_period_has_its_nearest_crossings(stride, within):
    analysis = analyse(cascading(stride), limit=2.0)
    assert [c.index for c in analysis.crossings] == [1]
    (changes,) = analysis.changes
    assert [(c.before, c.after) for c in changes] == [(2, 4), (4, 2)]
    summary = analysis.summary()
    assert summary["crossed"] == 2.0
    (first, _) = summary["instabilities"][0]["changes"]
    assert abs(first["step"] - 1320) <= 64
    (nearest,) = first["nearest_crossings"]
    assert nearest["eigenvalue"] == 2
    assert nearest["upward"]
    assert abs(nearest["step"] - 1300) <= within
    assert nearest["distance"] == nearest["step"] - first["step"]
    table = analysis.table().splitlines()
    assert len(table) == 4
    assert f"λ1 never            λ2 ↑ {nearest['step']} ({nearest['distance']:+d})" in table[2]
    assert table[2].split()[1:4] == ["2", "→", "4"]


def test_without_a_limit_the_measured_threshold_is_what_is_crossed():
    analysis = analyse(metrics(1.6))
    assert analysis.crossed == analysis.branch_threshold
    recorded = metrics(1.6) | {"eig_step": np.empty(0, int), "eigenvalues": np.empty((0, 1))}
    analysis = analyse(recorded)
    assert analysis.crossings == []
    assert "crossings" not in analysis.table()


def test_nearest_is_by_distance_in_either_direction():
    analysis = replace(analyse(metrics(1.6)), crossings=[Crossing(10, 0, True), Crossing(50, 0, False)])
    assert [analysis.nearest_crossings(step) for step in (0, 29, 31, 99)] == [
        *([Crossing(10, 0, True)], [Crossing(10, 0, True)], [Crossing(50, 0, False)], [Crossing(50, 0, False)]),
    ]


def test_the_zoom_shows_guides_crossings_and_changes():
    recorded = cascading(1)
    analysis = analyse(recorded, limit=2.0)
    figure = trajectory(recorded, analysis, (900, 2100), limit=2.0)
    zoomed = figure.axes[-1]
    (marker,) = [line for line in zoomed.get_lines() if line.get_marker() == "^"]
    assert (marker.get_xdata()[0], marker.get_ydata()[0]) == (analysis.crossings[0].step, 2.0)
    guides = [line for line in zoomed.get_lines() if line.get_ls() == "--" and len(line.get_xdata()) > 2]
    assert len(guides) == 2
    steps, means = branch_means(recorded["eig_step"], recorded["eigenvalues"][:, :2], branches=8)
    inside = (steps >= 900) & (steps <= 2100)
    for guide, mean in zip(guides, means[inside].T, strict=True):
        np.testing.assert_array_equal(guide.get_data(), [steps[inside], mean])
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["2→4", "4→2"]
    figure = trajectory(recorded, analysis, (2100, 2900), limit=2.0)
    assert not [line for line in figure.axes[-1].get_lines() if line.get_marker() in "^v"]
