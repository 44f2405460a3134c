r"""
Migrating from PyHessian and from hessian-eigenthings
=====================================================

The same questions, the names that each package gives them, and one problem asked of all. Left out are a peer's options
that have no bearing on the result.

.. list-table::
   :header-rows: 1

   * - what
     - PyHessian 0.1
     - hessian-eigenthings 1.0
     - dynloss_ext
   * - the Hessian
     - ``hessian(model, criterion, data=(x, y))``
     - ``HessianOperator(model, batches, loss_fn)``
     - ``HessianOperator(loss, model.named_parameters())``
   * - of many batches
     - ``hessian(..., dataloader=loader)``
     - the same, the mean over batches
     - ``HessianOperator.from_batches(closure, params, batches)``, sums over samples
   * - a product
     - ``hessian_vector_product(gradsH, params, v)``, lists of tensors
     - ``H.matvec(v)``, flat
     - ``H @ v``, flat, or several columns
   * - largest eigenvalues
     - ``.eigenvalues(top_n=3)``, power iteration, largest in magnitude
     - ``lanczos(H, k=3, which="LA", max_iter=...)``, as many steps as told
     - ``eigsh(H, k=3)``, with residuals and a status
   * - of the next step
     - from scratch
     - from scratch
     - ``EigenTracker(k=3).update(H)``
   * - trace
     - ``.trace()``, a list of samples
     - ``trace(H)``
     - ``trace(H)``, with its standard error
   * - spectral density
     - ``.density()``, nodes and weights; needs ``torch.eig``, which torch has no more
     - ``spectral_density(H)``
     - ``spectral_density(H)``, with its standard error
   * - Gauss-Newton
     - –
     - ``GGNOperator``
     - ``GaussNewtonOperator(loss, outputs, params)``

What to mind on the way: PyHessian puts the model into eval mode and leaves gradients with their graphs behind,
returns the eigenvalues that are largest in *magnitude*, and stops where an estimate changes by less than ``tol``,
which bounds no error. ``lanczos`` of hessian-eigenthings takes 2k steps unless told otherwise. The mean over batches
is not the mean over samples where the last batch is smaller.
"""

import importlib.util

import matplotlib.pyplot as plt
import torch
from torch.nn import functional

from dynloss_ext import HessianOperator, eigsh, plot

torch.manual_seed(0)
torch.set_num_threads(1)
labels = torch.arange(6).repeat(50)
inputs = torch.randn(300, 10) + 1.5 * torch.randn(6, 10)[labels]
model = torch.nn.Sequential(torch.nn.Linear(10, 30), torch.nn.Tanh(), torch.nn.Linear(30, 6))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(10):
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()

# %%
# One script with all three. A peer that is not installed is left out, with a line that says so.

found = {}
H = HessianOperator(functional.cross_entropy(model(inputs), labels), model.named_parameters())
ours = eigsh(H, k=3)
found["dynloss_ext"] = ours.values

if importlib.util.find_spec("hessian_eigenthings"):
    from hessian_eigenthings import HessianOperator as PeerOperator
    from hessian_eigenthings import lanczos

    def loss_fn(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    peer = PeerOperator(model, [(inputs, labels)], loss_fn)
    for name, steps in {"hessian-eigenthings": None, "hessian-eigenthings, 20 steps": 20}.items():
        values = lanczos(peer, k=3, which="LA", max_iter=steps, seed=0).eigenvalues
        found[name] = torch.as_tensor(values).double().sort(descending=True).values
else:
    print("hessian-eigenthings is not installed: pip install hessian-eigenthings")

if importlib.util.find_spec("pyhessian"):
    from pyhessian import hessian

    for name, options in {"PyHessian": {}, "PyHessian, tol=1e-6": {"tol": 1e-6, "maxIter": 1000}}.items():
        peer = hessian(model, functional.cross_entropy, data=(inputs, labels), cuda=False)
        found[name] = torch.tensor(peer.eigenvalues(top_n=3, **options)[0], dtype=torch.float64)
        model.zero_grad(set_to_none=True)  # gradients that hold their graphs, and would be added to
    model.train()
else:
    print("PyHessian is not installed: pip install pyhessian")

# %%
# The reference is the dense Hessian in float64, which 516 parameters still allow.

double = model.double()
loss = functional.cross_entropy(double(inputs.double()), labels)
exact = torch.linalg.eigvalsh(HessianOperator(loss, double.named_parameters()).to_dense()).flip(0)[:3]
print(f"{'dense':30}", " ".join(f"{x:.6f}" for x in exact.tolist()))
for name, values in found.items():
    print(f"{name:30}", " ".join(f"{x:.6f}" for x in values.tolist()))
print("our residuals over λ:", " ".join(f"{x:.1e}" for x in (ours.residuals / exact).tolist()), ours.status)

plt.style.use(plot.STYLE)
figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for i, (name, values) in enumerate(found.items()):
    error = ((values - exact).abs() / exact).clamp_min(1e-9)
    axis.semilogy([1, 2, 3], error, "o-", lw=0.6, color=plot.CLASS_COLOURS[i], label=name)
axis.set_xticks([1, 2, 3], [rf"$\lambda_{i}$" for i in (1, 2, 3)])
axis.set_ylabel("relative error")
figure.legend(loc="outside upper center", ncols=3)
plt.show()

# %%
# λ₁ and λ₂ lie within 2 % of each other, which power iteration needs many products to tell apart: by the default
# ``tol`` PyHessian's first two come in the wrong order. Lanczos has no such trouble once it has the steps. What this
# one problem does not show is cost, and errors where a solver misses an eigenvalue altogether: the benchmarks do.
