"""What the loss is timed against: a training step's forward and backward pass, Γ(step) included, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dynloss_ext

AMPLITUDE, PERIOD = 70.0, 100


@dataclass(frozen=True)
class Case:
    """Logits (samples, classes) of one dtype."""

    samples: int
    classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.samples}x{self.classes}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(300, 3, torch.float32),
    Case(512, 10, torch.float32),
    Case(65536, 10, torch.float32),
    Case(4096, 1000, torch.float32),
    Case(512, 32000, torch.float32),
    Case(65536, 10, torch.bfloat16),
    Case(4096, 1000, torch.bfloat16),
]

_CLASSES = torch.arange(max(case.classes for case in CASES))


def eager_weights(step: int, classes: int) -> Tensor:
    """Γ(step) as a user would write it in PyTorch: (C,) float32."""
    t, active = step % PERIOD, step // PERIOD % classes
    rise = 2 * (AMPLITUDE - 1) * t / PERIOD
    g = 1 + rise if t < PERIOD / 2 else 2 * AMPLITUDE - 1 - rise
    raw = torch.where(_CLASSES[:classes] == active, g, 1.0)
    return classes * raw / raw.sum()


def _eager_loss(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float(), target, reduction="none")
    return (gamma[target] * losses).mean()


def _torch_loss(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight=gamma.to(logits.dtype), reduction="none").mean()


def contenders(case: Case) -> dict[str, Callable[[], object]]:
    """Callables that each do one forward and backward pass (or, for the floors, what bounds it) at a new step.

    A compiled contender is compiled anew for each case, with static shapes.
    """
    torch.manual_seed(0)
    logits = torch.randn(case.samples, case.classes).to(case.dtype).requires_grad_()
    target = torch.randint(case.classes, (case.samples,))
    detached, copy = logits.detach(), torch.empty_like(logits)
    oscillation = dynloss_ext.Oscillation(case.classes, AMPLITUDE, PERIOD)
    torch.compiler.reset()
    compiled = torch.compile(_eager_loss, fullgraph=True, dynamic=False)
    step = 0

    def training_step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            nonlocal step
            step += 1
            logits.grad = None
            loss().backward()

        return run

    def gradient_only() -> None:
        dynloss_ext.loss_and_gradient(detached, target, oscillation, step)

    return {
        "ours": training_step(lambda: dynloss_ext.dynamic_cross_entropy(logits, target, oscillation, step)),
        "eager": training_step(lambda: _torch_loss(logits, target, eager_weights(step, case.classes))),
        "compile": training_step(lambda: compiled(logits, target, eager_weights(step, case.classes))),
        "loss_and_gradient": gradient_only,
        "copy": lambda: copy.copy_(detached),
        "autograd floor": training_step(lambda: logits.sum()),
    }
