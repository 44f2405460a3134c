"""
Largest Hessian eigenvalues of your own model, in five lines
============================================================

You have a model, a loss and a training loop, and want to know how sharp the minimum is that the optimizer walks in.
Here a small network learns to tell three made-up arms of points apart by plain gradient descent, with torch's own
cross-entropy: nothing of the model or the loss has to come from this package.
"""

import matplotlib.pyplot as plt
import torch

from dynloss_ext import EigenTracker, HessianOperator, plot, stability_limit

torch.manual_seed(0)
torch.set_num_threads(1)
labels = torch.arange(3).repeat(60)
along = torch.rand(180)
angle = 2 * torch.pi * (labels / 3 + 0.7 * along) + 0.1 * torch.randn(180)
inputs = 2 * (0.2 + along)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
model = torch.nn.Sequential(torch.nn.Linear(2, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.8)

# %%
# The five lines are the ones with a comment. The operator takes the loss with its graph, before ``backward``;
# ``H.gradients`` are that backward pass, so that measuring does not pay for it twice.

tracker = EigenTracker(k=3)  # 1
losses, values = [], []
for _ in range(400):
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    H = HessianOperator(loss, model.named_parameters())  # 2
    top = tracker.update(H)  # 3
    for p, gradient in zip(model.parameters(), H.gradients, strict=True):  # 4
        p.grad = gradient.detach().clone()  # 5
    optimizer.step()
    losses.append(loss.item())
    values.append(top.values)

values = torch.stack(values)
limit = stability_limit(optimizer)
print(f"{tracker.num_hvp / tracker.num_updates:.1f} Hessian-vector products per step, {H.shape[0]} parameters")
print(f"last step: λ = {top.values.tolist()}")
print(f"           residuals {top.residuals.tolist()}, {top.status}")
print(f"2 / learning rate = {limit:.2f}; λ₁ reaches {values[:, 0].max():.2f}")

# %%
# The residual ‖Hv − λv‖ bounds the distance to *some* eigenvalue of H; the status says whether a search for overlooked
# ones is behind it, too. It is, every twenty updates.

plt.style.use(plot.STYLE)
figure, (above, below) = plt.subplots(2, 1, figsize=(6, 3.8), sharex=True, layout="constrained")
above.plot(losses, color="black")
above.set_ylabel("loss")
for i in range(3):
    below.plot(values[:, i], color=plot.EIGENVALUE_COLOURS[i], label=rf"$\lambda_{i + 1}$")
below.axhline(limit, color=plot.STOP_COLOUR, ls=":", label="2 / learning rate")
below.set(xlabel="step", ylabel="eigenvalue of the Hessian")
below.legend(ncols=4, loc="upper right", bbox_to_anchor=(1, 1.15))
plt.show()

# %%
# λ₁ climbs beyond 2 / learning rate, the loss jumps, λ₁ is thrown back, and then hovers at the limit with ripples in
# the loss: the edge of stability (Cohen et al., arXiv 2103.00065). Once the points are learned the curvature falls,
# since that of a cross-entropy vanishes with its loss: a small λ late in training says that the network is sure of
# its answers, not that they generalise. And 2 / learning rate is a threshold of full-batch gradient descent. With
# momentum it is higher, which ``stability_limit`` of the optimizer knows; with mini-batches or Adam λ₁ of the whole
# loss is not what is held there.
