"""The processes of one run: alone, or started by torchrun."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among `size` of them; the main one talks and writes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor (of one dtype) by its sum over the processes, in one all-reduce."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def average_buffers_(self, model: nn.Module) -> None:
        """Gives every process the mean of BatchNorm's running statistics.

        Moving averages are linear, so when this is done does not change the result but for rounding.
        """
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.size == 1 or not buffers:
            return
        self.sum_(buffers)
        torch._foreach_div_(buffers, self.size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def is_main_process() -> bool:
    """Whether this is the process that talks and writes, also outside of `join_world`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Joins the processes that torchrun started (its environment variables tell), or stays alone.

    On CUDA each process takes the device of its local rank.  May be nested: the outermost leaves the group.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield World(device, dist.get_rank(), size)
        return
    # Its functions have the group of their import as a default, and would keep it, with gloo's threads, until the
    # interpreter ends, and sometimes aborts; the first optimizer imports it.
    importlib.import_module("torch.distributed.nn")
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(device, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
