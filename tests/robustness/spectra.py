"""Random spectra through `eigsh`: does `miss_probability` keep what it promises?

    cd tests && python -m robustness.spectra --cases 100000 --out robustness/results/spectra.json

An eigenvalue is missed where the i-th true value lies beyond the i-th returned one by more than the tolerance and the
residuals. `miss_probability` is a p-value: of the eigenvectors that there are to find, at most a share α is missed with
a number of α or less reported. (The numbers do not add up to the misses: an audit stops at the first that is small.)

`chance_of_at_least` bounds how likely as many misses would be. In the family "hidden" the start vector is orthogonal to
an eigenvector whose value lies a little beyond the tolerance, so that only the audit can find it, and hardly; in the
others there may be nothing to miss.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from robustness.record import publish
from torch import Tensor

from dynloss_ext import EigenResult, eigsh

EPSILON = torch.finfo(torch.float64).eps
BOUNDS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.5)  # at 0.08 an audit stops; from 0.5 on it is inconclusive
RARE = 1e-6  # what would be as unlikely as this is a broken promise
SIZES = (2, 3, 4, 5, 8, 13, 20, 24, 25, 26, 34, 55, 89, 144, 200)


def chance_of_at_least(count: int, chances: Sequence[float]) -> float:
    """An upper bound of P(X >= count) for a sum X of independent events with these chances (Chernoff 1952)."""
    mean = math.fsum(chances)
    if count <= mean:
        return 1.0
    return math.exp(count - mean - count * math.log(count / mean)) if mean > 0 else 0.0


# ---- spectra: a function of (size, uniform numbers in [0, 1)) -> (size,)


def _uniform(n: int, draw: Any) -> Tensor:
    return 2 * draw(n) - 1


def _clustered(n: int, draw: Any) -> Tensor:
    """Around a few centres, a cluster's width from 1e-14 to 1e-2 of its distance to the others."""
    centres = 2 * draw(1 + int(4 * draw(1))) - 1
    width = 10 ** (-14 + 12 * draw(1))
    return centres[(draw(n) * len(centres)).long()] + width * (draw(n) - 0.5)


def _degenerate(n: int, draw: Any) -> Tensor:
    """Few different values, each many times."""
    values = 2 * draw(1 + int(5 * draw(1))) - 1
    return values[(draw(n) * len(values)).long()]


def _wide(n: int, draw: Any) -> Tensor:
    """Over 24 orders of magnitude, of both signs."""
    return torch.where(draw(n) < 0.5, -1.0, 1.0) * 10 ** (24 * draw(n) - 12)


def _negative(n: int, draw: Any) -> Tensor:
    return -(10 ** (-3 * draw(n)))


def _low_rank(n: int, draw: Any) -> Tensor:
    values = torch.zeros(n, dtype=torch.float64)
    rank = int(min(n, 6) * draw(1))
    values[:rank] = 2 * draw(rank) - 1
    return values


def _hessian(n: int, draw: Any) -> Tensor:
    """A bulk near zero and a few outliers."""
    values = 1e-2 * (2 * draw(n) - 1)
    outliers = 1 + int(min(n, 8) * draw(1))
    values[:outliers] = 10 ** (2 * draw(outliers) - 1)
    return values


def _crowded(n: int, draw: Any) -> Tensor:
    """Evenly spaced up to the edge."""
    return torch.linspace(-1, 1, n, dtype=torch.float64) + 1e-3 * draw(n) / n


FAMILIES = {
    "uniform": _uniform,
    "clustered": _clustered,
    "degenerate": _degenerate,
    "wide": _wide,
    "negative": _negative,
    "low rank": _low_rank,
    "hessian": _hessian,
    "crowded": _crowded,
    "hidden": _uniform,
}


@dataclass(frozen=True)
class Case:
    """A matrix whose spectrum is known, and what is asked of it."""

    family: str
    spectrum: Tensor
    matrix: Tensor
    k: int
    options: dict[str, Any]

    def solve(self) -> EigenResult:
        """By `eigsh`, without its warnings."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            n = len(self.spectrum)
            return eigsh(self.matrix.mv, self.k, n=n, dtype=torch.float64, **self.options)


def make_case(seed: int) -> Case:
    """The case of this number."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def choose(values: Sequence[Any]) -> Any:
        return values[int(len(values) * draw(1))]

    family, n = choose(list(FAMILIES)), choose(SIZES)
    scale = 10 ** float(choose([0.0, 0.0, 6 * draw(1) - 3, 200 * draw(1) - 100]))
    spectrum = scale * FAMILIES[family](n, draw)
    which = choose(["LA", "LA", "SA", "LM"])
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    k = min(n, choose([1, 1, 2, 3, 5, 10]))
    options = {
        "which": which,
        "tol": choose([1e-1, 1e-3, 1e-3, 1e-6, 1e-9]),
        "max_basis": choose([24, 24, 24, max(8, k + 6), 60]),
        "seed": seed,
    }
    if family == "hidden" and n > k:
        _hide(spectrum, k, which, options["tol"] * 10 ** float(draw(1)))
        options["v0"] = q[:, 1:].sum(1)
    matrix = (q * spectrum) @ q.T
    return Case(family, spectrum, (matrix + matrix.T) / 2, k, options)


def _hide(spectrum: Tensor, k: int, which: str, distance: float) -> None:
    """Puts the first eigenvalue a relative distance beyond the k-th of the others."""
    last = spectrum[1:][_sorted(spectrum[1:], which, indices=True)[k - 1]]
    outward = {"LA": 1.0, "SA": -1.0, "LM": float(last.sign())}[which]
    spectrum[0] = last + outward * distance * last.abs()


def _sorted(values: Tensor, which: str, indices: bool = False) -> Tensor:
    """What is wanted most first, as numbers of which the larger is wanted more."""
    keys = {"LA": values, "SA": -values, "LM": values.abs()}[which]
    ordered = keys.sort(descending=True)
    return ordered.indices if indices else ordered.values


# ---- what is asked of a result


def faults(case: Case, result: EigenResult) -> list[str]:
    """What is wrong with a result beyond doubt: residuals, flags, vectors."""
    found = []
    norm = float(case.spectrum.abs().max())
    values, vectors = result.values, result.vectors
    if not bool(values.isfinite().all() and vectors.isfinite().all()):
        return [f"not finite: {values.tolist()}, {result.status}"]
    unit = max(norm, 1e-300)
    residuals = ((case.matrix / unit) @ vectors - vectors * (values / unit)).norm(dim=0) * unit
    rounding = 100 * EPSILON * norm * math.sqrt(len(case.spectrum))
    # The driver takes the difference of two squares as long as it stands above their rounding.
    squares = (residuals / unit) ** 2
    if bool(((squares - (result.residuals / unit) ** 2).abs() > 2e-3 * squares + 1000 * EPSILON).any()):
        found.append(f"residuals {result.residuals.tolist()} instead of {residuals.tolist()}")
    if bool((residuals > _limit(case, values) * (1 + 1e-3) + rounding)[result.converged].any()):
        found.append(f"converged with residuals {residuals.tolist()}")
    if float((vectors.T @ vectors - torch.eye(case.k, dtype=torch.float64)).abs().max()) > 1e-10:
        found.append("vectors that are not orthonormal")
    nearest = (values[:, None] - case.spectrum).abs().min(dim=1).values
    if bool((nearest > residuals + rounding).any()):
        found.append("a value that is not within its residual of an eigenvalue")
    if not bool((values.diff() <= 0).all()):
        found.append(f"values in disorder {values.tolist()}")
    if result.converged.all() != result.status.startswith("converged"):
        found.append(f"converged {result.converged.tolist()} with status {result.status}")
    return found


def _limit(case: Case, values: Tensor) -> Tensor:
    floor = EPSILON ** (2 / 3) * float(case.spectrum.abs().max())
    return (case.options["tol"] * values.abs()).clamp(min=floor)


def misses(case: Case, result: EigenResult) -> bool:
    """Whether an eigenvalue lies beyond the returned ones by more than the tolerance."""
    which = case.options["which"]
    margins = torch.maximum(_limit(case, result.values), result.residuals)
    order = _sorted(result.values, which, indices=True)
    returned, margins = _sorted(result.values, which), margins[order]
    margins = torch.maximum(margins, margins[-1])
    return bool((_sorted(case.spectrum, which)[: case.k] > returned + margins * (1 + 1e-6)).any())


@dataclass
class Count:
    """Of the solves of a family."""

    cases: int = 0
    misses: int = 0
    products: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reported: list[float] = field(default_factory=list)  # miss_probability of those that say "converged"
    faults: list[str] = field(default_factory=list)
    missed: dict[int, float] = field(default_factory=dict)  # by their numbers, what was reported

    def add(self, seed: int) -> None:
        """One more case."""
        case = make_case(seed)
        result = case.solve()
        self.cases += 1
        self.products += result.num_hvp
        self.statuses[result.status] += 1
        self.faults += [f"case {seed}: {fault}" for fault in faults(case, result)]
        if result.status == "converged":
            self.reported.append(result.miss_probability)
            if misses(case, result):
                self.missed[seed] = result.miss_probability

    def chance_of_the_misses(self, bound: float) -> float:
        """Of as many as there are with at most this reported, or more, if what is reported are p-values."""
        small = sum(chance <= bound for chance in self.missed.values())
        return chance_of_at_least(small, [bound] * self.cases)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cases": self.cases,
            "statuses": dict(self.statuses.most_common()),
            "missed": len(self.missed),
            "sum_of_miss_probability": round(math.fsum(self.reported), 2),
            "missed_by_reported": {f"<= {b}": sum(r <= b for r in self.missed.values()) for b in BOUNDS},
            "least_chance": float(f"{min(map(self.chance_of_the_misses, BOUNDS)):.3g}"),
            "wrong_residuals_flags_or_vectors": len(self.faults),
            "products_per_case": round(self.products / max(1, self.cases), 1),
        }


def count(seeds: Sequence[int], seconds: float = math.inf) -> dict[str, Count]:
    """By family, and together as "all"; stops after so many seconds."""
    counts: dict[str, Count] = defaultdict(Count)
    end = time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end:
            break
        counts[make_family(seed)].add(seed)
    return dict(counts)


def make_family(seed: int) -> str:
    """The family of a case, without its matrix."""
    generator = torch.Generator().manual_seed(seed)
    return list(FAMILIES)[int(len(FAMILIES) * torch.rand(1, generator=generator, dtype=torch.float64))]


def together(counts: dict[str, Count]) -> Count:
    """The sum over families."""
    total = Count()
    for part in counts.values():
        total.cases += part.cases
        total.products += part.products
        total.statuses += part.statuses
        total.reported += part.reported
        total.faults += part.faults
        total.missed |= part.missed
    return total


def chances(counts: dict[str, Count]) -> dict[str, float]:
    """Of what was counted, if the promises hold."""
    return {f"{name} <= {b}": count.chance_of_the_misses(b) for name, count in counts.items() for b in BOUNDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    counts = count(range(options.first, options.first + options.cases), options.seconds)
    seconds = time.monotonic() - began
    total = together(counts)
    families = {name: counts[name].as_dict() for name in sorted(counts)}
    command = f"python -m robustness.spectra --cases {options.cases} --first {options.first}"
    publish(options.out, command, seconds=round(seconds), all=total.as_dict(), families=families)
    print("\n".join(total.faults[:20]))
    if total.faults or min(chances(counts).values()) < RARE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
