"""Hessian products over the processes of a group: gloo on 127.0.0.1, every wait bounded."""

import os
import socket
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from dynloss_ext import HessianOperator, eigsh

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SAMPLES = 41


def problem():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)
    Y = torch.arange(SAMPLES) % 3
    shapes = [(2, 7), (7,), (7, 3), (3,)]
    params = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    weights = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)

    def closure(indices):
        logits = torch.tanh(X[indices] @ params[0] + params[1]) @ params[2] + params[3]
        return F.cross_entropy(logits, Y[indices], weight=weights, reduction="sum"), weights[Y[indices]].sum()

    return closure, params


def shard(rank, world_size):
    """Unequal shards, in batches of unequal size; the last process has a single sample."""
    bounds = [0, *[SAMPLES - 1 - 3 * (world_size - 2 - i) for i in range(world_size - 1)], SAMPLES]
    return torch.arange(bounds[rank], bounds[rank + 1]).split(9)


def eigenvalues(rank, world_size):
    closure, params = problem()
    H = HessianOperator.from_batches(closure, params, shard(rank, world_size), process_group=dist.group.WORLD)
    reductions = 0
    original = dist.all_reduce

    def counting(*args, **kwargs):
        nonlocal reductions
        reductions += 1
        return original(*args, **kwargs)

    dist.all_reduce = counting
    result = eigsh(H, 3, tol=1e-8)
    assert reductions == result.num_hvp
    return result.values.tolist()


def one_fails_in_a_product(rank, world_size):
    closure, params = problem()
    calls = 0

    def failing(indices):
        nonlocal calls
        calls += 1
        if rank == 1 and calls > 12:
            raise KeyError("my own failure")
        return closure(indices)

    H = HessianOperator.from_batches(failing, params, shard(rank, world_size), process_group=dist.group.WORLD)
    return eigsh(H, 3, tol=1e-8).values.tolist()


def one_fails_at_the_start(rank, world_size):
    closure, params = problem()

    def failing(indices):
        if rank == 0:
            raise KeyError("my own failure")
        return closure(indices)

    return HessianOperator.from_batches(failing, params, shard(rank, world_size), process_group=dist.group.WORLD).shape


def run(work, rank, world_size, port, answers):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        answers.put((rank, work(rank, world_size)))
    except Exception:
        answers.put((rank, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def spread(work, world_size):
    """What each rank returns, or the traceback of what it raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.Queue()
    arguments = [(work, rank, world_size, port, answers) for rank in range(world_size)]
    processes = [context.Process(target=run, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    try:
        return dict(answers.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_eigenvalues_of_one_process(world_size):
    closure, params = problem()
    alone = eigsh(HessianOperator.from_batches(closure, params, [torch.arange(SAMPLES)]), 3, tol=1e-8).values
    for values in spread(eigenvalues, world_size).values():
        assert torch.allclose(torch.tensor(values, dtype=torch.float64), alone, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("work", "culprit"), [(one_fails_in_a_product, 1), (one_fails_at_the_start, 0)])
def test_a_failure_ends_all(work, culprit):
    for rank, answer in spread(work, 2).items():
        expected = "KeyError: 'my own failure'" if rank == culprit else "1 other process(es) of the group failed"
        assert expected in answer
