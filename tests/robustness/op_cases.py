"""Anything that the loss takes, all at once, against its twin in float64: values, gradients, second derivatives.

    cd tests && python -m robustness.op_cases --cases 100000 --out robustness/results/op_cases.json

The strategies of `tests/test_cross_entropy*.py` vary a few things each; this one varies all together. Layouts and the
measure of rounding are those of `cross_entropy_cases.py`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cross_entropy_cases import DTYPES, STRIDES, labels, near, normal, strided
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from robustness.record import publish
from torch import Tensor

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient, reference

CLASSES = (1, 2, 3, 4, 7, 8, 10, 15, 16, 17, 31, 33, 64, 65, 100, 129, 257, 1000)
WAVEFORMS = ("triangle", "sine", "square", "table", "function")


@dataclass(frozen=True)
class OpCase:
    """One call."""

    logits: Tensor
    target: Tensor
    oscillation: Oscillation
    step: int | Tensor
    options: dict[str, Any]
    direction: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.logits.dtype


@st.composite
def oscillations(draw: st.DrawFn, classes: int, members: int | None) -> Oscillation:
    """Of every kind; for several members, or one without a dimension of members."""
    waveform = draw(st.sampled_from(WAVEFORMS if members is None else WAVEFORMS[:-1]))
    seed = draw(st.integers(0, 2**20))
    count = () if members is None else (members,)
    if waveform == "table":
        return Oscillation.from_table(normal(*count, draw(st.integers(1, 5)), classes, seed=seed).abs())
    if waveform == "function":
        rows = normal(3, classes, seed=seed).abs()
        return Oscillation.from_function(lambda step: rows[step % 3], classes)
    closed = draw(st.booleans())
    period = draw(st.sampled_from([1, 2, 7, 5000] if closed else [1, 1.5, 7, 5000, 1e9]))
    amplitude = draw(st.floats(1, 1000))
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).tolist()
    start = draw(st.integers(-10, 100))
    return Oscillation(
        classes,
        amplitude if members is None else torch.linspace(1, amplitude, members, dtype=torch.float64),
        period,
        waveform=waveform,
        closed=closed,
        class_order=order if draw(st.booleans()) else None,
        start_step=start,
        stop_step=draw(st.none() | st.integers(start, 10**6)),
    )


@st.composite
def op_cases(draw: st.DrawFn) -> OpCase:
    """Shapes, dtypes, strides, targets, weights, masks, steps and options."""
    classes, seed = draw(st.sampled_from(CLASSES)), draw(st.integers(0, 2**20))
    most = max(1, min(70, 3000 // classes))
    rows = draw(st.integers(0, most))
    kind = draw(st.sampled_from(["matrix", "matrix", "one row", "image", "ensemble"]))
    members = draw(st.integers(1, 4)) if kind == "ensemble" else None
    inner = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=2))) if kind == "image" else ()
    lead = {"one row": (), "ensemble": (members or 0, rows)}.get(kind, (min(rows, 4) if inner else rows,))
    shape, samples = (*lead, classes, *inner), (*lead, *inner)
    dim = len(lead)

    dtype = draw(st.sampled_from(DTYPES))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0, 30.0, 1000.0]))
    logits = strided((spread * normal(*shape, seed=seed)).to(dtype), draw(st.sampled_from(STRIDES)))
    direction = strided(normal(*shape, seed=seed + 1, dtype=dtype), draw(st.sampled_from(STRIDES[:-1])))

    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    }
    shared = kind == "ensemble" and draw(st.booleans())
    own = samples[1:] if shared else samples
    if draw(st.integers(0, 3)) == 0:
        places = shape[1:] if shared else shape
        target = normal(*places, seed=seed + 2).softmax(dim - shared)
        target = strided(target.to(dtype), draw(st.sampled_from(STRIDES[:-1])))
    else:
        kept = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
        target = labels(min(classes, 256), *own, seed=seed + 2)
        options["ignore_index"] = draw(st.sampled_from([-100, 0, classes - 1, 255]))
        masked = torch.rand(own, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0, 0.3, 1]))
        if 0 <= options["ignore_index"] <= 255 or kept.is_signed:
            target = torch.where(masked, options["ignore_index"], target)
        target = target.to(kept) if target.dim() == 0 else strided(target, "sliced").to(kept)
    if options["reduction"] == "mean" and not target.is_floating_point():
        options["normalization"] = draw(st.sampled_from(["samples", "weights"]))
    if draw(st.booleans()):
        weight = normal(*([members] if members and draw(st.booleans()) else []), classes, seed=seed + 3).abs() + 0.01
        options["weight"] = weight.to(draw(st.sampled_from(DTYPES)))

    oscillation = draw(oscillations(classes, members))
    step: int | Tensor = draw(st.integers(-3, 10**4) | st.integers(0, 2**62))
    if oscillation.waveform != "function" and draw(st.booleans()):
        step = torch.tensor([step + e for e in range(members)] if members and draw(st.booleans()) else step)
    return OpCase(logits, target, oscillation, step, options, direction)


def check(case: OpCase) -> None:
    """AssertionError where anything differs from the twin by more than rounding."""
    target = case.target.double() if case.target.is_floating_point() else case.target.long()
    problem = (case.logits.double(), target, case.oscillation, case.step)
    options, dtype = case.options, case.dtype
    expected = reference.cross_entropy(*problem, **options)
    size = _size(case)
    loss_dtype = dtype if options["reduction"] == "none" else torch.promote_types(dtype, torch.float32)
    terms = case.logits.shape[0] if case.logits.dim() == 1 else case.logits.numel()

    x = case.logits.detach().requires_grad_()
    loss = dynamic_cross_entropy(x, case.target, case.oscillation, case.step, **options)
    assert loss.dtype == loss_dtype
    spread = max(1.0, float(problem[0].abs().max()) if problem[0].numel() else 0.0)
    _same(loss.detach(), expected, loss_dtype, terms, size * spread)
    wanted = reference.gradient(*problem, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    assert gradient.dtype == dtype
    _same(gradient, wanted, dtype, terms, size)
    both = loss_and_gradient(case.logits, case.target, case.oscillation, case.step, **options)
    _same(both[0], expected, loss_dtype, terms, size * spread)
    _same(both[1], wanted, dtype, terms, size)

    (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (product,) = torch.autograd.grad(first, x, case.direction)
    along = max(1.0, float(case.direction.abs().max()) if case.direction.numel() else 0.0)
    _same(product, reference.hvp(*problem, case.direction.double(), **options), dtype, terms, 2 * size * along)
    if not case.target.is_floating_point() and options["reduction"] != "none":
        _check_in_place(case, wanted, terms, size)


def _check_in_place(case: OpCase, wanted: Tensor, terms: int, size: float) -> None:
    if not isinstance(case.step, int) and case.step.dim() > 0:
        return
    criterion = DynamicCrossEntropyLoss(case.oscillation, inplace_gradient=True, **case.options)
    x = case.logits.detach().clone().requires_grad_()
    criterion(x * 1, case.target, case.step).sum().backward()
    _same(x.grad, wanted, case.dtype, terms, size)


def _size(case: OpCase) -> float:
    """What lse and the logit, or p and the target, are multiplied by before they cancel: in the worst member."""
    members, step = case.oscillation.ensemble_size, case.step
    factor = case.options.get("weight", torch.ones(())).double()
    if isinstance(step, Tensor) and step.dim() == 0:
        step = int(step)
    gamma = case.oscillation.weights(step)
    if gamma.dim() == 3:  # member e at step e
        gamma = gamma.diagonal().T
    gamma = (gamma * factor).view(members or 1, -1)
    if case.options["reduction"] != "mean" or 0 in case.logits.shape:
        return float(gamma.max())
    if case.target.is_floating_point():
        samples = case.logits.numel() // case.oscillation.num_classes // (members or 1)
        return float(gamma.max()) / samples
    target = case.target.long()
    target = target.reshape(1, -1) if members is None or target.dim() == 1 else target
    target = target.expand(len(gamma), -1)
    counted = target != case.options["ignore_index"]
    shares = torch.ones_like(target, dtype=torch.float64)
    if case.options["normalization"] == "weights":
        shares = gamma.gather(1, torch.where(counted, target, 0))
    total = (shares * counted).sum(1)
    return float(torch.where(total > 0, gamma.max(1).values / total, 0).max())


def _same(actual: Tensor, expected: Tensor, dtype: torch.dtype, terms: int, size: float) -> None:
    """`near`, with infinities and NaN, and what the dtype cannot hold, in the same places."""
    largest = torch.finfo(dtype).max
    expected = torch.where(expected.abs() > largest, expected.sign() * torch.inf, expected)
    finite = expected.isfinite() & actual.isfinite()
    beyond = ~finite & (expected.abs() < 0.99 * largest)
    assert not bool(beyond.any()), f"{actual[beyond]} instead of {expected[beyond]}"
    assert torch.equal(actual.isnan(), expected.isnan())
    near(torch.where(finite, actual, 0), torch.where(finite, expected, 0), dtype, terms, max(size, 1e-30))


def run(cases: int) -> None:
    """So many cases of hypothesis, which shrinks the first that fails."""

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(op_cases())
    def holds(case: OpCase) -> None:
        check(case)

    holds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, done = time.monotonic(), 0
    while done < options.cases and time.monotonic() - began < options.seconds:
        part = min(2000, options.cases - done)
        run(part)
        done += part
    command = f"python -m robustness.op_cases --cases {options.cases}"
    publish(options.out, command, seconds=round(time.monotonic() - began), cases=done, failures=0)


if __name__ == "__main__":
    main()
