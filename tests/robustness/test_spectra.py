"""A thousand random spectra through `eigsh`: what is claimed of residuals and audits holds."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from robustness import spectra

from dynloss_ext import _C, EigenResult

CASES = 1000


@pytest.fixture(scope="module")
def counts() -> dict[str, spectra.Count]:
    return spectra.count(range(CASES))


def test_residuals_flags_and_vectors_are_true(counts: dict[str, spectra.Count]) -> None:
    total = spectra.together(counts)
    assert total.cases == CASES
    assert total.faults == []
    assert total.statuses["converged"] > 0.95 * CASES


def test_no_more_is_missed_than_promised(counts: dict[str, spectra.Count]) -> None:
    """What was counted had to have a chance of more than one in a million."""
    assert {name: chance for name, chance in spectra.chances(counts).items() if chance < spectra.RARE} == {}


def test_broken_promises_are_seen() -> None:
    """A quarter missed with 0.05 reported, or an eighth with 0.01."""
    for share, reported, fair in ((0.25, 0.05, 0.06), (0.12, 0.01, 0.08)):
        misses = dict.fromkeys(range(round(200 * share)), reported)
        count = spectra.Count(cases=200, missed=misses)
        assert min(spectra.chances({"all": count}).values()) < spectra.RARE
        few = spectra.Count(cases=200, missed=dict(list(misses.items())[: round(200 * fair / 8)]))
        assert count.chance_of_the_misses(0.5) == 1 and few.chance_of_the_misses(fair) == 1


def test_the_hidden_are_found_by_the_audit_alone() -> None:
    """Without it nearly all of that family are missed, so that there is something to find."""
    hidden = [seed for seed in range(1000) if spectra.make_family(seed) == "hidden"]
    cases = [case for case in map(spectra.make_case, hidden) if "v0" in case.options]
    blind = [spectra.misses(case, _without_audit(case)) for case in cases]
    assert sum(blind) > 0.8 * len(cases) > 60


def _without_audit(case: spectra.Case) -> EigenResult:
    options = {"max_hvp": 1000, **case.options, "v0": case.options["v0"][None]}
    op = _C.PythonOperator(case.matrix.mv, len(case.spectrum), case.spectrum)
    values, vectors, residuals, num_hvp, converged, status, *_ = _C.eigsh(op, k=case.k, audit=False, **options)
    return EigenResult(values, vectors.T, residuals, num_hvp, converged, status, math.nan)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_what_is_counted_as_missed(which: str) -> None:
    """A result that lacks the leading value is; one that is off by less than the tolerance is not."""
    case = next(
        case
        for case in map(spectra.make_case, range(2000))
        if (case.family, case.k, case.options["which"]) == ("uniform", 2, which) and len(case.spectrum) > 20
    )
    result = case.solve()
    assert not spectra.misses(case, result) and not spectra.faults(case, result)
    order = spectra._sorted(case.spectrum, which, indices=True)
    lacking = dataclasses.replace(result, values=case.spectrum[order[1:3]].sort(descending=True).values)
    assert spectra.misses(case, lacking)
    assert spectra.faults(case, dataclasses.replace(result, residuals=result.residuals * 2 + 1e-3))
    assert spectra.faults(case, dataclasses.replace(result, values=result.values + 1e-3))


def test_chances_of_sums() -> None:
    """Against the binomial distribution: an upper bound, and not a poor one."""
    n, p, count = 200, 0.05, 25
    k = torch.arange(count, n + 1, dtype=torch.float64)
    choose = torch.lgamma(torch.tensor(n + 1.0)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    exact = float((choose + k * torch.tensor(p).log() + (n - k) * torch.tensor(1 - p).log()).exp().sum())
    assert exact < spectra.chance_of_at_least(count, [p] * n) < 50 * exact
    assert spectra.chance_of_at_least(5, [p] * n) == 1
