"""Differences of gradients over processes and of sharded modules: gloo on 127.0.0.1, every wait bounded."""

import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_distributed import ANOTHER_FAILED, SAMPLES, problem, shard, spread
from torch import nn

from dynloss_ext import EigenTracker, GaussNewtonOperator, HessianOperator, eigsh

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def eigenvalues(rank, world_size):
    closure, params = problem()
    H = HessianOperator.from_gradients(closure, params, shard(rank, world_size), process_group=dist.group.WORLD)
    return eigsh(H, 3, tol=1e-8).values.tolist()


def mean_of_losses(rank, world_size):
    closure, params = problem()

    def mean():
        loss, weight = closure(torch.cat(shard(rank, world_size)))
        return loss / weight

    return HessianOperator.from_gradients(mean, params, process_group=dist.group.WORLD).to_dense().tolist()


def one_fails_in_a_product(rank, world_size):
    closure, params = problem()
    fails = False

    def failing(indices):
        if fails and rank == 1:
            raise KeyError("my own failure")
        return closure(indices)

    H = HessianOperator.from_gradients(failing, params, shard(rank, world_size), process_group=dist.group.WORLD)
    before = [p.detach().clone() for p in params]
    fails = True
    try:
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    finally:
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def one_asks_wrongly(rank, world_size):
    closure, params = problem()
    H = HessianOperator.from_gradients(closure, params, shard(rank, world_size), process_group=dist.group.WORLD)
    return H @ torch.ones(H.shape[0] + rank, dtype=torch.float64)


def another_model(rank, world_size):
    closure, params = problem()
    with torch.no_grad():
        params[0][0, 0] += rank
    return HessianOperator.from_gradients(closure, params, shard(rank, world_size), process_group=dist.group.WORLD)


def another_step(rank, world_size):
    closure, params = problem()
    H = HessianOperator.from_gradients(closure, params, shard(rank, world_size), process_group=dist.group.WORLD)
    H._source.step *= 1 + rank
    return H @ torch.ones(H.shape[0], dtype=torch.float64)


def one_hangs(rank, world_size, made_by):
    """One process never asks."""
    closure, params = problem()
    make = getattr(HessianOperator, made_by)
    H = make(closure, params, shard(rank, world_size), process_group=dist.group.WORLD)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    if rank == 1:
        return time.sleep(8)
    return EigenTracker(1).update(H) if made_by == "from_gradients" else H @ torch.ones(H.shape[0]).double()


def module():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 3), nn.Tanh()), nn.Linear(3, 3)
    ).double()


def data(rank, world_size):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, 2, generator=generator, dtype=torch.float64).chunk(world_size)[rank]
    return X, torch.arange(len(X)) % 3


def sharded(rank, world_size):
    """The Hessian, its eigenvalues, and what is left behind, of a module sharded in two groups."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, (X, Y) = module(), data(rank, world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for p in model.parameters():  # 5 and 3 rows over two processes: shards are not of one size
        p.grad = torch.ones_like(p)
    before = [(p.to_local().detach().clone(), p.grad) for p in model.parameters()]
    H = HessianOperator.from_gradients(lambda: F.cross_entropy(model(X), Y), model.named_parameters())
    dense, values = H.to_dense(), eigsh(H, 2, tol=1e-8).values
    for p, (values_before, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), values_before)
        assert p.grad is gradient
        assert (gradient.to_local() == 1).all()
    local = sum(p.to_local().numel() for p in model.parameters())

    def in_batches(rows):  # the second process has more of them weigh less
        return F.cross_entropy(model(X[rows]), Y[rows], reduction="sum") / (1 + rank), len(rows) / (1 + rank)

    weighted = HessianOperator.from_gradients(in_batches, model.parameters(), torch.arange(len(X)).split(7))
    return dense.tolist(), values.tolist(), local, weighted.to_dense().tolist()


def flat_shards(rank, world_size):
    from torch.distributed.fsdp import FullyShardedDataParallel

    X, Y = data(rank, world_size)
    model = FullyShardedDataParallel(module(), use_orig_params=True, device_id=torch.device("cpu"))
    return refusal(lambda: HessianOperator.from_gradients(lambda: F.cross_entropy(model(X), Y), model.parameters()))


class Failing(nn.Module):
    """The last layer of `module`, which may fail in the midst of a forward pass."""

    fails = False

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if self.fails:
            raise KeyError("my own failure")
        return self.layer(x)


def gathered(rank, world_size):
    """Errors of products, where torch holds parameters gathered that have moved since; and whether an error in a
    forward pass, and one after it, leave the loss as it was."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found, (X, Y) = {}, data(rank, world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for order in (2, 4):
        for what in ("kept", "called"):
            model, fails = module(), False
            model[3] = Failing(model[3])
            fully_shard(model[2], mesh=mesh)
            fully_shard(model, mesh=mesh)
            if what == "kept":
                model.set_reshard_after_backward(False)

            def closure():
                loss = F.cross_entropy(model(X), Y)  # noqa: B023
                if fails:  # noqa: B023
                    raise KeyError("my own failure")
                return loss

            H = HessianOperator.from_gradients(closure, model.parameters(), order=order)
            with torch.no_grad():
                before = F.cross_entropy(model(X), Y)
            v = torch.ones(H.shape[0], dtype=torch.float64)
            found[f"{what}, order {order}"] = (H @ v).tolist(), H.noise
            for where in ("after", "within"):
                fails, model[3].fails = where == "after", where == "within"
                with pytest.raises((KeyError, RuntimeError)):
                    H @ v
                fails = model[3].fails = False
                with torch.no_grad():
                    assert torch.equal(F.cross_entropy(model(X), Y), before), where
    return found


def refusals(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, (X, Y) = module(), data(rank, world_size)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    params = list(model.parameters())
    outputs = model(X)
    loss = F.cross_entropy(outputs, Y)
    calls = [
        lambda: HessianOperator(loss, params),
        lambda: GaussNewtonOperator(loss, outputs, params),
        lambda: HessianOperator.from_batches(lambda _: (loss, 1), params, [0]),
        lambda: HessianOperator.layers(loss, {"first": params[:1], "second": params[1:]}),
        lambda: HessianOperator.from_gradients(lambda: loss, params, process_group=dist.group.WORLD),
        lambda: HessianOperator.from_gradients(lambda: loss, [params[0], torch.ones(2, requires_grad=True)]),
    ]
    return [refusal(call) for call in calls]


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_the_eigenvalues_of_one_process():
    closure, params = problem()
    alone = eigsh(HessianOperator.from_batches(closure, params, [torch.arange(SAMPLES)]), 3, tol=1e-8).values
    for values in spread(eigenvalues, 2).values():
        assert torch.allclose(torch.tensor(values, dtype=torch.float64), alone, rtol=1e-10, atol=0)


def test_without_batches_the_mean_of_the_processes():
    closure, params = problem()
    shards = [torch.cat(shard(rank, 2)) for rank in range(2)]
    each = [HessianOperator.from_batches(closure, params, [rows]).to_dense() for rows in shards]
    for dense in spread(mean_of_losses, 2).values():
        assert torch.allclose(torch.tensor(dense, dtype=torch.float64), sum(each) / 2, rtol=1e-9, atol=1e-10)


def test_a_failure_ends_all():
    for rank, answer in spread(one_fails_in_a_product, 2).items():
        assert ("KeyError: 'my own failure'" if rank == 1 else ANOTHER_FAILED) in answer
    for rank, answer in spread(one_asks_wrongly, 2).items():
        assert ("v: expected shape (45,)" if rank == 1 else ANOTHER_FAILED) in answer


def test_another_model_ends_all():
    for answer in spread(another_model, 2).values():
        assert "params: expected the same in all processes of process_group, got different shapes or values" in answer


def test_another_step_ends_all():
    for answer in spread(another_step, 2).values():
        assert "RuntimeError: v: expected the same in all processes of process_group" in answer


@pytest.mark.parametrize("made_by", ["from_gradients", "from_batches"])
def test_the_timeout_of_the_group_ends_those_who_wait(made_by):
    answers = spread(partial(one_hangs, made_by=made_by), 2)
    assert answers[1] is None
    assert "RuntimeError" in answers[0]


def test_flat_shards_are_refused():
    for answer in spread(flat_shards, 2).values():
        assert "or those of fully_shard, got a call of FullyShardedDataParallel" in answer


def test_sharded_modules_that_hold_what_they_gathered():
    model, halves = module(), [data(rank, 2) for rank in range(2)]
    X, Y = (torch.cat(parts) for parts in zip(*halves, strict=True))
    exact = HessianOperator(F.cross_entropy(model(X), Y), model.parameters())
    expected = exact @ torch.ones(exact.shape[0], dtype=torch.float64)
    for found in spread(gathered, 2).values():
        assert len(found) == 4
        for what, (product, noise) in found.items():
            assert (torch.tensor(product, dtype=torch.float64) - expected).norm() <= 1e-9, what
            assert noise <= 1e-9, what


def test_sharded_modules():
    model, halves = module(), [data(rank, 2) for rank in range(2)]
    params = list(model.parameters())
    each = [HessianOperator(lambda X=X, Y=Y: F.cross_entropy(model(X), Y), params).to_dense() for X, Y in halves]
    expected, size = sum(each) / 2, sum(p.numel() for p in params)
    answers = spread(sharded, 2)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    assert sum(answer[2] for answer in answers.values()) == size
    for dense, values, local, weighted in answers.values():
        assert local < size
        assert torch.allclose(torch.tensor(dense, dtype=torch.float64), expected, rtol=1e-9, atol=1e-10)
        top = torch.linalg.eigvalsh(expected).flip(0)[:2]
        assert torch.allclose(torch.tensor(values, dtype=torch.float64), top, rtol=1e-9, atol=0)
        of_weights = (each[0] + each[1] / 2) / 1.5
        assert torch.allclose(torch.tensor(weighted, dtype=torch.float64), of_weights, rtol=1e-9, atol=1e-10)


def test_recorded_operators_refer_sharded_parameters_to_differences():
    (messages,) = spread(refusals, 1).values()
    assert not isinstance(messages, str), messages
    *recorded, group, mixed = messages
    for message in recorded:
        assert (
            "a tensor that is whole in this process, got a DTensor, which only HessianOperator.from_gradients"
            in message
        )
    assert group.startswith("process_group: expected None with sharded parameters")
    assert "expected DTensors alone, or none, got Tensor beside params[0], a DTensor" in mixed
