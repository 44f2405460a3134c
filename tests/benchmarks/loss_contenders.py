"""What the loss is timed against: a training step's forward and backward pass, Γ(step) included, step by step.

On CUDA also the fused losses of Liger (`liger-kernel`), quack (`quack-kernels`) and NVIDIA's apex, where they are
installed: each gets Γ(step) as its class weights, as a user of it would have to do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

    @property
    def bytes(self) -> int:
        return self.samples * self.classes * self.dtype.itemsize


CASES = {
    "cpu": [
        Case(300, 3, torch.float32),
        Case(512, 10, torch.float32),
        Case(65536, 10, torch.float32),
        Case(4096, 1000, torch.float32),
        Case(512, 32000, torch.float32),
        Case(65536, 10, torch.bfloat16),
        Case(4096, 1000, torch.bfloat16),
    ],
    # The same and what exceeds the L2 cache.
    "cuda": [
        Case(300, 3, torch.float32),
        Case(512, 10, torch.float32),
        Case(65536, 10, torch.float32),
        Case(65536, 10, torch.bfloat16),
        Case(4096, 1000, torch.float32),
        Case(4096, 1000, torch.bfloat16),
        Case(8192, 32000, torch.float32),
        Case(8192, 32000, torch.bfloat16),
        Case(4096, 128256, torch.bfloat16),
        Case(131072, 1000, torch.float32),
        Case(131072, 1000, torch.bfloat16),
        Case(4_000_000, 10, torch.float32),
        Case(20_000_000, 3, torch.float32),
        Case(1_000_000, 100, torch.float32),
    ],
}

#: Peers that may be missing, or refuse a case: what has to be importable for each.
PEERS = {
    "liger": "liger_kernel.transformers.functional",
    "quack": "quack.cross_entropy",
    "apex": "apex.contrib.xentropy",
}


@dataclass(frozen=True)
class Contender:
    """`run` does `calls` passes, each at a new step."""

    run: Callable[[], object]
    calls: int = 1


class Steps:
    """Logits and labels of a case, and the step that a training loop has come to."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        # On CUDA so many logits by turns that none is still in the L2 cache when it is met again.
        copies = max(1, min(16, (256 << 20) // case.bytes)) if device == "cuda" else 1
        self.case = case
        self.logits = [
            torch.randn(case.samples, case.classes, device=device).to(case.dtype).requires_grad_()
            for _ in range(copies)
        ]
        self.detached = [x.detach() for x in self.logits]
        self.target = torch.randint(case.classes, (case.samples,), device=device)
        self._class_numbers = torch.arange(case.classes, device=device)
        self.step = 0

    def advance(self) -> int:
        """Goes to the next step; which of the logits it uses."""
        self.step += 1
        return self.step % len(self.logits)

    def eager_weights(self) -> Tensor:
        """Γ(step) as a user would write it in PyTorch: (C,) float32."""
        classes = self.case.classes
        t, active = self.step % PERIOD, self.step // PERIOD % classes
        rise = 2 * (AMPLITUDE - 1) * t / PERIOD
        g = 1 + rise if t < PERIOD / 2 else 2 * AMPLITUDE - 1 - rise
        raw = torch.where(self._class_numbers == active, g, 1.0)
        return classes * raw / raw.sum()

    def training_step(self, loss: Callable[[Tensor], Tensor]) -> Contender:
        def run() -> None:
            logits = self.logits[self.advance()]
            logits.grad = None
            loss(logits).backward()

        return Contender(run)


def _loss_for_compile(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float(), target, reduction="none")
    return (gamma[target] * losses).mean()


def _torch_loss(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight=gamma.to(logits.dtype), reduction="none").mean()


def _peer_loss(name: str, module: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A peer's loss of (logits, target, Γ): the mean over the samples, not over Σ Γ as theirs would be."""

    def liger(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
        loss: Tensor = module.liger_cross_entropy(logits, target, weight=gamma, reduction="sum")
        return loss / target.numel()

    def quack(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
        loss: Tensor = module.cross_entropy(logits, target, weight=gamma, reduction="sum")
        return loss / target.numel()

    def apex(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
        half = logits.dtype in (torch.float16, torch.bfloat16)
        losses: Tensor = module.SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100, half)
        return (gamma[target] * losses).mean()

    return {"liger": liger, "quack": quack, "apex": apex}[name]


def _peers(steps: Steps) -> dict[str, Contender | str]:
    """The peers of CUDA; one that cannot be imported is "not installed"."""
    result: dict[str, Contender | str] = {}
    for name, path in PEERS.items():
        try:
            loss = _peer_loss(name, importlib.import_module(path))
        except Exception as error:  # also of a peer that this torch or this GPU does not suit
            result[name] = f"not installed ({type(error).__name__}: {error})"
            continue
        own = steps
        if name == "liger":  # writes its gradient over the logits
            own = Steps(steps.case, "cuda")
        result[name] = own.training_step(lambda x, loss=loss, own=own: loss(x, own.target, own.eager_weights()))
    return result


def _kernel(steps: Steps, oscillation: dynloss_ext.Oscillation, calls: int = 20) -> Contender:
    """The one launch of ours without the host's share: a captured graph of several calls."""
    clock, class_order, table = oscillation.on(steps.target.device)
    options = (2, False, -100, 0.0)  # a sum over the samples

    def call() -> None:
        logits = steps.detached[steps.advance()]
        torch.ops.dynloss.cross_entropy_with_gradient(
            logits, steps.target, steps.step, None, clock, class_order, table, None, *options, True
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return Contender(graph.replay, calls)


def contenders(case: Case, device: str = "cpu") -> dict[str, Contender | str]:
    """What does one forward and backward pass (or, for the floors, what bounds it) at a new step, by name.

    A compiled contender is compiled anew for each case, with static shapes. In the place of a peer that is missing
    there is the reason.
    """
    steps = Steps(case, device)
    copy = torch.empty_like(steps.logits[0])
    oscillation = dynloss_ext.Oscillation(case.classes, AMPLITUDE, PERIOD)
    torch.compiler.reset()
    compiled = torch.compile(_loss_for_compile, fullgraph=True, dynamic=False)

    def ours(logits: Tensor) -> Tensor:
        return dynloss_ext.dynamic_cross_entropy(logits, steps.target, oscillation, steps.step)

    def gradient_only() -> None:
        dynloss_ext.loss_and_gradient(steps.detached[steps.advance()], steps.target, oscillation, steps.step)

    result: dict[str, Contender | str] = {
        "ours": steps.training_step(ours),
        "eager": steps.training_step(lambda x: _torch_loss(x, steps.target, steps.eager_weights())),
        "compile": steps.training_step(lambda x: compiled(x, steps.target, steps.eager_weights())),
        "loss_and_gradient": Contender(gradient_only),
        "copy": Contender(lambda: copy.copy_(steps.detached[steps.advance()])),
        "autograd floor": steps.training_step(lambda x: x.sum()),
    }
    if device == "cuda":
        result |= _peers(steps)
        result["kernel"] = _kernel(steps, oscillation)
    return result
