"""Processes with shards of vectors that differ, fail or hang: all of them end, with an error that says why."""

import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_distributed import ANOTHER_FAILED, outcomes, spread
from test_shards import LAYOUTS, data, operator, sharded
from torch import nn

from dynloss_ext import EigenTracker, HessianOperator, diagonal, eigsh, spectral_density, trace

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def batch_counts(rank, world_size):
    model, (X, Y) = sharded(world_size), data()
    return outcomes(
        lambda: HessianOperator.from_gradients(
            lambda i: (F.cross_entropy(model(X[i]), Y[i], reduction="sum"), len(i)),
            model.parameters(),
            list(torch.arange(12).split(4))[: 3 - rank],
        )
    )


def test_other_numbers_of_batches_are_refused_before_a_process_waits():
    for rank, (error,) in spread(batch_counts, 2).items():
        assert (
            f"ValueError: batches: expected as many in every process, as sharded parameters need, got {3 - rank}"
            in error
        )


def wrong_calls(rank, world_size, replicas):
    """What the processes hear of one that differs; they stay in step whatever happens."""
    H = operator(rank, world_size, replicas=replicas)
    own = eigsh(H, 2, max_hvp=2).vectors
    tracker = EigenTracker(2, max_hvp=2)
    tracker.update(H)

    def of_width(width):
        return sharded(world_size, nn.Sequential(nn.Linear(4, width), nn.Tanh()).double(), replicas=replicas)

    last = rank == world_size - 1

    def changed(ask):
        model = sharded(world_size, replicas=replicas)
        H = operator(rank, world_size, model)
        if last:
            next(model.parameters()).data.to_local().add_(1)
        ask(H)

    return outcomes(
        lambda: operator(rank, world_size, replicas=replicas, step=0.1 if last else None),
        lambda: eigsh(H, 2 + last, max_hvp=3),
        lambda: eigsh(H, 0 if last else 2, max_hvp=2),
        lambda: eigsh(H, 2, v0=own * float("nan") if last else own),
        lambda: eigsh(H, 2, v0=own[:-1] if last else own),
        lambda: tracker.update(H, audit=last),
        lambda: H @ torch.ones(H.shape[0] + last, dtype=torch.float64),
        lambda: H @ own[:, : 1 + last],
        lambda: H @ (own[:-1] if last else own),
        lambda: trace(H, num_probes=6 + last),
        lambda: spectral_density(H, num_steps=0 if last else 3),
        lambda: diagonal(H, seed=int(last)),
        *(partial(changed, ask) for ask in (eigsh, trace, spectral_density, diagonal)),
        lambda: operator(rank, world_size, of_width(24 + rank % 2)),
        lambda: trace(operator(rank, world_size, of_width(25)), num_probes=6),
    )


@LAYOUTS
def test_one_process_that_differs_ends_the_call_of_all(world_size, replicas):
    answers = spread(partial(wrong_calls, replicas=replicas), world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    differ = "expected the same arguments in all processes of the mesh, got others"
    for rank, answer in answers.items():
        last = rank == world_size - 1
        expected = [
            "ValueError: order, step, seed: expected the same in all processes, got different ones",
            f"ValueError: eigsh: {differ}",
            "ValueError: k: expected an int" if last else ANOTHER_FAILED,
            "ValueError: v0: expected finite numbers" if last else ANOTHER_FAILED,
            "ValueError: v0: expected shape" if last else ANOTHER_FAILED,
            f"ValueError: EigenTracker.update: {differ}",
            "ValueError: v: expected shape" if last else ANOTHER_FAILED,
            f"ValueError: H @ v: {differ}",
            "ValueError: v: expected shape",
            f"ValueError: trace: {differ}",
            "ValueError: num_steps: expected an int" if last else ANOTHER_FAILED,
            f"ValueError: diagonal: {differ}",
            *["RuntimeError: 0.weight: expected the values it had" if last else ANOTHER_FAILED] * 4,
            "ValueError: params: expected the same in all processes of the mesh",
        ]
        *messages, afterwards = answer  # of a model, and a mesh, of which torch has seen an equal one in every other
        assert afterwards is None
        for message, start in zip(messages, expected, strict=True):
            assert start in message


def replicas_differ(rank, world_size):
    """A copy of a shard with other values, of the parameters and of a vector."""
    model = sharded(world_size, replicas=2)
    H, own = operator(rank, world_size, model), torch.ones(0)
    own = eigsh(H, 1, max_hvp=1).vectors
    with torch.no_grad():
        if rank == world_size - 1:
            own = own.flip(0)
            next(model.parameters()).data.to_local().neg_()
    return outcomes(lambda: H @ own, lambda: eigsh(H, 1, v0=own), lambda: operator(rank, world_size, model))


def test_replicas_that_differ_end_the_call_of_all():
    answers = spread(replicas_differ, 4)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    differ = "RuntimeError: v: expected the same in all processes with one shard, got different values"
    changed = "RuntimeError: 0.weight: expected the values it had"
    for rank, (product, search, made) in answers.items():
        assert {1: differ, 3: changed}.get(rank, "in this call, got 2 other(s) that did") in product
        assert (changed if rank == 3 else differ) in search  # the length of all of it differs, too
        assert "ValueError: params: expected the same in all processes of the mesh" in made


QUESTIONS = {"eigsh": eigsh, "trace": trace, "density": spectral_density, "diagonal": diagonal}


def one_hangs(rank, world_size, replicas, question, where):
    """One process never asks, or sleeps in its closure. Of the others, seconds until each gave up."""
    model, (X, Y) = sharded(world_size, replicas=replicas), data()
    hangs = False

    def closure():
        if hangs:
            time.sleep(15)
        return F.cross_entropy(model(X), Y)

    H = HessianOperator.from_gradients(closure, model.parameters())
    for group in next(model.parameters()).device_mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
    hangs = rank == world_size - 1
    if hangs and where == "before":
        return time.sleep(15)
    start = time.monotonic()
    try:
        QUESTIONS[question](H)
    except RuntimeError:
        return time.monotonic() - start


@pytest.mark.parametrize(
    ("replicas", "question", "where"),
    [(1, "eigsh", "before"), (1, "trace", "before"), (2, "density", "before"), (1, "eigsh", "closure")],
)
def test_the_timeout_of_the_mesh_ends_those_who_wait(replicas, question, where):
    """Long before the one that hangs goes on, or is ended: that is up to who started it."""
    answers = spread(partial(one_hangs, replicas=replicas, question=question, where=where), 2 * replicas)
    last = answers.pop(2 * replicas - 1)
    assert last is None if where == "before" else last >= 15
    assert all(1 < seconds < 12 for seconds in answers.values()), answers


def one_fails_in_a_product(rank, world_size, replicas, question):
    model, (X, Y) = sharded(world_size, replicas=replicas), data()
    fails = False

    def closure():
        if fails and rank == 1:
            raise KeyError("my own failure")
        return F.cross_entropy(model(X), Y)

    H = HessianOperator.from_gradients(closure, model.parameters())
    fails = True
    return QUESTIONS[question](H)


@pytest.mark.parametrize(
    ("world_size", "replicas", "question"), [(2, 1, "eigsh"), (4, 1, "eigsh"), (2, 1, "diagonal"), (4, 2, "trace")]
)
def test_a_failure_in_the_closure_ends_all(world_size, replicas, question):
    """Its process at once; the others, which wait for it within torch, when it is gone."""
    start = time.monotonic()
    work = partial(one_fails_in_a_product, replicas=replicas, question=question)
    for rank, answer in spread(work, world_size).items():
        assert ("KeyError: 'my own failure'" if rank == 1 else "RuntimeError") in answer
    assert time.monotonic() - start < 100
