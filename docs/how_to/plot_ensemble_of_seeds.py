"""
λ at every step, over many seeds
================================

One run shows what can happen, twenty show what does. ``PerceptronEnsemble`` trains networks of one hidden layer side by
side, in compiled code, and gives the largest eigenvalue of every member's Hessian without Python between the products.
Here twelve networks learn the spirals of the paper under the dynamical loss, and λ₁ is measured at every step around
the moment at which another class is raised.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from dynloss_ext import Oscillation, PerceptronEnsemble, detect_instabilities, plot

torch.set_num_threads(1)
random = np.random.RandomState(0)
radius, arm = np.linspace(0, 1, 60), np.arange(3)[:, None]
angle = 2 * np.pi * arm / 3 + 4 * np.pi * radius + 0.2 * random.randn(3, 60)
inputs = torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 2))
labels = torch.arange(3).repeat_interleave(60)

# %%
# A search starts from the last eigenvectors (``start=``), which costs a few products a step, and every fiftieth looks
# for what they could have missed (``audit=``).

oscillation = Oscillation(3, amplitude=70, period=1000)
ensemble = PerceptronEnsemble(inputs, labels, oscillation, hidden=60, lr=1.0, seeds=range(12))
limit = 2 / 1.0
ensemble.train(7700)
steps = range(7700, 8500)
found, rows, losses, products = None, [], [], 0
for step in steps:
    found = ensemble.eigenvalues(k=1, start=found, vectors=True, audit=step % 50 == 0)
    rows.append(found.values[:, 0])
    products += int(found.num_hvp.sum())
    losses.append(ensemble.train(1).weighted_loss[0])
sharpness, losses = torch.stack(rows), torch.stack(losses)  # (steps, seeds)
print(f"{products / sharpness.numel():.1f} products a step and network, all finite: {bool(ensemble.finite.all())}")
above = (sharpness > limit).double().mean(0)
print(f"share of the steps with λ₁ > 2/lr: {above.mean():.3f}, of single seeds {above.min():.3f} to {above.max():.3f}")
pairs = []
for loss, values in zip(losses.T, sharpness.T, strict=True):
    start = detect_instabilities(steps, loss, steps, values, period=1000)[0].start - steps[0]
    pairs.append(values[start : start + 2])
pairs = torch.stack(pairs)
print(f"where F begins to jump, λ₁ is on branches at {pairs.min():.2f} to {pairs.max():.2f};", end=" ")
print(f"their mean, seed by seed, is {pairs.mean(1).min():.2f} to {pairs.mean(1).max():.2f}")

plt.style.use(plot.STYLE)
figure, axes = plt.subplots(2, 1, figsize=(7, 4), sharex=True, layout="constrained")
for axis, values, colour in zip(axes, (losses, sharpness), plot.CLASS_COLOURS, strict=False):
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=1)
    axis.plot(steps, values, color=colour, alpha=0.15, lw=0.4)
    axis.fill_between(steps, low, high, color=colour, alpha=0.3, lw=0, label="80 % of the seeds")
    axis.plot(steps, middle, color=colour, lw=1.2, label="median of 12 seeds")
axes[0].set_ylabel("dynamical loss F")
axes[1].set(xlabel="step", ylabel=r"$\lambda_1$")
axes[1].axhline(limit, color=plot.STOP_COLOUR, ls=":", label="2 / learning rate")
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %%
# All twelve are thrown off at the same place. Towards the end of a turn all classes count alike, the loss rises in
# the valley that was dug for one of them, and with it λ₁; near 2 / learning rate F and λ₁ begin to jump from step to
# step, and the next class takes over. While it jumps, λ₁ is one of two branches or more, and it is their mean
# (``branch_means``) that is to be compared with the limit, not the upper one.
#
# The band is the spread over initial values alone: the data, the width and the learning rate are those of one task.
