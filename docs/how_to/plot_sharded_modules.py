"""
Modules sharded by fully_shard (FSDP2)
======================================

Behind ``fully_shard`` torch has a gradient and no second derivative, and no process holds the whole of a vector.
``HessianOperator.from_gradients`` takes differences of gradients there, and ``eigsh`` and ``EigenTracker`` keep every
vector of theirs in shards, like the parameters. Nothing has to be asked for: every process makes the same calls, each
with its own data. Here two processes on this machine's CPU talk by gloo; with a GPU each the mesh is one of ``"cuda"``.
"""

import tempfile
from datetime import timedelta

import matplotlib.pyplot as plt
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from dynloss_ext import EigenTracker, HessianOperator, plot, stability_limit

STEPS = 60


def made() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """The model, inputs and labels; the same in every process."""
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(20)
    inputs = torch.randn(60, 8) + 2 * torch.eye(3, 8)[labels]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((8, 40), (40, 40))]
    return nn.Sequential(*blocks, nn.Linear(40, 3)), inputs, labels


def work(rank: int, folder: str) -> None:
    """What each process does; torchrun would call it."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), rank=rank, world_size=2)
    model, inputs, labels = made()
    own = slice(30 * rank, 30 * (rank + 1))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.2)  # made after the shards, whose parameters are new

    def loss() -> torch.Tensor:
        return functional.cross_entropy(model(inputs[own]), labels[own])

    tracker, step, found = EigenTracker(k=1), None, []
    for _ in range(STEPS):
        H = HessianOperator.from_gradients(loss, model.named_parameters(), step=step)
        result = tracker.update(H)
        step = H.step  # the next operator begins there
        found.append((float(result.values[0]), float(result.residuals[0]), stability_limit(optimizer)))
        optimizer.zero_grad()
        loss().backward()  # torch averages over the processes
        optimizer.step()

    # Pieces of eigenvectors are DTensors under the names of the parameters; `full_tensor` gathers one.
    pieces = H.unflatten(result.vectors[:, 0])
    norms = {name: float(piece.full_tensor().norm()) for name, piece in pieces.items()}
    torch.save((found, len(result.vectors), H.shape[0], norms), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


# %%
# The same training in one process, its eigenvalues by products that are exact, for comparison:


def whole() -> list[float]:
    model, inputs, labels = made()
    optimizer, tracker, found = torch.optim.SGD(model.parameters(), lr=1.2), EigenTracker(k=1, tol=1e-5), []
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(inputs), labels)
        found.append(float(tracker.update(HessianOperator(loss, model.named_parameters())).values[0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


# %%
# The guard is for processes that are spawned, which read this file once more; under ``torchrun`` it is not needed.

if __name__ == "__main__":
    from plot_sharded_modules import work  # by a name that spawned processes can import

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder,), nprocs=2)
        (found, own, rows, norms), (others, _, _, _) = (torch.load(f"{folder}/{rank}.pt") for rank in range(2))
    values, residuals, limits = torch.tensor(found, dtype=torch.float64).unbind(1)
    exact = torch.tensor(whole(), dtype=torch.float64)
    print(f"of a vector of {rows} numbers the first process holds {own}; the same values in both: {found == others}")
    errors = (values - exact).abs()
    print(f"largest error {(errors / exact).max():.1e} of the eigenvalue, {(errors / residuals).max():.2f} residuals")
    print("the eigenvector, by parameters:", {name: round(norm, 2) for name, norm in norms.items()})

    plt.style.use(plot.STYLE)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(exact, color="#cccccc", lw=5, label="one process, exact products")
    left.plot(values, color="black", label="two processes, by differences")
    left.plot(limits, "--", color=plot.CLASS_COLOURS[1], label="2 / learning rate")
    left.set(xlabel="step", ylabel=r"largest Hessian eigenvalue $\lambda_1$")
    left.legend()
    right.semilogy(residuals, color=plot.CLASS_COLOURS[0], label="residual")
    right.semilogy(errors, color="black", label="error")
    right.set(xlabel="step", ylabel=r"of $\lambda_1$")
    right.legend()
    plt.show()

# %%
# The residual on the right is what differences of float32 leave uncertain, and the tolerance of the search. A process
# that fails, or is called with another model, makes all of them raise. :doc:`Sharded modules </concepts/differences>`
# says what is held and sent, and what needs whole vectors.
