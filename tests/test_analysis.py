"""What the example scripts conclude from a run's metrics."""

from __future__ import annotations

import numpy as np
import pytest

from common.report import analyse, cascade
from dynloss_ext import PeriodSegment


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
