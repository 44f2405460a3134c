"""
Several processes
=================

Each process holds a part of the data and a copy of the model. ``HessianOperator.from_batches(..., process_group=)``
is the Hessian of the loss over *all* of it, exactly: one all-reduce a product, sums weighted by their true counts.
Here two processes on this machine's CPU talk by gloo; with one GPU each (which has not been run yet) the backend is
``"nccl"``, the model and the batches are on ``cuda:rank``, and nothing else changes. Train with
``DistributedDataParallel`` as ever, and measure with the plain module.
"""

import tempfile
from datetime import timedelta

import matplotlib.pyplot as plt
import torch
from torch import distributed, multiprocessing
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dynloss_ext import EigenTracker, HessianOperator, plot


def work(rank: int, folder: str) -> None:
    """What each process does; torchrun would call it."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), rank=rank, world_size=2)
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(20)
    inputs = torch.randn(60, 4, dtype=torch.float64) + torch.eye(3, 4)[labels]
    model = torch.nn.Sequential(torch.nn.Linear(4, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).double()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)

    def loss_of(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        return functional.cross_entropy(model(inputs[rows]), labels[rows], reduction="sum"), len(rows)

    all_rows = torch.arange(60)
    own_rows = all_rows[30 * rank : 30 * (rank + 1)]
    ways = {
        "two processes": (own_rows.split(12), distributed.group.WORLD),  # batches of 12, 12 and 6
        "own data": ([own_rows], None),
        "one process": ([all_rows], None),
    }
    trackers = {name: EigenTracker(k=1) for name in ways}
    values: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    for _ in range(40):
        for name, (batches, group) in ways.items():
            H = HessianOperator.from_batches(loss_of, model.named_parameters(), batches, process_group=group)
            values[name].append(trackers[name].update(H).values[0])
        optimizer.zero_grad()
        functional.cross_entropy(ddp(inputs[own_rows]), labels[own_rows]).backward()  # DDP averages the gradients
        optimizer.step()
    torch.save({name: torch.stack(of) for name, of in values.items()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


# %%
# Both processes make the same calls and get the same numbers; one that fails makes the other raise instead of wait. The
# guard is for processes that are spawned, which read this file once more; under ``torchrun`` neither is needed.

if __name__ == "__main__":
    from plot_several_processes import work  # by a name that spawned processes can import

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder,), nprocs=2)
        first, second = (torch.load(f"{folder}/{rank}.pt") for rank in range(2))
    ours, alone = first["two processes"], first["one process"]
    print(f"the same bits in both processes: {torch.equal(ours, second['two processes'])}")
    print(f"largest relative difference to one process with all data: {((ours - alone) / alone).abs().max():.1e}")

    plt.style.use(plot.STYLE)
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(alone, color="#cccccc", lw=5, label="all data in one process")
    axis.plot(ours, color="black", label="two processes, a half each")
    for rank, values in enumerate((first, second)):
        axis.plot(values["own data"], "--", color=plot.CLASS_COLOURS[rank], label=f"the data of process {rank} alone")
    axis.set(xlabel="step", ylabel=r"largest Hessian eigenvalue $\lambda_1$")
    axis.legend()
    plt.show()

# %%
# The eigenvalue of a process's own data is not that of the loss, and neither is the mean of the processes' eigenvalues:
# a maximum of a sum is not the sum of maxima. Measuring on one process alone gives the dashed curves.
