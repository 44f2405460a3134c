"""Products with a Hessian by differences of gradients, and their error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._checks import Parameters, check_number, check_seed
from dynloss_ext._gradients import Gradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dynloss_ext._shards import Shards

# Sixth differences, of g(x + k s u) for k = -3 ... 3: nothing is left of a smooth g, and √924 times the noise.
_SIXTH = (1.0, -6.0, 15.0, -20.0, 15.0, -6.0, 1.0)
_SIXTH_NOISE = math.sqrt(924.0)
# What is said of noise is this much more than what was seen along one direction.
_ELSEWHERE = 2.0
# An error below this share of the product is good enough to stop looking, where the next is not smaller.
_GOOD = 3e-4
# The largest |D(δ) - D(2δ)| / |H u| of a series that converges; it is 0.43 for a gradient that is constant far away.
_CONVERGES = 0.3
# Steps that a product tries, where its direction bends more than the one that was measured.
_MAX_TRIES = 3
_HALF = math.sqrt(2.0)  # of a unit vector u, two of which that are orthogonal make up √2 u
# Spacings at which the noise is measured: the first, this much less each, so many at most.
_FINER = 16.0
_MAX_SPACINGS = {True: 8, False: 4}  # of float64, which has the digits, and of others
# Noise measured at one spacing is believed for steps up to so many times as long.
_MAX_STEP = 4.0
# Gradients that change by less than so many roundings of theirs do not change.
_NOTHING = 4.0
# An error of this share of the product, near a step that was good before, asks for a search; in float64 _GOOD does.
_USELESS = 0.3


class _Formula(NamedTuple):
    """A central difference of gradients at x + points · δ u: each row of weights is one, in units of 1 / δ."""

    points: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]  # for H u; and for D(δ) - D(2δ)
    rounding: float  # of H u in units of (noise of a gradient) / δ

    def at(self, step: float) -> tuple[list[float], list[list[float]]]:
        return [point * step for point in self.points], [[weight / step for weight in row] for row in self.weights]


_FORMULAS = {
    2: _Formula((1.0, -1.0), ((1 / 2, -1 / 2),), math.sqrt(1 / 2)),
    4: _Formula(
        (1.0, -1.0, 2.0, -2.0),
        ((2 / 3, -2 / 3, -1 / 12, 1 / 12), (1 / 2, -1 / 2, -1 / 4, 1 / 4)),
        math.sqrt(65 / 72),
    ),
}


class _Step(NamedTuple):
    """A step δ, with what was measured of the noise and the bend of gradients where it was chosen."""

    step: float
    rounding: float  # error of a product with a unit vector by the noise of gradients
    truncation: float  # the same by the end of the Taylor series, along the direction that was measured
    product: float  # the length of H u along that direction

    @property
    def error(self) -> float:
        return math.hypot(self.rounding, self.truncation)

    @property
    def relative(self) -> float:
        return self.error / self.product if self.product else math.inf


class GradientDifferences:
    """Products with the Hessian by central differences of gradients.

    With the displacement δ along a unit vector u, D(δ) = (g(x + δ u) - g(x - δ u)) / 2δ = H u + δ² c / 6 + O(δ⁴); of
    order 4, Richardson's (4 D(δ) - D(2δ)) / 3. `docs/concepts/differences.md` derives the step and the errors.

    Args:
        closure, params, batches, process_group, order, step, seed: see `HessianOperator.from_gradients`.

    Attributes:
        step: δ.
        noise: how far a product with a unit vector may be from H v, in length: as measured when this was made and, of
            order 4, the most that a product since had.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Parameters,
        batches: Iterable[Any] | None,
        process_group: ProcessGroup | None,
        order: int,
        step: float | None,
        seed: int,
    ) -> None:
        if order not in _FORMULAS:
            raise ValueError(f"order: expected 2 or 4, got {order!r}")
        if step is not None:
            step = check_number("step", step, 0, open_low=True)
        self._seed = check_seed(seed) % 2**32
        self._gradients = Gradients(closure, params, batches, process_group, self._seed)
        self._gradients.agree("order, step, seed", order, step, seed)
        self.like, self.params, self._layout = self._gradients.like, self._gradients.params, self._gradients.layout
        self.size = self._layout.dimension
        self.order = order
        self._formula = _FORMULAS[self.order]
        self._double = self._gradients.rounding < 1e-12
        self._coarsest = self._gradients.rounding ** (1 / (order + 1)) * (self._gradients.norm or 1.0)
        (self._steepness,) = self._layout.lengths([self._gradients.at_origin])
        self._chosen = self._choose() if step is None else self._near(step)
        self.step, self.noise = self._chosen.step, self._chosen.error
        if not math.isfinite(self.noise):
            raise ValueError(
                f"closure: expected gradients within {self.step:.2g} of the parameters whose squares are finite, got"
                " others"
            )
        del self._gradients.at_origin  # as large as the parameters

    @property
    def shards(self) -> Shards | None:
        """How processes hold vectors, where they hold parts of them."""
        return self.params.shards

    def operator(self, in_shards: bool = False) -> _C.SymmetricOperator:
        """What the driver calls, with whole vectors or in shards. Not kept: the garbage collector does not see through
        it to what the closure holds."""
        shards = self.params.shards
        if shards is None:
            return _C.PythonOperator(self._product, self.size, self.like, noise=lambda: self.noise)
        if in_shards:
            return _C.PythonOperator(self._product, shards.size, self.like, noise=lambda: self.noise, shards=shards)

        def product(v: Tensor) -> Tensor:
            return shards.gather(self._product(shards.cut(v)))

        return _C.PythonOperator(product, self.size, self.like, noise=lambda: self.noise)

    def fail(self, error: Exception) -> None:
        """Raises what kept this process from asking for a product; the others, which wait for it, are told."""
        self._gradients.fail(error, len(self._formula.weights))

    def suspects(self) -> list[str]:
        """There is no second derivative."""
        return []

    def products(self) -> AbstractContextManager[object]:
        """Each evaluation leaves no trace by itself."""
        return nullcontext()

    def _product(self, v: Tensor) -> Tensor:
        length = self._gradients.length_of(v)
        u = v / length if 0.0 < length < math.inf else torch.zeros_like(v)
        if self.order == 2:
            return self._differences(u, self.step)[0][0] * length
        best, error, step = u, math.inf, self.step
        for _ in range(_MAX_TRIES):
            (product, _), (size, change) = self._differences(u, step)
            rounding = self._chosen.rounding * self.step / step
            truncation = _truncation_of(change, size)
            if not error <= math.hypot(rounding, truncation):
                best, error = product, math.hypot(rounding, truncation)
            # This direction bends more than the one that the step is for, or has a kink nearer than that.
            shorter = _balanced(rounding, truncation)
            if not (error > _GOOD * self._chosen.product and shorter < 1 / 2):
                break
            step *= shorter
        if math.isfinite(error):
            self.noise = max(self.noise, error)
        return best * length

    def _differences(self, u: Tensor, step: float) -> tuple[Tensor, list[float]]:
        """The rows of the formula, and their lengths."""
        points, weights = self._formula.at(step)
        return self._gradients.combinations(u, points, weights)

    def _choose(self) -> _Step:
        """The step with the smallest error: noise is measured at ever finer spacings while that makes it smaller, as
        gradients that are not smooth, or bend soon, have it.

        A spacing is trusted whose product is that of one beside it: where a spacing is too coarse, or below that of the
        numbers in which the loss is computed, so that gradients hardly change and show no noise, products differ.
        """
        spacing = self._coarsest
        u = self._direction(spacing / _FINER)
        first, before = self._measure(u, spacing)
        trusted, last = [], first
        for _ in range(_MAX_SPACINGS[self._double] - 1):
            spacing /= _FINER
            found, product = self._measure(u, spacing)
            between, new, old = self._layout.lengths([product - before, product, before])
            if 0.0 < max(new, old) >= 2 * between:
                trusted += [last, found]
                if last.relative <= min(_GOOD, found.relative):
                    break
            last, before = found, product
        return min(trusted, key=lambda step: step.relative, default=first)

    def _near(self, step: float) -> _Step:
        """A step for which the error is small, if this one was the best for a similar operator: shorter where gradients
        are seen to bend sooner, longer only where the error is not small.

        Of order 4 that is seen best at half the step, where the noise has no part of the bend in it; of order 2, and
        with much noise, there is too little bend to see. After a change that was large, or abrupt, all is looked for.
        """
        share = 1.0 if self.order == 2 else 0.5
        step = min(step, _MAX_STEP * self._coarsest)
        for _ in range(_MAX_SPACINGS[False]):
            spacing, before = share * step, step
            found = self._measure(self._direction(spacing), spacing, step)[0]
            step = found.step
            if step == before and found.relative > _GOOD and share < 1.0:
                share = 1.0
            elif before / 2 <= step < 2 * before:
                break
        # In float64 an error that is not small has a reason that a search may mend: a far step, or kinks.
        if found.relative <= (_GOOD if self._double else _USELESS):
            return found
        chosen = self._choose()
        return found if found.relative < chosen.relative else chosen

    def _direction(self, spacing: float) -> Tensor:
        """Half random, half what two products make of such a vector of half the gradient: there products are large, and
        bend."""
        random = self._unit(self._layout.normal(self._seed))
        u = self._unit(self._unit(self._gradients.at_origin) + random)
        for _ in range(2):
            (product,), _ = self._gradients.combinations(u, [spacing, -spacing], [[0.5 / spacing, -0.5 / spacing]])
            (infinite,) = self._layout.lengths([], ~product.isfinite().all())
            if infinite:
                break
            u = self._unit(self._unit(product) + random)
        return u

    def _unit(self, v: Tensor) -> Tensor:
        (length,) = self._layout.lengths([v])
        return v / length if length > 0.0 else v

    def _measure(self, u: Tensor, spacing: float, step: float | None = None) -> tuple[_Step, Tensor]:
        """The best step for what gradients at this spacing along u show, and H u as they show it.

        A step that is given stays where the best would be shorter for a bend that cannot be told from noise, or longer
        and it is good enough.
        """
        points = [k * spacing for k in range(-3, 4)]
        first = [0.0, 0.0, -0.5 / spacing, 0.0, 0.5 / spacing, 0.0, 0.0]
        third = [-0.5 / (3 * spacing), 0.0, 0.0, 0.0, 0.0, 0.0, 0.5 / (3 * spacing)]
        bend = [b - a for a, b in zip(first, third, strict=True)]  # D(3s) - D(s) = 4 s² c / 3
        rows, (sixth, product, change) = self._gradients.combinations(u, points, [list(_SIXTH), first, bend])
        seen = rows[1].clone()  # and no more of the rows
        # Exact arithmetic in small integers would show none.
        noise = max(sixth / _SIXTH_NOISE, 0.25 * self._gradients.rounding * product * spacing)
        unresolved = math.sqrt(5 / 9) * noise / spacing
        # As if the random half of u had no part in it.
        c = _HALF**3 * 3 * max(change, unresolved) / (4 * spacing**2)
        product *= _HALF
        rounding = self._formula.rounding * noise * _ELSEWHERE
        floor = self._gradients.rounding * self._steepness
        if max(product, change) * spacing <= _NOTHING * floor:  # a loss that is linear, as far as can be seen
            step = step or spacing
            return _Step(step, (rounding + self._formula.rounding * floor) / step, 0.0, 0.0), seen
        best = (3 * rounding / c) ** (1 / 3) if self.order == 2 else (1.875 * rounding * product / c / c) ** (1 / 5)
        best = min(best, _MAX_STEP * spacing)
        if best == 0.0:  # gradients that jump, and not between the inner points
            return _Step(step or spacing, math.inf, math.inf, product), seen
        resolved = change > 2 * unresolved
        if step is None or (best < step and resolved) or (best > step and rounding / step > _GOOD * product):
            step = best
        truncation = step**2 * c / 6 if self.order == 2 else _truncation_of(step**2 * c / 2, product)
        without_noise = math.sqrt(max(0.0, product**2 - (_HALF * noise / spacing) ** 2 / 2))
        return _Step(step, rounding / step, truncation, without_noise), seen


def _balanced(rounding: float, truncation: float) -> float:
    """By how much the step of order 4 has to be longer, where these are its errors, for their sum to be smallest."""
    return float((rounding / (4 * truncation)) ** (1 / 5)) if truncation > 0.0 else 1.0


def _truncation_of(difference: float, product: float) -> float:
    """The error of order 4, δ⁴ |e| / 30, from |D(δ) - D(2δ)| = δ² |c| / 2 and |H u|, with |e| = 4 |c|² / |H u|, as a
    tanh has it where it is steepest. Where the series hardly converges, as of a gradient that saturates, nothing is
    known."""
    if difference > _CONVERGES * product:
        return difference + product
    return 8 / 15 * difference**2 / product if difference > 0.0 else 0.0
