"""Changes of period beside crossings of the threshold: the counting, what chance is, and the script."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import bifurcation_crossings
from common.coincidences import Stretch, coincidences
from common.spiral_run import FusedRun, WindowedRun
from spiral_mlp import SpiralConfig, task_of

FOLDER = Path(bifurcation_crossings.__file__).parent / "figures" / "bifurcation_crossings"


def test_hits_are_events_with_a_mark_near():
    stretches = [
        Stretch(0, 100, 199, (110, 150), (113, 190)),
        Stretch(1, 0, 99, (50,), ()),
        Stretch(1, 200, 299, (), (220,)),
    ]
    assert [coincidences(stretches, within).hits for within in (2, 3, 36, 37, 40)] == [0, 1, 1, 2, 2]
    assert coincidences(stretches, 3).count == 3


def test_a_stretch_is_closed_to_a_ring():
    assert coincidences([Stretch(0, 100, 199, (101,), (198,))], 3).hits == 1
    np.testing.assert_array_equal(Stretch(0, 0, 5, (), (1,)).distances(), [1, 0, 1, 2, 3, 2])


def test_chance_by_shifts_is_exact():
    """Against every pair of shifts of two stretches, one by one."""
    stretches = [Stretch(0, 3, 13, (3, 6), (4, 9)), Stretch(1, 0, 7, (1, 2, 5), (0,))]
    result = coincidences(stretches, 1)
    counts = [
        sum(
            any(min((e - m - s) % n, (m + s - e) % n) <= 1 for m in stretch.marks)
            for stretch, s, n in zip(stretches, shifts, (11, 8), strict=True)
            for e in stretch.events
        )
        for shifts in itertools.product(range(11), range(8))
    ]
    assert result.hits == counts[0]
    assert result.by_shifts == pytest.approx(np.mean(counts), rel=1e-12)
    assert result.p_shifts == pytest.approx(np.mean(np.array(counts) >= counts[0]), rel=1e-12)


def random_stretches(near, clock=None):
    random = np.random.default_rng(0)
    for run in range(40):
        marks = random.integers(0, 1000, 4)
        if clock is not None:
            marks = clock + random.integers(-3, 4, len(clock))
        source = marks if clock is None else clock
        events = source[:2] + random.integers(-5, 6, 2) if near else random.integers(0, 1000, 2)
        yield Stretch(run, 0, 999, tuple(np.clip(events, 0, 999)), tuple(np.clip(marks, 0, 999)))


def test_what_is_linked_is_told_from_chance_and_from_a_common_clock():
    chance = coincidences(list(random_stretches(near=False)), 8, pairings=500)
    assert chance.p_shifts > 0.05
    assert chance.p_swaps > 0.05
    assert chance.by_shifts == pytest.approx(80 * 4 * 17 / 1000, rel=0.05)
    linked = coincidences(list(random_stretches(near=True)), 8, pairings=500)
    assert linked.hits == 80
    assert linked.p_shifts < 1e-10
    assert linked.p_swaps < 0.01
    clocked = coincidences(list(random_stretches(near=True, clock=np.array([100, 400, 600, 900]))), 8, pairings=500)
    assert clocked.p_shifts < 1e-10
    assert clocked.p_swaps > 0.05
    assert clocked.by_swaps > 70


def test_nothing_to_count():
    assert coincidences([], 8).count == coincidences([], 8).hits == 0
    assert coincidences([], 8).p_shifts == 1


def test_a_windowed_run_has_the_eigenvalues_of_its_windows_and_the_steps_of_any():
    config = SpiralConfig(steps=120, period=50, points=20, width=10, stop_step=None, eig_every=1)
    every = bifurcation_crossings._trained(FusedRun(config, task_of(config))).metrics()
    windows = [(0, 9), (30, 44), (110, 119)]
    some = bifurcation_crossings._trained(WindowedRun(config, task_of(config), windows))
    assert some.is_complete()
    metrics = some.metrics()
    expected = [row for first, last in windows for row in range(first, last + 1)]
    assert metrics["eig_step"].tolist() == expected
    np.testing.assert_allclose(metrics["eigenvalues"], every["eigenvalues"][expected], rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(metrics["weighted_loss"], every["weighted_loss"])


def test_events_are_rises_of_the_period_in_order():
    steps = ((2, 4), (4, 2), (2, 8), (8, None), (None, 1), (1, 2), (2, 1))
    changes = [{"step": 10 * i, "before": before, "after": after} for i, (before, after) in enumerate(steps)]
    window = {"start": -5, "changes_64": changes}
    found = {name: events(window, 64) for name, events in bifurcation_crossings.EVENTS.items()}
    assert found == {
        "first bifurcation": [-5],
        "second bifurcation": [0],
        "third bifurcation": [20],
        "any change of period": [0, 10, 20, 30, 40, 50, 60],
    }


def test_below_is_before_a_rise_and_after_a_fall():
    window = {
        "crossings": [
            {"of": "mean", "step": 10, "eigenvalue": 2, "upward": True},
            {"of": "upper", "step": 12, "eigenvalue": 2, "upward": False},
            {"of": "mean", "step": 20, "eigenvalue": 2, "upward": False},
        ]
    }
    assert [bifurcation_crossings.is_below(window, step, 2) for step in (0, 9, 10, 19, 20)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert not bifurcation_crossings.is_below(window, 15, 1)
    assert bifurcation_crossings.is_below(window, 15, 3)


def test_levels_of_an_alternating_eigenvalue():
    values = np.where(np.arange(40)[:, None] % 2, 3.0, 1.0)
    for kind, expected in (("mean", 2.0), ("upper", 3.0)):
        steps, level = bifurcation_crossings.LEVELS[kind](np.arange(40), values)
        assert len(steps) == len(level)
        np.testing.assert_array_equal(level, expected)


def test_the_script_goes_on_and_counts(tmp_path, capsys):
    options = ["--steps", "4600", "--out", str(tmp_path)]  # into the first instability
    first = bifurcation_crossings.main([*options, "--seeds", "1"])
    (chunk,) = (tmp_path / "chunks").iterdir()
    before = chunk.stat().st_mtime_ns
    summary = bifurcation_crossings.main([*options, "--seeds", "2"])
    assert chunk.stat().st_mtime_ns == before
    assert (first["seeds"], summary["seeds"]) == (1, 2)
    assert summary["windows"] > 0
    assert (tmp_path / "figure.png").exists()
    assert "by swaps" in capsys.readouterr().out
    for row in summary["coincidences"]:
        assert 0 <= row["hits"] <= row["count"]


@pytest.mark.parametrize("option", ["--seeds", "--steps", "--period", "--width"])
def test_bad_options_end_the_program_with_their_name(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        bifurcation_crossings.main([option, "0", "--out", str(tmp_path)])
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err


def test_the_committed_figures_are_of_one_run():
    """The counts follow from the committed table."""
    rows = pq.read_table(FOLDER / "table.parquet").to_pylist()
    summary = json.loads((FOLDER / "summary.json").read_text())
    assert summary["seeds"] == len(rows)
    for result in summary["coincidences"][::17]:
        keys = (result["events"], result["segment"], result["eigenvalue"], result["of"])
        found = coincidences(bifurcation_crossings.stretches_of(rows, *keys), result["within"], pairings=1)
        assert (found.count, found.hits) == (result["count"], result["hits"])
        assert found.p_shifts == pytest.approx(result["p_shifts"], rel=1e-9)
