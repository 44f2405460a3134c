"""The curvature at which an optimizer loses stability, and that curvature as the optimizer sees it.

On a quadratic of Hessian H an optimizer that divides by a diagonal P, held fixed, moves along the eigenvectors u of
P^(-1/2) H P^(-1/2) in the coordinates P^(1/2) x, each by itself: a recurrence in the eigenvalue λ. Where a root of its
characteristic polynomial leaves the unit circle is the limit (Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022,
arXiv:2207.14484).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dynloss_ext._batches import check_answer, weight_of
from dynloss_ext._checks import Parameters, check_callable, check_loss, check_params, named_tensors
from dynloss_ext.hessian import HessianOperator
from dynloss_ext.spectrum import Estimate

__all__ = ["batch_sharpness", "preconditioner", "stability_limit"]

_NAMES = {
    torch.optim.SGD: ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    torch.optim.Adam: ("lr", "betas", "weight_decay", "decoupled_weight_decay"),
    torch.optim.AdamW: ("lr", "betas", "weight_decay"),
    torch.optim.RMSprop: ("lr", "momentum", "weight_decay"),
}


def stability_limit(optimizer: torch.optim.Optimizer) -> float:
    """Largest curvature λ of a quadratic loss at which the optimizer still converges.

    With learning rate η, momentum β, dampening τ and weight decay w, for `torch.optim.SGD`, where λ is an eigenvalue
    of the Hessian H:

    * plain: 2/η - w,
    * heavy ball: 2(1 + β) / (η(1 - τ)) - w,
    * Nesterov: 2(1 + β) / (η(1 + 2β)) - w

    (Cohen et al. 2021, arXiv:2103.00065, extended by dampening and weight decay), and for those that divide by a
    diagonal P, where λ is an eigenvalue of P^(-1/2) H P^(-1/2) for a P that rests (see `preconditioner` and
    ``H.preconditioned``):

    * `Adam`, with `amsgrad` or not: (2 + 2β₁) / ((1 - β₁)η),
    * `AdamW`: (1 + β₁)(2 - ηw) / ((1 - β₁)η),
    * `RMSprop`: 2/η, with momentum (2 + 2β)/η

    (Cohen et al. 2022, arXiv:2207.14484, Section 2, extended by AdamW's decay and RMSprop's momentum). Adam's and
    RMSprop's own weight decay adds w x to the gradient before it is divided, which shifts no eigenvalue by a number:
    their limit is that of P^(-1/2) (H + w I) P^(-1/2), which ``H.preconditioned(diagonal, weight_decay=w)`` gives.

    A learning rate of 0 gives infinity. As in torch, dampening is ignored without momentum. Nesterov's form with
    β > 1 converges up to the limit too, but not below a curvature of (1 - 1/β)/η - w.

    Raises:
        ValueError: another optimizer, `maximize=True`, parameter groups that differ in these settings, for which no
            single number is the limit, or settings with which no curvature converges: heavy ball or RMSprop with
            β >= 1, β > 0 and τ >= 1, or AdamW with ηw >= 1 + 1/β₁.

    Example:
        >>> weights = [torch.zeros(1, requires_grad=True)]
        >>> stability_limit(torch.optim.SGD(weights, lr=0.5))
        4.0
        >>> stability_limit(torch.optim.SGD(weights, lr=0.5, momentum=0.5, nesterov=True))
        3.0
        >>> print(f"{stability_limit(torch.optim.Adam(weights, lr=1e-3)):.0f}")
        38000
    """
    names = _settings_of(optimizer)
    settings = {tuple(_plain(group.get(name, False)) for name in names) for group in optimizer.param_groups}
    if len(settings) != 1:
        raise ValueError(f"optimizer: expected equal {', '.join(names)}, got parameter groups that differ")
    own: dict[str, Any] = dict(zip(names, settings.pop(), strict=True))
    lr: float = own["lr"]
    decay: float = own["weight_decay"]
    if type(optimizer) is torch.optim.SGD:
        return _limit_of_sgd(lr, own["momentum"], own["dampening"], own["nesterov"]) - decay
    if type(optimizer) is torch.optim.RMSprop:
        return _limit_of_sgd(lr, own["momentum"], 0.0, False)
    beta: float = own["betas"][0]
    if not (type(optimizer) is torch.optim.AdamW or own["decoupled_weight_decay"]):
        decay = 0.0
    if beta * (lr * decay - 1) >= 1:
        raise ValueError(
            f"optimizer: expected lr * weight_decay below 1 + 1 / {beta} (no curvature converges else), got"
            f" {lr * decay}"
        )
    # x ← (1 - ηw) x - η m of m ← β₁ m + (1 - β₁) λ x: where a root is -1. The product of both is β₁ (1 - ηw).
    return (1 + beta) * (2 - lr * decay) / ((1 - beta) * lr) if lr > 0 else math.inf


def _limit_of_sgd(lr: float, momentum: float, dampening: float, nesterov: bool) -> float:
    """Without weight decay."""
    if momentum == 0:
        rate = lr
    elif nesterov:
        rate = lr * (1 + 2 * momentum)
    else:
        for name, value in (("momentum", momentum), ("dampening", dampening)):
            if not value < 1:
                raise ValueError(f"optimizer: expected a {name} below 1 (no curvature converges else), got {value}")
        rate = lr * (1 - dampening)
    return 2 * (1 + momentum) / rate if rate > 0 else math.inf


def preconditioner(optimizer: torch.optim.Optimizer, params: Parameters | None = None) -> list[Tensor]:
    """The diagonal P that the optimizer's last step divided by, as ``H.preconditioned`` takes it.

    With step t and moments m, v as torch keeps them, a step without weight decay is x ← x - η P⁻¹ m, where P is

    * of `Adam` and `AdamW`: (1 - β₁ᵗ) (√(v / (1 - β₂ᵗ)) + ε), both bias corrections included; with `amsgrad` the
      largest v so far (Cohen et al. 2022, arXiv:2207.14484, Section 2),
    * of `RMSprop`: √v + ε; √(v - ḡ²) + ε if ``centered``,
    * of `SGD`: 1.

    Args:
        optimizer: after at least one step, but for SGD.
        params: whose P, in which order, (name, tensor) pairs too: those that the operator was made with; by default
            all of the optimizer's, in its order.

    Returns:
        For each parameter a tensor of its shape and dtype: a copy, as the state goes on.

    Raises:
        ValueError: another optimizer, `maximize=True`, a parameter that is none of the optimizer's or for which there
            is no state yet, or groups with different learning rates: `stability_limit` has no number to compare
            with. Other settings may differ, each parameter's P is of its own group's.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> adam = torch.optim.Adam(model.parameters())
        >>> model(torch.ones(1, 2)).square().sum().backward()
        >>> adam.step()
        >>> P = preconditioner(adam, model.parameters())
        >>> H = HessianOperator(model(torch.ones(1, 2)).square().sum(), model.parameters())
        >>> H.preconditioned(P).shape
        (3, 3)
    """
    _settings_of(optimizer)
    rates = {_plain(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise ValueError(f"optimizer: expected one lr, got parameter groups with {sorted(rates)}")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = named_tensors(own if params is None else params)
    diagonal = []
    for label, p in zip(wanted.labels, wanted, strict=True):
        if id(p) not in groups:
            raise ValueError(f"{label}: expected a parameter of the optimizer, got another of shape {tuple(p.shape)}")
        state = optimizer.state.get(p, {})
        if type(optimizer) is torch.optim.SGD:
            diagonal.append(torch.ones_like(p, requires_grad=False))
        elif not state:
            raise ValueError(
                f"optimizer: expected the state of at least one step, got none for {label}: call optimizer.step() with"
                " gradients first, or leave out of params what has none"
            )
        else:
            diagonal.append(_divisor(groups[id(p)], state))
    return diagonal


def _divisor(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    if "square_avg" in state:
        variance = state["square_avg"]
        if group["centered"]:
            variance = variance.addcmul(state["grad_avg"], state["grad_avg"], value=-1)
        return torch.as_tensor(variance.sqrt() + group["eps"])
    step = float(state["step"])
    first, second = (1 - float(beta) ** step for beta in group["betas"])
    largest = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return torch.as_tensor(first * (largest.sqrt() / second**0.5 + group["eps"]))


def _settings_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of those that its limit depends on, if it is one of which that is known."""
    names = _NAMES.get(type(optimizer))
    if names is None:
        raise ValueError(
            "optimizer: expected a torch.optim.SGD, Adam, AdamW or RMSprop (no limit is known for others), got"
            f" {type(optimizer).__name__}"
        )
    if any(group["maximize"] for group in optimizer.param_groups):
        raise ValueError("optimizer: expected one that minimises, got maximize=True")
    return names


def _plain(value: Any) -> Any:
    """A setting, which torch also takes as a tensor, as a float, or several as a tuple."""
    return tuple(map(float, value)) if isinstance(value, tuple | list) else float(value)


def batch_sharpness(
    closure: Callable[[Any], tuple[Tensor, Tensor | float]],
    params: Parameters,
    batches: Iterable[Any],
    *,
    weighted: bool = False,
) -> Estimate:
    """The curvature of mini-batches along their own gradients, E[gᵀ H g / ‖g‖²], g and H of one batch's mean loss.

    Under stochastic gradient descent this, rather than the largest eigenvalue of the whole loss, comes up to
    2/learning rate (Andreyev and Beneventano, arXiv:2412.20553). A batch costs two forward passes, a recorded backward
    pass and one product; the memory is that of one batch's Hessian.

    Args:
        closure: batch -> (loss_sum, weight_sum), as in `HessianOperator.from_batches`; the batch's loss is their
            quotient. It runs as that of `HessianOperator`; BatchNorm in train mode is that of training.
        params: as in `HessianOperator`.
        batches: gone through once, so a generator too: drawn as those of training.
        weighted: each batch weighted by its ‖g‖²: E[gᵀ H g] / E[‖g‖²], which decides on the growth of E[‖g‖²] on a
            quadratic. Batches that are fitted already count little.

    Returns:
        The mean over batches, and its standard error as if they were drawn independently, that of a quotient of means
        to first order; NaN for a single batch.

    Raises:
        TypeError, ValueError: as by `HessianOperator`; there is no batch, or one whose gradient is 0 or not finite:
            it has no direction.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> scales = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])]
        >>> found = batch_sharpness(lambda scale: ((scale * x**2).sum(), 1), [x], scales)
        >>> print(f"{found.value:.1f} ± {found.stderr:.1f}")
        5.0 ± 3.0
    """
    check_callable("closure", closure)
    wanted = check_params(params)
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable, got {type(batches).__name__}")
    pairs = list(zip(wanted.labels, wanted, strict=True))
    found = [_sharpness_along_gradient(closure, pairs, batch) for batch in batches]
    if not found:
        raise ValueError("batches: expected at least one batch, got none")
    values, norms = torch.tensor(found, dtype=torch.float64, device="cpu").unbind(1)
    share = (norms / norms.max()).square() if weighted else torch.ones_like(norms)
    share /= share.sum()
    mean = share @ values
    variance = (share * (values - mean)).square().sum() * (
        len(found) / (len(found) - 1) if len(found) > 1 else math.nan
    )
    return Estimate(float(mean), float(variance.sqrt()))


def _sharpness_along_gradient(
    closure: Callable[[Any], tuple[Tensor, Tensor | float]], params: list[tuple[str, Tensor]], batch: Any
) -> tuple[float, float]:
    """uᵀ H u of the batch for the unit vector u along its gradient, and the length of that."""

    def mean_loss() -> Tensor:
        loss_sum, weight_sum = check_answer(closure(batch), ("loss_sum", "weight_sum"))
        weight = weight_of(weight_sum, check_loss(loss_sum, "loss_sum").device)
        if not 0 < weight < math.inf:
            raise ValueError(f"weight_sum: expected a finite number that is more than 0, got {float(weight)}")
        mean: Tensor = loss_sum / weight
        return mean

    H = HessianOperator(mean_loss, params)
    pieces = [torch.zeros_like(p) if g is None else g for g, (_, p) in zip(H.gradients, params, strict=True)]
    g = torch.cat([piece.detach().reshape(-1) for piece in pieces])
    norm = torch.linalg.vector_norm(g, dtype=torch.float64).item()
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(f"batches: expected gradients that are finite and not 0, got one of norm {norm}")
    direction = (g.double() / norm).to(g)
    return float(direction.double() @ (H @ direction).double()), norm
