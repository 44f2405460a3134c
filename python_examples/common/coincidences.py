"""How often events of a run fall near other events of it, against what chance gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Stretch:
    """Steps of one run in which both kinds were looked for.

    Attributes:
        run: whose they are.
        first: first step.
        last: last step.
        events: steps of what is asked about.
        marks: steps of what they are to fall near.
    """

    run: int
    first: int
    last: int
    events: tuple[int, ...]
    marks: tuple[int, ...]

    def distances(self) -> Array:
        """From each step to the nearest mark, as if the stretch were closed to a ring; infinite without marks."""
        length = self.last - self.first + 1
        places = np.arange(length)
        nearest = np.full(length, np.inf)
        for mark in self.marks:
            apart = np.abs(places - (mark - self.first))
            nearest = np.minimum(nearest, np.minimum(apart, length - apart))
        return nearest


@dataclass(frozen=True)
class Coincidences:
    """Events with a mark at most `within` steps away, and what two kinds of chance give.

    Attributes:
        count: how many events there are.
        hits: how many of them have a mark that near.
        by_shifts: hits to expect of marks that keep their distances, but are shifted along each stretch at random.
        p_shifts: probability of as many hits or more, exactly.
        by_swaps: hits to expect of the marks of another run at the same steps: what a common clock gives.
        p_swaps: share of random pairings of the runs with as many hits as the true one, or more.
    """

    within: int
    count: int
    hits: int
    by_shifts: float
    p_shifts: float
    by_swaps: float
    p_swaps: float


def coincidences(stretches: Sequence[Stretch], within: int, *, pairings: int = 10_000, seed: int = 0) -> Coincidences:
    """Count events near marks in all `stretches`."""
    hits, chance = 0, np.ones(1)  # chance[n]: the probability of n hits in the stretches so far
    for stretch in stretches:
        near = stretch.distances() <= within
        places = np.array(stretch.events, dtype=np.int64) - stretch.first
        shifts = np.arange(len(near))
        counts = near[(places[:, None] - shifts) % len(near)].sum(0)
        hits += int(counts[0])
        chance = np.convolve(chance, np.bincount(counts) / len(near))
    runs = sorted({stretch.run for stretch in stretches})
    events, marks = ([_joined(stretches, run, kind) for run in runs] for kind in ("events", "marks"))
    matches = np.array([[_matches(own, others, within) for others in marks] for own in events], dtype=np.int64)
    matches = matches.reshape(len(runs), len(runs))
    random = np.random.default_rng(seed)
    true, rows = int(np.trace(matches)), np.arange(len(runs))
    swapped = np.array([matches[rows, random.permutation(len(runs))].sum() for _ in range(pairings)])
    return Coincidences(
        within,
        sum(len(stretch.events) for stretch in stretches),
        hits,
        float(np.arange(len(chance)) @ chance),
        float(min(1.0, chance[hits:].sum())),
        float(matches.sum() / max(1, len(runs))),
        float((1 + np.count_nonzero(swapped >= true)) / (1 + pairings)),
    )


def _joined(stretches: Sequence[Stretch], run: int, kind: str) -> Array:
    """The events or marks of a run, all of its stretches together."""
    return np.array([step for s in stretches if s.run == run for step in getattr(s, kind)], dtype=np.int64)


def _matches(events: Array, marks: Array, within: int) -> int:
    return int((np.abs(events[:, None] - marks).min(1, initial=np.iinfo(np.int64).max) <= within).sum())
