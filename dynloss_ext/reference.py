"""Pure-torch twins of every op: the definition to read, and the oracle of the tests.

Nothing here calls the compiled code but to read an oscillation's description. The functions run in the dtype of their
arguments; pass float64 for a reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynloss_ext.oscillation import Oscillation

__all__ = ["cross_entropy", "gradient", "hvp", "third", "weights"]


def _raw_weight(waveform: str, amplitude: float, period: float, t: float) -> float:
    """g(t), t steps into the turn of the raised class."""
    if waveform == "square":
        return amplitude
    if waveform == "sine":
        return 1 + (amplitude - 1) * math.sin(math.pi * t / period)
    if t < period / 2:
        return 1 + 2 * (amplitude - 1) * t / period
    return 2 * amplitude - 1 - 2 * (amplitude - 1) * t / period


def weights(oscillation: Oscillation, step: int, member: int | None = None) -> Tensor:
    """Γ(step) of one oscillation, or of one member of an ensemble: (C,) float64."""
    config = oscillation.config()
    classes = config["num_classes"]
    pick = (lambda x: x) if member is None else (lambda x: x[member])
    stop = math.inf if config["stop_step"] is None else config["stop_step"]
    ones = torch.ones(classes, dtype=torch.float64)
    if oscillation.waveform == "function":
        return oscillation.evaluate_function(step)
    if not config["start_step"] <= step < stop:
        return ones
    elapsed = step - config["start_step"]
    if config["table"] is not None:
        table = torch.tensor(pick(config["table"]), dtype=torch.float64)
        return table[elapsed % len(table)]
    amplitude, period = pick(config["amplitude"]), pick(config["period"])
    turns, t = divmod(elapsed, period + 1 if config["closed"] else period)
    active = int(turns) % classes
    if config["class_order"] is not None:
        active = config["class_order"][active]
    g = ones.clone()
    g[active] = _raw_weight(config["waveform"], amplitude, period, t)
    return classes * g / g.sum()


def _rows(x: Tensor) -> Tensor:
    """Logits-like (C,), (N, C) or (N, C, d1, ...) with the classes moved last."""
    return x.movedim(0 if x.dim() == 1 else 1, -1)


def _back(x: Tensor) -> Tensor:
    return x.movedim(-1, 0 if x.dim() == 1 else 1)


def _soft_targets(
    logits: Tensor, target: Tensor, gamma: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """q_c = Γ_c ((1-ε) [c = y] + ε/C) per row, zero for ignored rows, and which rows count."""
    classes = gamma.shape[0]
    counted = target != ignore_index
    label = torch.where(counted, target, 0).long()
    q = torch.nn.functional.one_hot(label, classes).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
    return q * gamma.to(logits) * counted.unsqueeze(-1), counted


def _normalizer(target: Tensor, gamma: Tensor, counted: Tensor, reduction: str, normalization: str) -> Tensor:
    if reduction != "mean":
        return torch.ones((), dtype=torch.float64, device=target.device)
    if normalization == "samples":
        return counted.sum().double()
    return gamma.to(target.device)[torch.where(counted, target, 0).long()].mul(counted).sum()


def _per_member(function, logits, target, oscillation, step, *directions, **options):  # type: ignore[no-untyped-def]
    """Applies a single-problem function to each member of an ensemble."""
    members = oscillation.ensemble_size
    steps = step.tolist() if isinstance(step, Tensor) else step
    if members is None:
        return function(logits, target, weights(oscillation, int(steps)), *directions, **options)
    results = []
    for e in range(members):
        gamma = weights(oscillation, steps[e] if isinstance(steps, list) else steps, e)
        own = target[e] if target.dim() == 2 else target
        results.append(function(logits[e], own, gamma, *(d[e] for d in directions), **options))
    return torch.stack(results)


def _loss(logits, target, gamma, *, reduction, normalization, ignore_index, label_smoothing):  # type: ignore[no-untyped-def]
    q, counted = _soft_targets(logits, target, gamma, ignore_index, label_smoothing)
    log_p = torch.log_softmax(_rows(logits), -1)
    # An ignored row contributes nothing even where it holds NaN; 0 · inf is not 0.
    terms = torch.where(counted.unsqueeze(-1) & (q != 0), -q * log_p, 0.0 * torch.where(q != 0, log_p, 0.0))
    loss = torch.where(counted, terms.sum(-1), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / _normalizer(target, gamma, counted, reduction, normalization).to(loss)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    *,
    reduction: str = "mean",
    normalization: str = "samples",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Σ_c q_c (lse - z_c) per row, q_c = Γ_c ((1-ε) [c = y] + ε/C), then reduced; differentiable by autograd."""
    result: Tensor = _per_member(
        _loss, logits, target, oscillation, step, reduction=reduction, normalization=normalization,
        ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    return result


def _derivative(logits, target, gamma, *directions, reduction, normalization, ignore_index, label_smoothing):  # type: ignore[no-untyped-def]
    q, counted = _soft_targets(logits, target, gamma, ignore_index, label_smoothing)
    total = q.sum(-1, keepdim=True)
    p = torch.softmax(_rows(logits), -1)

    def mean(x: Tensor) -> Tensor:
        return (p * x).sum(-1, keepdim=True)

    if len(directions) == 0:
        rows = total * p - q
    elif len(directions) == 1:
        v = _rows(directions[0])
        rows = total * p * (v - mean(v))
    else:
        u, v = _rows(directions[0]), _rows(directions[1])
        rows = total * p * (u * v - mean(u * v) - mean(v) * (u - mean(u)) - mean(u) * (v - mean(v)))
    rows = torch.where(counted.unsqueeze(-1), rows, 0.0)
    return _back(rows / _normalizer(target, gamma, counted, reduction, normalization).to(rows))


def gradient(logits: Tensor, target: Tensor, oscillation: Oscillation, step: int | Tensor, *, reduction: str = "mean",
             normalization: str = "samples", ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """Gradient of the (summed) loss in the logits: Q p - q per row, over the normalizer."""
    result: Tensor = _per_member(
        _derivative, logits, target, oscillation, step, reduction=reduction, normalization=normalization,
        ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    return result


def hvp(logits: Tensor, target: Tensor, oscillation: Oscillation, step: int | Tensor, v: Tensor, *,
        reduction: str = "mean", normalization: str = "samples", ignore_index: int = -100,
        label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """Hessian of the (summed) loss in the logits times v: Q (p∘v - p (p·v)) per row, over the normalizer."""
    result: Tensor = _per_member(
        _derivative, logits, target, oscillation, step, v, reduction=reduction, normalization=normalization,
        ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    return result


def third(logits: Tensor, target: Tensor, oscillation: Oscillation, step: int | Tensor, u: Tensor, v: Tensor, *,
          reduction: str = "mean", normalization: str = "samples", ignore_index: int = -100,
          label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """Third derivative of the (summed) loss in the logits, applied to u and v."""
    result: Tensor = _per_member(
        _derivative, logits, target, oscillation, step, u, v, reduction=reduction, normalization=normalization,
        ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    return result
