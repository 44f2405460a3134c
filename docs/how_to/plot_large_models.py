"""
Large models and memory
=======================

Two things fill the memory while eigenvalues are sought, and each has its knob: the vectors of the solver
(``max_basis``) and the graph of the loss, kept for products (``HessianOperator.from_batches``). Either changes the
price in time; neither changes the result.
"""

import matplotlib.pyplot as plt
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from dynloss_ext import HessianOperator, eigsh, plot

torch.manual_seed(0)
torch.set_num_threads(1)
layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU()]
model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(256, 10))
images, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
size = sum(p.numel() for p in model.parameters())

# %%
# **The solver's vectors.** It holds at most (2 · max_basis + max(3, k + 2)) · P numbers. A smaller basis restarts more
# often and spends more products.

H, k = HessianOperator(functional.cross_entropy(model(images), labels), model.parameters()), 3
bases = [5, 6, 8, 12, 16, 24]
found = [eigsh(H, k=k, max_basis=m, tol=1e-4) for m in bases]
numbers = [2 * m + max(3, k + 2) for m in bases]
for m, n, top in zip(bases, numbers, found, strict=True):
    print(f"max_basis {m:2}: {n:2} vectors, {top.num_hvp:3} products, λ = {[round(x, 5) for x in top.values.tolist()]}")

# %%
# **The graph.** What autograd keeps of one forward pass can be counted. With ``from_batches`` one batch's graph lives
# at a time: the closure returns the *sum* of the losses and what the total is to be divided by, so that batches of
# any size, the last one smaller, add up to the exact mean.


def loss_of(batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.cross_entropy(model(images[batch]), labels[batch], reduction="sum"), len(batch)


def graph_bytes(batch: torch.Tensor) -> int:
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss_of(batch)
    return sum(kept.values())


batch_sizes = [64, 24, 8, 4]
graphs = [graph_bytes(torch.arange(64)[:n]) / 2**20 for n in batch_sizes]
for n, megabytes in zip(batch_sizes, graphs, strict=True):
    batched = HessianOperator.from_batches(loss_of, model.named_parameters(), torch.arange(64).split(n))
    print(f"batches of {n:2}: {megabytes:6.2f} MiB, λ₁ = {eigsh(batched, k=1, tol=1e-4).values[0]:.5f}")

plt.style.use(plot.STYLE)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(numbers, [top.num_hvp for top in found], "o-", color=plot.CLASS_COLOURS[0])
for m, n, top in zip(bases, numbers, found, strict=True):
    left.annotate(f" {m}", (n, top.num_hvp), va="bottom")
left.set(xlabel=f"vectors of {size} numbers held", ylabel="Hessian-vector products", title="max_basis, by the dots")
right.loglog(batch_sizes, graphs, "o-", color=plot.CLASS_COLOURS[1])
right.set(xlabel="samples in a batch", ylabel="MiB kept for the backward pass", title="from_batches", ylim=(0.05, 5))
right.set_xticks(batch_sizes, batch_sizes)
right.minorticks_off()
plt.show()

# %%
# The left curve is this Hessian's; where eigenvalues lie close together, it is steeper. The right one shows what is
# saved of the forward pass, not the peak of a product, which holds the graph of the first backward pass, too. A third
# knob is ``torch.utils.checkpoint`` with ``use_reentrant=False`` inside the model: products run through it as
# training does.
