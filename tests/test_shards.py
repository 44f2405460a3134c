"""Eigenvectors in shards, of modules by fully_shard: gloo on 127.0.0.1, every wait bounded."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_distributed import ANOTHER_FAILED, outcomes, spread
from torch import nn

from dynloss_ext import _C, EigenTracker, HessianOperator, eigsh
from dynloss_ext._shards import _BLOCK, Shards

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SAMPLES, UPDATES, BASIS = 48, 4, 12


def module():
    """The last layer has fewer rows than there are processes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 24), nn.Tanh(), nn.Sequential(nn.Linear(24, 12), nn.Tanh()), nn.Linear(12, 3)
    ).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64), torch.arange(SAMPLES) % 3


def sharded(world_size, model=None, dim=0):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = model or module()
    mesh = init_device_mesh("cpu", (world_size,))
    options = {"mesh": mesh, "shard_placement_fn": lambda p: Shard(dim if p.dim() > dim else 0)}
    return fully_shard(model, **options)


def operator(rank, world_size, model=None, **options):
    model, (X, Y) = model or sharded(world_size), data()
    mine = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
    return HessianOperator.from_gradients(
        lambda: F.cross_entropy(model(X[mine]), Y[mine]), model.named_parameters(), **options
    )


def exact():
    model, (X, Y) = module(), data()
    return HessianOperator(F.cross_entropy(model(X), Y), model.named_parameters())


def whole(H, vectors):
    """(P, k): each process's shards, gathered."""
    return torch.cat([t.full_tensor().reshape(-1, vectors.shape[1]) for t in H.unflatten(vectors).values()])


def plain(found):
    """Without tensors, which would share the memory of a process that ends."""
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in found.items()}


def eigenpairs(rank, world_size):
    H = operator(rank, world_size)
    result = eigsh(H, 2, tol=1e-6)
    vectors = whole(H, result.vectors)
    found = {"values": result.values, "residuals": result.residuals, "vectors": vectors, "product": H @ vectors[:, 0]}
    return plain(found | {"own": len(result.vectors), "status": result.status})


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_eigenpairs_of_the_whole_model(world_size):
    dense = exact().to_dense()
    values, vectors = (x.flip(-1)[..., :2] for x in torch.linalg.eigh(dense))
    answers = spread(eigenpairs, world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    assert sum(answer["own"] for answer in answers.values()) == len(dense)
    for answer in answers.values():
        assert answer["status"] == "converged"
        assert answer["values"] == pytest.approx(values.tolist(), rel=1e-8)
        found = torch.tensor(answer["vectors"], dtype=torch.float64)
        assert torch.allclose((found.T @ vectors).abs(), torch.eye(2).double(), atol=1e-5)
        product = torch.tensor(answer["product"], dtype=torch.float64)
        assert (product - values[0] * found[:, 0]).norm() <= 2 * answer["residuals"][0]
        for name in ("values", "residuals", "vectors"):  # all decide alike: the same bits
            assert answer[name] == answers[0][name]


def searches(rank, world_size):
    H = operator(rank, world_size)
    first = eigsh(H, 2, tol=1e-3)
    warm = eigsh(H, 2, tol=1e-3, v0=1e200 * first.vectors)
    columns = operator(rank, world_size, sharded(world_size, dim=1))
    found = {
        "restarted": eigsh(H, 2, tol=1e-5, max_basis=4).values,
        "smallest": eigsh(H, 1, tol=1e-5, which="SA").values,
        "level": eigsh(H, 1, tol=1e-5, above=float(first.values.mean())).values,
        "columns": eigsh(columns, 2, tol=1e-5).values,
        "warm": warm.values,
    }
    return plain(found | {"saved": first.num_hvp - warm.num_hvp, "whole": whole(H, first.vectors)})


def test_searches_of_every_kind():
    values = torch.linalg.eigvalsh(exact().to_dense()).flip(0)
    answers = spread(searches, 2)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for answer in answers.values():
        assert answer["smallest"] == pytest.approx(values[-1:].tolist(), rel=1e-6, abs=1e-9)
        for name in ("restarted", "level", "columns", "warm"):
            assert answer[name] == pytest.approx(values[:2].tolist(), rel=1e-5), name
        assert answer["saved"] > 0


def updates(rank, world_size):
    """Values, identities and products of a tracker, and the parameters each was for."""
    model, tracker, found = sharded(world_size), EigenTracker(2, tol=1e-4, audit_every=3), []
    generator = torch.Generator().manual_seed(2)
    for _ in range(UPDATES):
        result = tracker.update(operator(rank, world_size, model))
        found.append((result.values.tolist(), tracker.identities.tolist(), result.num_hvp, len(result.vectors)))
        with torch.no_grad():
            for p in model.parameters():
                change = 0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_(distributed_like(change, p))
    return found


def distributed_like(t, p):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def test_a_tracker_follows_the_whole_model():
    model, (X, Y) = module(), data()
    generator, expected = torch.Generator().manual_seed(2), []
    for _ in range(UPDATES):
        H = HessianOperator(F.cross_entropy(model(X), Y), model.parameters())
        expected.append(torch.linalg.eigvalsh(H.to_dense()).flip(0)[:2])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    answers = spread(updates, 2)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for answer in answers.values():
        for (values, identities, num_hvp, own), top, other in zip(answer, expected, answers[0], strict=True):
            assert torch.allclose(torch.tensor(values, dtype=torch.float64), top, rtol=1e-6, atol=0)
            assert identities == [0, 1]
            assert own < H.shape[0]
            assert (values, num_hvp) == (other[0], other[2])
        assert answer[1][2] < answer[0][2]


def messages(rank, world_size):
    """Numbers in each message of a search, its products, the bytes of what it allocates and entries of its shard."""
    from torch.profiler import ProfilerActivity, profile

    H = operator(rank, world_size)
    sizes, original = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = eigsh(H, 2, tol=1e-2, max_basis=BASIS)
    dist.all_reduce = original
    allocated = sorted({event.self_cpu_memory_usage for event in profiled.events()})
    return sizes, result.num_hvp, allocated, result.vectors[:, 0].numel()


@pytest.mark.parametrize("world_size", [2, 4])
def test_messages_and_memory(world_size):
    size, answers = exact().shape[0], spread(messages, world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for sizes, num_hvp, allocated, shard in answers.values():
        assert sizes == answers[0][0]
        assert max(sizes[1:]) <= 2 * BASIS  # the first is for the arguments
        # The length of a product's vector, its errors, its own length, its overlaps, and one to three times the rest.
        assert 5 * num_hvp <= len(sizes) <= 7 * num_hvp + 10
        assert 2 * BASIS * shard * 8 in allocated
        assert all(size <= max(2 * BASIS * shard, _BLOCK) * 8 for size in allocated)
    assert sum(shard for *_, shard in answers.values()) == size


def normal_numbers(rank, world_size):
    found = []
    for dim in (0, 1):
        params = list(
            sharded(world_size, nn.Sequential(nn.Linear(72, 300), nn.Tanh(), nn.Linear(300, 3)), dim).parameters()
        )
        shards = Shards(params, torch.empty(0))
        found.append(
            shards.gather(shards.normal(3)).tolist()
            if dim == 0
            else shards.unflatten(shards.normal(3))[0].full_tensor().T.reshape(-1).tolist()
        )
        assert torch.equal(shards.cut(shards.gather(shards.normal(3))), shards.normal(3))
    return found


def test_random_vectors_are_the_same_for_any_number_of_processes():
    alone = spread(normal_numbers, 1)[0]
    assert not isinstance(alone, str), alone
    assert abs(torch.tensor(alone[0]).mean()) < 0.05
    assert abs(torch.tensor(alone[0]).std() - 1) < 0.05
    assert len(set(alone[0])) > 0.99 * len(alone[0])
    assert alone[1] == alone[0][: 72 * 300]
    for found in spread(normal_numbers, 4).values():
        assert found == alone


def without_rows(rank, world_size):
    """Three rows for four processes."""
    model = sharded(world_size, nn.Sequential(nn.Linear(4, 3, bias=False).double(), nn.Tanh(), nn.Tanh()))
    H = operator(rank, world_size, model)
    result = eigsh(H, 2, tol=1e-7)
    _C.take_device_path(True)
    device_path = eigsh(H, 2, tol=1e-7)
    return [
        len(result.vectors),
        result.values.tolist(),
        device_path.values.tolist(),
        eigsh(H, 12).values.tolist(),
        torch.linalg.eigvalsh(H.to_dense()).flip(0).tolist(),
    ]


def test_a_process_without_any_rows():
    answers = spread(without_rows, 4)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for rank, (own, *found, dense) in answers.items():
        assert own == (0 if rank == 3 else 4)
        for values in found:
            assert values == pytest.approx(dense[: len(values)], rel=1e-4, abs=1e-6)
        assert found[0] == pytest.approx(dense[:2], rel=1e-8)


def wrong_calls(rank, world_size):
    """What the processes hear of one that differs; they stay in step whatever happens."""
    H = operator(rank, world_size)
    own = eigsh(H, 2, max_hvp=2).vectors
    tracker = EigenTracker(2, max_hvp=2)
    tracker.update(H)
    wide = nn.Sequential(nn.Linear(4, 24 + rank % 2), nn.Tanh(), nn.Tanh()).double()
    last = rank == world_size - 1

    def changed():
        model = sharded(world_size)
        H = operator(rank, world_size, model)
        if last:
            next(model.parameters()).data.to_local().add_(1)
        eigsh(H, 2)

    return outcomes(
        lambda: eigsh(H, 2 + last, max_hvp=3),
        lambda: eigsh(H, 0 if last else 2, max_hvp=2),
        lambda: eigsh(H, 2, v0=own * float("nan") if last else own),
        lambda: eigsh(H, 2, v0=own[:-1] if last else own),
        lambda: tracker.update(H, audit=last),
        lambda: H @ torch.ones(H.shape[0] + last, dtype=torch.float64),
        changed,
        lambda: operator(rank, world_size, sharded(world_size, wide)),
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_process_that_differs_ends_the_call_of_all(world_size):
    answers = spread(wrong_calls, world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    differ = "expected the same arguments in all processes of the mesh, got others"
    for rank, answer in answers.items():
        last = rank == world_size - 1
        expected = [
            f"ValueError: eigsh: {differ}",
            "ValueError: k: expected an int" if last else ANOTHER_FAILED,
            "ValueError: v0: expected finite numbers" if last else ANOTHER_FAILED,
            "ValueError: v0: expected shape" if last else ANOTHER_FAILED,
            f"ValueError: EigenTracker.update: {differ}",
            "ValueError: v: expected shape" if last else ANOTHER_FAILED,
            "RuntimeError: 0.weight: expected the values it had" if last else ANOTHER_FAILED,
            "ValueError: params: expected the same in all processes of the mesh",
        ]
        for message, start in zip(answer, expected, strict=True):
            assert start in message


def one_fails_in_a_product(rank, world_size):
    model, (X, Y) = sharded(world_size), data()
    fails = False

    def closure():
        if fails and rank == 1:
            raise KeyError("my own failure")
        return F.cross_entropy(model(X), Y)

    H = HessianOperator.from_gradients(closure, model.parameters())
    fails = True
    return eigsh(H, 2).status


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_failure_in_the_closure_ends_all(world_size):
    """Its process at once; the others, which wait for it within torch, when it is gone."""
    start = time.monotonic()
    for rank, answer in spread(one_fails_in_a_product, world_size).items():
        assert ("KeyError: 'my own failure'" if rank == 1 else "RuntimeError") in answer
    assert time.monotonic() - start < 100
