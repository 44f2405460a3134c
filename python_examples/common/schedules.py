"""Learning rates as pure functions of the optimisation step: nothing to save, nothing to restore."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Schedule = Callable[[int], float]


def constant(lr: float) -> Schedule:
    return lambda step: lr


def piecewise_linear(knots: Sequence[tuple[float, float]], steps_per_epoch: int) -> Schedule:
    """Straight lines through (epoch, learning rate) pairs; constant before the first and after the last."""
    epochs, rates = zip(*knots, strict=True)
    if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
        raise ValueError(f"the epochs of a piecewise-linear schedule must increase, got {epochs}")
    return lambda step: float(np.interp(step / steps_per_epoch, epochs, rates))


def cosine(lr: float, num_steps: int) -> Schedule:
    """Half a cosine from `lr` at step 0 to 0 at step `num_steps` (Loshchilov & Hutter, arXiv 1608.03983)."""
    return lambda step: 0.5 * lr * (1.0 + math.cos(math.pi * min(step / num_steps, 1.0)))
