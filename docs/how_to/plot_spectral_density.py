"""
The spectral density of a network, and what others have published
=================================================================

The Hessian of a trained classifier has a well-known shape. Sagun et al. (arXiv 1706.04454) found a *bulk* of
eigenvalues close to 0 and a few *outliers* to its right, about as many as there are classes. Papyan (arXiv
1901.08244) traced them to means of gradients over the samples of a class. Ghorbani et al. (arXiv 1901.10159) drew the
density by Lanczos quadrature for networks as large as those of ImageNet: its negative part, there before training, is
mostly gone after few steps. Here is the same for a small network on made-up data of C = 10 classes; a published curve
is drawn in *A published spectrum beside the measured one*.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn import functional

from dynloss_ext import HessianOperator, eigsh, plot, spectral_density, trace

torch.manual_seed(0)
torch.set_num_threads(1)
classes = 10
clouds = torch.arange(classes).repeat(60)
inputs = (torch.randn(600, 20) + torch.randn(classes, 20)[clouds]).double() / 2
wrong = torch.rand(600) < 0.1  # which keeps the loss above 0
labels = torch.where(wrong, torch.randint(classes, (600,)), clouds)
model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.ReLU(), torch.nn.Linear(40, classes)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def hessian() -> HessianOperator:
    return HessianOperator(functional.cross_entropy(model(inputs), labels), model.named_parameters())


# %%
# Before and after training: the density by ``spectral_density``, the outermost eigenvalues by ``eigsh``, which Lanczos
# quadrature only hints at, and the trace with its standard error.

densities, outliers = {}, {}
for name, steps in {"at initialisation": 0, "after 100 steps": 100}.items():
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    H = hessian()
    densities[name] = spectral_density(H, num_steps=100, num_probes=8, bandwidth=0.004)
    outliers[name] = eigsh(H, k=14).values
    lowest, sum_of_all = eigsh(H, k=1, which="SA").values.item(), trace(H)
    print(f"{name}: λ from {lowest:.4f}, trace {sum_of_all.value:.3f} ± {sum_of_all.stderr:.3f}; largest")
    print("   ", " ".join(f"{x:.3f}" for x in outliers[name].tolist()))

plt.style.use(plot.STYLE)
figure, axes = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, sharey=True, layout="constrained")
for axis, (name, density) in zip(axes, densities.items(), strict=True):
    axis.fill_between(density.grid, density.density, 1e-5, color=plot.CLASS_COLOURS[0], alpha=0.25, lw=0)
    axis.semilogy(density.grid, density.density, color=plot.CLASS_COLOURS[0], label="density, 8 probes")
    for i, value in enumerate(outliers[name].tolist()):
        inside = i < classes - 1
        axis.axvline(value, 0, 0.12, color=plot.STOP_COLOUR if inside else "black", lw=1)
    axis.set(title=name, ylabel=r"density $\rho(\lambda)$", ylim=(1e-4, 300))
axes[0].plot([], [], color=plot.STOP_COLOUR, label=f"the {classes - 1} largest eigenvalues")
axes[0].plot([], [], color="black", label="the next 5")
axes[0].legend()
axes[1].set_xlabel(r"eigenvalue $\lambda$")
plt.show()

# %%
# What agrees: before training there is no gap between bulk and outliers, and the bulk reaches as far to the left of 0
# as to the right; afterwards the most negative eigenvalue is a fiftieth of λ₁, and nine outliers stand apart. That is
# C - 1: the same number added to all logits changes no loss, which takes one direction away.
#
# What one should not conclude: that outliers always number C - 1. Where all labels are right, this network learns
# them by heart, and the gap narrows while the loss vanishes. And the heights of the peaks are not to be read: one
# eigenvalue of 1250 is a peak of 0.08 whichever it is, times what eight random probes make of it; a hundred steps of
# Lanczos show the bulk's outline, not its levels.
