"""Eigenvectors in shards, of modules by fully_shard: gloo on 127.0.0.1, every wait bounded."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_distributed import ANOTHER_FAILED, outcomes, spread
from torch import nn

from dynloss_ext import _C, EigenTracker, HessianOperator, diagonal, eigsh, preconditioner, spectral_density, trace
from dynloss_ext._shards import _BLOCK, Shards

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SAMPLES, UPDATES, BASIS = 48, 4, 12

# Processes, and copies of each shard among them.
LAYOUTS = pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (4, 1), (4, 2)])


def module():
    """The last layer has fewer rows than there are processes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 24), nn.Tanh(), nn.Sequential(nn.Linear(24, 12), nn.Tanh()), nn.Linear(12, 3)
    ).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64), torch.arange(SAMPLES) % 3


def sharded(world_size, model=None, dim=0, replicas=1):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = model or module()
    shape, names = (replicas, world_size // replicas), ("replicas", "shards")
    mesh = init_device_mesh("cpu", shape[replicas == 1 :], mesh_dim_names=names[replicas == 1 :])
    options = {"mesh": mesh, "shard_placement_fn": lambda p: Shard(dim if p.dim() > dim else 0)}
    return fully_shard(model, **options)


def operator(rank, world_size, model=None, replicas=1, **options):
    model, (X, Y) = model or sharded(world_size, replicas=replicas), data()
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


def eigenpairs(rank, world_size, replicas):
    H = operator(rank, world_size, replicas=replicas)
    result = eigsh(H, 2, tol=1e-6)
    vectors = whole(H, result.vectors)
    found = {"values": result.values, "residuals": result.residuals, "vectors": vectors, "product": H @ vectors[:, 0]}
    return plain(found | {"own": len(result.vectors), "status": result.status})


@LAYOUTS
def test_the_eigenpairs_of_the_whole_model(world_size, replicas):
    dense = exact().to_dense()
    values, vectors = (x.flip(-1)[..., :2] for x in torch.linalg.eigh(dense))
    answers = spread(partial(eigenpairs, replicas=replicas), world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    assert sum(answer["own"] for answer in answers.values()) == replicas * len(dense)
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


def estimates(rank, world_size, replicas, dim):
    """What is asked of the whole spectrum, and products in both forms."""
    H = operator(rank, world_size, sharded(world_size, dim=dim, replicas=replicas))
    v = columns(H)
    own = torch.stack([H._source.params.shards.cut(column.contiguous()) for column in v.T], 1)
    estimate = diagonal(H, num_samples=2, seed=1)
    shards = {"diagonal": estimate.values, "errors": estimate.stderr, "product": H @ own[:, 0]}
    found = {name: whole(H, x[:, None])[:, 0] for name, x in shards.items()}
    return plain(asked(H) | found | {"products": whole(H, H @ own), "whole": H @ v[:, 0], "own": len(own)})


def composed(rank, world_size, replicas, dim):
    """An operator that a whole and a DTensor diagonal precondition, in shards and whole."""
    model = sharded(world_size, dim=dim, replicas=replicas)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = p.detach() + 0.5
    optimizer.step()
    H = operator(rank, world_size, model)
    P = preconditioner(optimizer, model.parameters())
    D = torch.cat([piece.full_tensor().reshape(-1) for piece in P])
    block = H.restrict(list(model.parameters()))  # whole vectors: so has what it is a part of
    beside = [(H + block) @ columns(H)[:, 0], (block + H) @ columns(H)[:, 0]]
    found = {"D": D, "beside": torch.stack(beside), "values beside": eigsh(H + block, 2, tol=1e-8).values}
    for name, given in (("pieces", P), ("whole", D)):
        G = (2 * H + H / 2 - H).preconditioned(given, weight_decay=0.1)
        result = eigsh(G, 2, tol=1e-8)
        found |= {name: result.values, f"{name} shard": len(result.vectors), f"{name} product": G @ columns(H)[:, 0]}
    return plain(found)


@pytest.mark.parametrize(("world_size", "replicas", "dim"), [(2, 1, 1), (4, 2, 0)])
def test_composed_operators_keep_vectors_in_shards(world_size, replicas, dim):
    H = exact()
    answers = spread(partial(composed, replicas=replicas, dim=dim), world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for answer in answers.values():
        D = torch.tensor(answer["D"], dtype=torch.float64)
        G = (1.5 * H).preconditioned(D, weight_decay=0.1)
        values, product = torch.linalg.eigvalsh(G.to_dense()).flip(0)[:2], G @ columns(H)[:, 0]
        for row in torch.tensor(answer["beside"], dtype=torch.float64):
            assert torch.allclose(row, 2 * H @ columns(H)[:, 0], rtol=1e-6, atol=1e-6)
        assert answer["values beside"] == pytest.approx(eigsh(2 * H, 2, tol=1e-8).values.tolist(), rel=1e-6)
        for name in ("pieces", "whole"):
            assert answer[name] == pytest.approx(values.tolist(), rel=1e-6)
            assert torch.allclose(torch.tensor(answer[f"{name} product"]).double(), product, rtol=1e-6, atol=1e-6)
            assert answer[f"{name} shard"] < H.shape[0]
    assert sum(answer["pieces shard"] for answer in answers.values()) == replicas * H.shape[0]


def columns(H):
    return torch.linspace(-1, 1, 2 * H.shape[0], dtype=torch.float64).view(-1, 2)


def asked(H):
    density, hutchinson = spectral_density(H, num_steps=3, num_probes=2), trace(H, method="hutchinson", num_probes=2)
    hutch = trace(H, num_probes=7)
    return {
        "nodes": density.nodes,
        "weights": density.weights,
        "hutchinson": [hutchinson.value, hutchinson.stderr],
        "hutch++": [hutch.value, hutch.stderr],
    }


@pytest.mark.parametrize(("world_size", "replicas", "dim"), [(2, 1, 1), (4, 1, 0), (4, 2, 0)])
def test_estimates_are_those_of_the_whole_model(world_size, replicas, dim):
    """From the same random vectors; what is left is the noise of products, about 1e-10."""
    H = exact()
    v, estimate = columns(H), diagonal(H, num_samples=2, seed=1)
    products = {"products": H @ v, "product": H @ v[:, 0], "whole": H @ v[:, 0]}
    expected = asked(H) | products | {"diagonal": estimate.values, "errors": estimate.stderr}
    answers = spread(partial(estimates, replicas=replicas, dim=dim), world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for answer in answers.values():
        for name, value in expected.items():
            got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (answer[name], value))
            assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-9), (name, (got - wanted).abs().max())
            assert answer[name] == answers[0][name]
    assert sum(answer["own"] for answer in answers.values()) == replicas * H.shape[0]


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


def resumed(rank, world_size):
    """Products of an update before and after a state is loaded, the process's own and that of the first."""
    model = sharded(world_size)
    tracker, again, mixed = (EigenTracker(2, tol=1e-4) for _ in range(3))
    H = operator(rank, world_size, model)
    tracker.update(H)
    states = [None] * world_size
    dist.all_gather_object(states, tracker.state_dict())
    again.load_state_dict(states[rank])
    mixed.load_state_dict(states[0])
    warm = [t.update(H).num_hvp for t in (tracker, again)]
    even = operator(
        rank, world_size, sharded(world_size, nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh()).double())
    )
    other = EigenTracker(2, tol=1e-4)
    other.update(even)
    dist.all_gather_object(states, other.state_dict())
    other.load_state_dict(states[0])  # as long as its own
    return [warm, *outcomes(lambda: mixed.update(H), lambda: other.update(even))]


def test_a_tracker_resumes_from_the_state_of_its_own_process():
    for rank, (warm, *errors) in spread(resumed, 2).items():
        assert warm[0] == warm[1]
        expected = ("ValueError: H: expected", ANOTHER_FAILED)[rank == 0]
        assert all(expected in error for error in errors), errors


def low_precision(rank, world_size):
    """The largest eigenvalue of bfloat16 parameters, and of those that the forward pass sees in bfloat16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    X, Y = data()
    found = {}
    for name in ("parameters", "policy"):
        model = module().bfloat16() if name == "parameters" else module().float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if name == "policy" else MixedPrecisionPolicy()
        model = fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), mp_policy=policy)

        def loss(model=model):
            return F.cross_entropy(model(X.bfloat16()).float(), Y)

        H = HessianOperator.from_gradients(loss, model.parameters())
        result = eigsh(H, 1, tol=0.05)
        found |= {name: result.values, f"{name} noise": H.noise, f"{name} dtype": str(result.vectors.dtype)}
    return plain(found)


def test_vectors_of_bfloat16_parameters_are_float32():
    largest = float(torch.linalg.eigvalsh(exact().to_dense())[-1])
    answers = spread(low_precision, 2)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for answer in answers.values():
        for name in ("parameters", "policy"):
            assert answer[f"{name} dtype"] == "torch.float32"
            assert answer[name][0] == pytest.approx(largest, abs=max(0.1 * largest, 4 * answer[f"{name} noise"]))
            assert answer[f"{name} noise"] < largest


def counted(call, group=None):
    """What a call returns, and the numbers in each of its messages, to a group if one is given."""
    sizes, original = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        if group is None or kwargs["group"] is group:
            sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        return call(), sizes
    finally:
        dist.all_reduce = original


def profiled(call):
    """What a call returns, and the bytes of what it allocates."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    return result, sorted({event.self_cpu_memory_usage for event in found.events()})


def messages(rank, world_size):
    """Numbers in each message of a search, its products, the bytes of what it allocates and entries of its shard."""
    H = operator(rank, world_size)
    (result, sizes), allocated = profiled(lambda: counted(lambda: eigsh(H, 2, tol=1e-2, max_basis=BASIS)))
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


PROBED = 2  # samples, and steps of one probe


def messages_of_estimates(rank, world_size):
    """Numbers in the messages of each estimate, bytes of what all of them allocate, and entries of a shard."""
    from torch.distributed.fsdp import fully_shard

    model = module()
    for layer in (model[0], model[2]):  # torch gathers one of them at a time
        sharded(world_size, layer)
    H = operator(rank, world_size, fully_shard(model, mesh=next(model.parameters()).device_mesh))
    size = H._source.params.shards.size
    v = torch.ones(size, dtype=torch.float64)
    calls = {
        "product": lambda: H @ v,
        "diagonal": lambda: diagonal(H, num_samples=PROBED),
        "trace": lambda: trace(H, method="hutchinson", num_probes=PROBED),
        "density": lambda: spectral_density(H, num_steps=PROBED, num_probes=1, grid_size=2),
    }
    sizes, allocated = profiled(lambda: {name: counted(call)[1] for name, call in calls.items()})
    return sizes, allocated, size


@pytest.mark.parametrize("world_size", [2])
def test_messages_and_memory_of_estimates(world_size):
    """Nothing has the size of whole vectors."""
    size, answers = exact().shape[0], spread(messages_of_estimates, world_size)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    # The arguments; a product: the length of its vector and its errors. A diagonal: its unit and whether it is finite.
    product = [2, 3]
    expected = {
        "diagonal": [27, *product, 1, *product * (PROBED - 1), 1],
        "trace": [27, *[*product, 1, 4, 1] * PROBED],
        "product": [1, 27, *product],
    }
    for found, allocated, shard in answers.values():
        rows = {4 * shard * 8, (PROBED + 1) * shard * 8}  # of a trace, of a density
        assert rows <= set(allocated)
        assert all(bytes % (size * 8) for bytes in allocated if bytes)
        sizes = found.pop("density")
        assert found == expected
        assert sizes == answers[0][0].get("density", sizes)
        # As eigsh: of a step overlaps, and those of what is left, once for each subtraction.
        assert sizes[:4] == [27, 1, *product]
        assert max(sizes[1:]) <= PROBED + 1
        assert 3 + 4 * PROBED <= len(sizes) <= 3 + 6 * PROBED
    assert sum(shard for *_, shard in answers.values()) == size


def messages_to_replicas(rank, world_size):
    """Numbers in the messages of a product and of calls to the processes with the same shard, and of products to those
    with the others."""
    model = sharded(world_size, replicas=2)
    H = operator(rank, world_size, model)
    copies, shards = next(model.parameters()).device_mesh.get_all_groups()
    return [
        counted(lambda: eigsh(H, 2, max_hvp=2), copies)[1],
        counted(lambda: trace(H, method="hutchinson", num_probes=2), copies)[1],
        counted(lambda: trace(H, method="hutchinson", num_probes=2), shards)[1],
    ]


def test_dot_products_are_of_one_replica():
    """To the others go the arguments and with every product a fingerprint of its vector, its length, its errors; torch
    sends each gradient, which is larger."""
    answers = spread(messages_to_replicas, 4)
    assert all(not isinstance(answer, str) for answer in answers.values()), answers
    for search, copies, shards in answers.values():
        for sizes in (search, copies):
            assert [size for size in sizes if size <= 52] == [27, *[52, 2, 3] * 2]
            assert set(sizes) - {27, 52, 2, 3} == {max(sizes)}
        assert shards == [27, *[2, 3, 1, 4, 1] * 2]


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
