"""Pure-torch twins of every op: the definition to read, and the oracle of the tests.

Nothing here calls the compiled code. The functions run in the dtype of their arguments: pass float64 for a reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from dynloss_ext.oscillation import Oscillation

__all__ = [
    "cross_entropy",
    "gradient",
    "hvp",
    "perceptron_gradient",
    "perceptron_hvp",
    "perceptron_loss",
    "perceptron_train",
    "third",
    "weights",
]


# ---- Γ(step)


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
    """Γ(step) of one oscillation, or of one member of an ensemble: (C,) float64.

    Example:
        >>> weights(Oscillation(3, amplitude=70, period=5000), 2500)
        tensor([2.9167, 0.0417, 0.0417], dtype=torch.float64)
    """

    def of_member(values: Any) -> Any:
        return values if member is None else values[member]

    config = oscillation.config()
    classes = config["num_classes"]
    stop = config["stop_step"]
    stop = math.inf if stop is None else float(of_member(stop)) if isinstance(stop, Tensor) else stop
    g: Tensor = torch.ones(classes, dtype=torch.float64)
    if oscillation.waveform == "function":
        return oscillation.evaluate_function(step)
    if not config["start_step"] <= step < stop:
        return g
    elapsed = step - config["start_step"]
    if config["table"] is not None:
        table = of_member(config["table"])
        row: Tensor = table[elapsed % len(table)]
        return row
    amplitude, period = float(of_member(config["amplitude"])), float(of_member(config["period"]))
    turns, t = divmod(elapsed, Fraction(period + 1 if config["closed"] else period))  # exact
    active = turns % classes
    if config["class_order"] is not None:
        active = int(config["class_order"][active])
    g[active] = _raw_weight(config["waveform"], amplitude, period, float(t))
    gamma: Tensor = classes * g / g.sum()
    return gamma


# ---- one problem: logits (C,), (N, C) or (N, C, d1, ...) and gamma (C,)


def _classes_last(x: Tensor) -> Tensor:
    return x.movedim(0 if x.dim() == 1 else 1, -1)


class _Problem:
    """q_c = Γ_c ((1-ε) t_c + ε/C) per row, zero in ignored rows, and what the loss is divided by.

    Γ_c is given times the weight of the class; t_c are the target's probabilities, or [c = y] for class indices.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        gamma: Tensor,
        *,
        reduction: str,
        normalization: str,
        ignore_index: int,
        label_smoothing: float,
    ) -> None:
        gamma = gamma.to(logits)
        z = _classes_last(logits)
        # Logits relative to a class that attains the maximum: all that follows is a function of these differences,
        # so that no derivative is the small remainder of numbers that cancel, not even where p is rounded to 1.
        self.top = torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.detach().argmax(-1, keepdim=True), True)
        at_top = self.at_top(z)
        self.z = torch.where(self.top, 0.0 * at_top.detach(), z - at_top)  # NaN for an infinite maximum
        self.soft_target = target.is_floating_point()
        if self.soft_target:
            label, probabilities = torch.zeros_like(z[..., 0]).long(), _classes_last(target).to(logits)
            self.counted = torch.ones_like(label, dtype=torch.bool)
        else:
            self.counted = target != ignore_index
            label = torch.where(self.counted, target, 0).long()
            probabilities = (label.unsqueeze(-1) == torch.arange(len(gamma), device=target.device)).to(logits)
        soft = (1 - label_smoothing) * probabilities + label_smoothing / len(gamma)
        self.q = gamma * soft * self.counted.unsqueeze(-1)
        self.normalizer: Tensor | float = 1.0
        if reduction == "mean":
            self.normalizer = (
                (gamma[label] if normalization == "weights" else torch.ones_like(self.z[..., 0]))
                .mul(self.counted)
                .sum()
            )
        self.reduce = reduction != "none"

    def at_top(self, x: Tensor) -> Tensor:
        """The values (..., 1) at the class that attains the maximum."""
        picked: Tensor = torch.where(self.top, x, 0.0).sum(-1, keepdim=True)
        return picked

    def rest(self) -> Tensor:
        """Σ exp(z) over the other classes: one less than the sum."""
        rest: Tensor = torch.where(self.top, self.z * 0.0, self.z.exp()).sum(-1, keepdim=True)
        return rest

    def loss(self) -> Tensor:
        log_p = self.z - torch.log1p(self.rest())
        # A class without weight and an ignored row contribute nothing, not even 0 · inf; with probabilities, as torch.
        rows = torch.where((self.q != 0) | self.soft_target, -self.q * log_p, 0.0).sum(-1)
        unweighted_nan = self.counted & log_p.isnan().any(-1)
        rows = torch.where(unweighted_nan, math.nan, rows)
        return rows.sum() / self.normalizer if self.reduce else rows

    def derivative(self, *directions: Tensor) -> Tensor:
        """The gradient, or the Hessian or third derivative contracted with one or two directions."""
        p = self.z.exp() / (1 + self.rest())
        total = self.q.sum(-1, keepdim=True)

        def mean(x: Tensor) -> Tensor:
            weighted: Tensor = p * x
            return weighted.sum(-1, keepdim=True)

        def relative(x: Tensor) -> Tensor:
            x = _classes_last(x)
            return x - self.at_top(x)

        if len(directions) == 0:
            rows = total * p - self.q
            others = torch.where(self.top, 0.0, rows).sum(-1, keepdim=True)
            rows = torch.where(self.top, -others, rows)  # they add up to 0
        elif len(directions) == 1:
            v = relative(directions[0])
            rows = total * p * (v - mean(v))
        else:
            u, v = (relative(x) for x in directions)
            rows = total * p * (u * v - mean(u * v) - mean(v) * (u - mean(u)) - mean(u) * (v - mean(v)))
        rows = torch.where(self.counted.unsqueeze(-1), rows / self.normalizer, 0.0)
        return rows.movedim(-1, 0 if rows.dim() == 1 else 1)


def _per_member(
    function: Callable[[_Problem, tuple[Tensor, ...]], Tensor],
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    directions: tuple[Tensor, ...],
    options: dict[str, Any],
) -> Tensor:
    """Applies `function` to the one problem, or to each member of an ensemble."""
    steps: Any = step.tolist() if isinstance(step, Tensor) else step
    weight = options.pop("weight")
    weight = 1.0 if weight is None else weight.double()
    if oscillation.ensemble_size is None:
        return function(_Problem(logits, target, weights(oscillation, steps) * weight, **options), directions)
    results = []
    for e in range(oscillation.ensemble_size):
        gamma = weights(oscillation, steps[e] if isinstance(steps, list) else steps, e)
        gamma = gamma * (weight[e] if isinstance(weight, Tensor) and weight.dim() == 2 else weight)
        shared = target.dim() == (2 if target.is_floating_point() else 1)
        problem = _Problem(logits[e], target if shared else target[e], gamma, **options)
        results.append(function(problem, tuple(x[e] for x in directions)))
    return torch.stack(results)


# ---- the ops of the loss


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalization: str = "samples",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Σ_c q_c (lse - z_c) per row, reduced. Twin of :func:`dynloss_ext.dynamic_cross_entropy`; autograd works.

    The target holds class indices or probabilities.
    """
    options: dict[str, Any] = {
        "weight": weight,
        "reduction": reduction,
        "normalization": normalization,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    return _per_member(lambda problem, _: problem.loss(), logits, target, oscillation, step, (), options)


def _derivative(
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    directions: tuple[Tensor, ...],
    options: dict[str, Any],
) -> Tensor:
    defaults: dict[str, Any] = {"weight": None, "reduction": "mean", "normalization": "samples"}
    defaults |= {"ignore_index": -100, "label_smoothing": 0.0}
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"unexpected keywords {sorted(unknown)}, expected {sorted(defaults)}")
    return _per_member(
        lambda problem, along: problem.derivative(*along),
        logits,
        target,
        oscillation,
        step,
        directions,
        {**defaults, **options},
    )


def gradient(logits: Tensor, target: Tensor, oscillation: Oscillation, step: int | Tensor, **options: Any) -> Tensor:
    """Gradient of the (summed) loss in the logits, Q p - q per row; keywords as for :func:`cross_entropy`."""
    return _derivative(logits, target, oscillation, step, (), options)


def hvp(
    logits: Tensor, target: Tensor, oscillation: Oscillation, step: int | Tensor, v: Tensor, **options: Any
) -> Tensor:
    """Hessian of the (summed) loss in the logits times v, Q (p∘v - p (p·v)) per row."""
    return _derivative(logits, target, oscillation, step, (v,), options)


def third(
    logits: Tensor, target: Tensor, oscillation: Oscillation, step: int | Tensor, u: Tensor, v: Tensor, **options: Any
) -> Tensor:
    """Third derivative of the (summed) loss in the logits, contracted with u and v."""
    return _derivative(logits, target, oscillation, step, (u, v), options)


# ---- the ops of the perceptrons, of one member each: parameters (P,) are w1, b1, w2, b2 one after the other


def perceptron_loss(
    parameters: Tensor,
    inputs: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int,
    *,
    hidden: int,
    activation: str = "relu",
    member: int | None = None,
) -> Tensor:
    """The mean loss of act(x @ w1 + b1) @ w2 + b2 at the weights Γ(step) of the oscillation, or of its member."""
    features, classes = inputs.shape[1], oscillation.num_classes
    sizes = [features * hidden, hidden, hidden * classes, classes]
    w1, b1, w2, b2 = torch.split(parameters, sizes)
    values = inputs @ w1.view(features, hidden) + b1
    logits = (values.relu() if activation == "relu" else values.tanh()) @ w2.view(hidden, classes) + b2
    options: dict[str, Any] = {"reduction": "mean", "normalization": "samples"}
    gamma = weights(oscillation, step, member)
    return _Problem(logits, target, gamma, **options, ignore_index=-100, label_smoothing=0.0).loss()


def perceptron_gradient(parameters: Tensor, *problem: Any, **options: Any) -> Tensor:
    """Gradient (P,) of :func:`perceptron_loss`, whose other arguments follow, by autograd."""
    x = parameters.detach().requires_grad_()
    return torch.autograd.grad(perceptron_loss(x, *problem, **options), x)[0]


def perceptron_hvp(parameters: Tensor, v: Tensor, *problem: Any, **options: Any) -> Tensor:
    """Its Hessian times v (P,), by autograd."""
    x = parameters.detach().requires_grad_()
    (first,) = torch.autograd.grad(perceptron_loss(x, *problem, **options), x, create_graph=True)
    return torch.autograd.grad(first, x, v)[0]


def perceptron_train(
    parameters: Tensor,
    inputs: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    num_steps: int,
    *,
    lr: float,
    momentum: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The parameters after steps 0 to num_steps - 1 of gradient descent, and the loss after each of them."""
    losses, velocity = [], torch.zeros_like(parameters)
    for step in range(num_steps):
        velocity = momentum * velocity + perceptron_gradient(parameters, inputs, target, oscillation, step, **options)
        parameters = parameters - lr * velocity
        losses.append(perceptron_loss(parameters, inputs, target, oscillation, step + 1, **options))
    return parameters, torch.stack(losses)
