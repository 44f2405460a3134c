"""
The oscillating weights on any per-sample loss
==============================================

The fused op is the cross-entropy's. The idea is not: whatever loss your samples have, one number each, multiply it by
the weight of the sample's class and take the mean. Γ(step) comes from ``Oscillation.weights``, as float64 on the CPU.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

from dynloss_ext import EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy, plot

torch.set_num_threads(1)
oscillation = Oscillation(num_classes=3, amplitude=40, period=100)


def oscillating(per_sample: Tensor, labels: Tensor, step: int) -> Tensor:
    """The mean of the samples' losses (N,) under the weights of their classes."""
    gamma = oscillation.weights(step).to(per_sample)
    return (gamma[labels] * per_sample).mean()


# %%
# Two losses for it, each a number per sample: squared error against one-hot targets, and focal loss, whose
# cross-entropy counts less for samples that the network is sure of.


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - functional.one_hot(labels, 3)).square().sum(1)


def focal(outputs: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    cross_entropy = functional.cross_entropy(outputs, labels, reduction="none")
    return (1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy


logits, target = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
ours = dynamic_cross_entropy(logits, target, oscillation, 30)
plain = oscillating(focal(logits, target, 0.0), target, 30)
print(f"focal loss with exponent 0: {plain:.6f}, the fused op: {ours:.6f}")

# %%
# Autograd differentiates such a loss as often as it can differentiate yours, so that curvature comes along.

labels = torch.arange(3).repeat(60)
inputs = torch.randn(180, 2, generator=torch.Generator().manual_seed(1)) + torch.eye(3, 2)[labels] * 2
plt.style.use(plot.STYLE)
figure, axes = plt.subplots(2, 2, figsize=(8, 4), sharex=True, layout="constrained")
for column, (name, loss_of, lr) in enumerate([("squared error", squared_error, 0.1), ("focal loss", focal, 1.0)]):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    optimizer, tracker = torch.optim.SGD(model.parameters(), lr=lr), EigenTracker(k=1)
    by_class, values = [], []
    for step in range(600):
        per_sample = loss_of(model(inputs), labels)
        loss = oscillating(per_sample, labels, step)
        values.append(tracker.update(HessianOperator(loss, model.parameters())).values[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_class.append(per_sample.detach().view(60, 3).mean(0))
    above, below = axes[:, column]
    for i, curve in enumerate(torch.stack(by_class).T):
        above.semilogy(curve, color=plot.CLASS_COLOURS[i], label=f"class {i}")
    below.plot(values, color="black")
    below.axhline(2 / lr, color=plot.STOP_COLOUR, ls=":", label="2 / learning rate")
    above.set_title(name)
    below.set_xlabel("step")
    print(f"{name}: λ₁ from {min(values):.2f} to {max(values):.2f}, 2 / lr = {2 / lr:g}, loss {per_sample.mean():.4f}")
axes[0, 0].set_ylabel("mean loss, unweighted")
axes[1, 0].set_ylabel(r"$\lambda_1$ of the weighted loss")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
axes[1, 0].legend()
plt.show()

# %%
# Turn by turn another class is learned at the others' cost, whichever the loss. The heights of the two columns are
# not to be compared: the losses have other units, and so have their curvatures and learning rates.
