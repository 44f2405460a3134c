"""
Resuming a run
==============

A run that was killed goes on exactly, with the same bits, if everything that it depends on is saved: the model, the
optimizer, the *step of the loss* (part of the criterion's ``state_dict``: Γ goes on in the middle of its turn) and the
*tracker* (its last eigenvectors, and when the next audit is due).
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dynloss_ext import DynamicCrossEntropyLoss, EigenTracker, HessianOperator, Oscillation, plot

torch.set_num_threads(1)
labels = torch.arange(3).repeat(60)
inputs = torch.randn(180, 2, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(3, 2)[labels]


class Run:
    """Everything that changes, in one place."""

    def __init__(self, amplitude: float = 40) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
        self.criterion = DynamicCrossEntropyLoss(Oscillation(num_classes=3, amplitude=amplitude, period=100))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.8, momentum=0.5)
        self.tracker = EigenTracker(k=3)
        self.parts = {name: getattr(self, name) for name in ("model", "criterion", "optimizer", "tracker")}

    def train(self, steps: int) -> torch.Tensor:
        """(steps, 3) eigenvalues."""
        values = []
        for _ in range(steps):
            H = HessianOperator(self.criterion(self.model(inputs), labels), self.model.named_parameters())
            values.append(self.tracker.update(H).values)
            for p, gradient in zip(self.model.parameters(), H.gradients, strict=True):
                p.grad = gradient.detach().clone()
            self.optimizer.step()
            self.criterion.step()
        return torch.stack(values)

    def save(self, path: Path) -> None:
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)  # nothing in it is code
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


# %%
# One run of 300 steps; one of 130, which is saved; and one that loads it, in the middle of a turn.

undisturbed = Run().train(300)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pt"
    killed = Run()
    before = killed.train(130)
    killed.save(path)
    resumed = Run()
    resumed.load(path)
    after = resumed.train(170)
    print(f"the same bits: {torch.equal(undisturbed, torch.cat([before, after]))}")

    forgetful = Run()
    forgetful.load(path)
    forgetful.criterion.set_step(0)  # what happens without the criterion's state
    wrong = forgetful.train(170)
    print(f"without the loss's step, λ₁ is off by up to {(wrong - after)[:, 0].abs().max():.2f}")

    # A checkpoint of another schedule is refused, with the difference named.
    try:
        Run(amplitude=70).load(path)
    except RuntimeError as error:
        print(str(error).splitlines()[-1].strip())

plt.style.use(plot.STYLE)
figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
axis.plot(undisturbed[:, 0], color="#cccccc", lw=5, label="undisturbed")
axis.plot(range(130), before[:, 0], color=plot.CLASS_COLOURS[0], label="until it was killed")
axis.plot(range(130, 300), after[:, 0], color=plot.CLASS_COLOURS[2], label="resumed")
axis.plot(range(130, 300), wrong[:, 0], "--", color=plot.CLASS_COLOURS[5], label="resumed without the loss's step")
axis.set(xlabel="step", ylabel=r"largest Hessian eigenvalue $\lambda_1$")
figure.legend(loc="outside upper center", ncols=4)
plt.show()

# %%
# Exact means: on the same machine, with the same number of threads and the same version of torch. A training with
# random batches or dropout has to save torch's random state and its place in the data, too.
