"""Hessian products over the processes of a group: gloo on 127.0.0.1, every wait bounded."""

import os
import socket
import traceback
import warnings
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from dynloss_ext import GaussNewtonOperator, HessianOperator, eigsh
from dynloss_ext._batches import all_alike, fingerprint

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SAMPLES = 41

ANOTHER_FAILED = "processes: expected none to fail in this call, got 1 other(s) that did"


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


def outcomes(*calls):
    """What each call raises, or None; the processes stay in step whatever happens."""
    answers = []
    for call in calls:
        try:
            call()
            answers.append(None)
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def operator(rank, world_size, **changes):
    closure, params = problem()
    arguments = {"closure": closure, "params": params, "batches": shard(rank, world_size)} | changes
    return HessianOperator.from_batches(**arguments, process_group=dist.group.WORLD)


def one_is_called_wrongly(rank, world_size):
    _, params = problem()
    wrong = [
        {"closure": 3},
        {"batches": iter([])},
        {"params": 3},
        {"params": [params[0].detach()]},
        {"params": (p for p in [])},
    ]
    return outcomes(*[partial(operator, rank, world_size, **(change if rank == 1 else {})) for change in wrong])


def params_differ(rank, world_size):
    def build(change):
        closure, params = problem()
        given = list(params)
        if rank == 1:
            change(given)
        return operator(rank, world_size, closure=closure, params=given)

    @torch.no_grad()
    def by_one_bit(params):
        params[2].view(-1)[3] = torch.nextafter(params[2].view(-1)[3], params[2].new_tensor(torch.inf))

    @torch.no_grad()
    def exchanged(params):
        params[1].copy_(params[1].flip(0))

    changes = (lambda params: params.pop(), by_one_bit, exchanged, lambda params: None)
    return outcomes(*[partial(build, change) for change in changes])


def products_go_wrong(rank, world_size):
    calls = []

    def stale():
        closure, params = problem()
        H = operator(rank, world_size, closure=closure, params=params)
        if rank == 1:
            with torch.no_grad():
                params[0].add_(1)
        H @ torch.ones(H.shape[0], dtype=torch.float64)

    def other_vector():
        H = operator(rank, world_size)
        v = torch.ones(H.shape[0], dtype=torch.float64)
        v[7] += 1e-15 * rank
        H @ v

    def random():
        closure, params = problem()

        def noisy(indices):
            calls.append(1)
            loss, weight = closure(indices)
            return loss * (1 + 0.1 * (rank == 1 and len(calls) > 2)), weight

        H = operator(rank, world_size, closure=noisy, params=params)
        H @ torch.ones(H.shape[0], dtype=torch.float64)

    def vector_of_another_size():
        H = operator(rank, world_size)
        H @ torch.ones(H.shape[0] + rank, dtype=torch.float64)

    def params_that_end_early():
        _, params = problem()

        def given():
            yield params[0]
            if rank == 1:
                raise KeyError("no more of them")
            yield from params[1:]

        operator(rank, world_size, params=given())

    def default_device():
        closure, params = problem()
        batches = shard(rank, world_size)
        H = operator(rank, world_size, closure=closure, params=params, batches=batches)
        v = torch.ones(H.shape[0], dtype=torch.float64)
        with torch.device("meta"):
            again = operator(rank, world_size, closure=closure, params=params, batches=batches)
            assert torch.equal(again @ v, H @ v)

    return outcomes(
        stale,
        other_vector,
        random,
        vector_of_another_size,
        params_that_end_early,
        default_device,
        partial(operator, rank, world_size),
    )


def unequal_shards(rank, world_size):
    """A process without batches, one whose batches do not depend on params, and nobody who has any."""
    closure, params = problem()
    everything = [torch.arange(SAMPLES)]
    empty = operator(rank, world_size, batches=everything if rank else [])
    v = torch.linspace(-1, 1, empty.shape[0], dtype=torch.float64)
    constant = torch.ones((), dtype=torch.float64, requires_grad=True)
    independent = operator(
        rank, world_size, closure=closure if rank else lambda _: (constant * 2, 0), params=params, batches=everything
    )
    failures = outcomes(
        partial(operator, rank, world_size, batches=[]),
        partial(operator, rank, world_size, closure=lambda _: (constant * 2, 1), params=params, batches=everything),
        partial(operator, rank, world_size, closure=lambda _: (closure(_)[0], -9.0 if rank else 0.5), params=params),
    )
    return (empty @ v).tolist(), (independent @ v).tolist(), failures


def composed(rank, world_size):
    """Of two operators of the group; then with a vector that one process has of another size."""
    closure, params = problem()
    H, G = (operator(rank, world_size, closure=closure, params=params) for _ in range(2))
    seen = (2 * H + G).preconditioned(torch.full(H.shape[:1], 4.0, dtype=torch.float64)).restrict(params[:2])
    values = eigsh(seen, 2, tol=1e-8).values.tolist()
    failures = outcomes(lambda: seen @ torch.ones(seen.shape[0] + rank, dtype=torch.float64))
    return values, failures, (seen @ torch.ones(seen.shape[0], dtype=torch.float64)).tolist()


def gauss_newton(rank, world_size):
    closure, params = gauss_newton_problem()
    G = GaussNewtonOperator.from_batches(closure, params, shard(rank, world_size), process_group=dist.group.WORLD)
    return G.to_dense().tolist()


def gauss_newton_problem():
    """In float32, whose message carries the same small integers exactly."""
    _, params = problem()
    X = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    params = [p.detach().float().requires_grad_() for p in params]

    def closure(indices):
        z = torch.tanh(X[indices] @ params[0] + params[1]) @ params[2] + params[3]
        return F.cross_entropy(z, indices % 3, reduction="sum"), z, len(indices)

    return closure, params


def data_parallel(rank, world_size):
    """What a closure with a DDP module raises, and what the loop of the README finds: parameters and curvature."""
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(8, 2, dtype=torch.float64, generator=generator), torch.arange(8) % 3
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = F.cross_entropy(model(x), y)
        HessianOperator(loss, model.parameters())
        refused = outcomes(
            lambda: HessianOperator(lambda: F.cross_entropy(ddp(x), y), model.parameters()),
            lambda: HessianOperator(lambda: F.cross_entropy(ddp.forward(x), y), model.parameters()),
            lambda: HessianOperator.from_batches(
                lambda _: (F.cross_entropy(ddp(x), y), 1), model.parameters(), [0], process_group=dist.group.WORLD
            ),
        )
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    H = HessianOperator.from_batches(
        lambda rows: (F.cross_entropy(model(x[rows]), y[rows], reduction="sum"), len(rows)),
        model.named_parameters(),
        torch.arange(8).split(3),
        process_group=dist.group.WORLD,
    )
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return [str(w.message) for w in caught], refused, flat.tolist(), H.to_dense().tolist(), x.tolist()


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
        return dict(answers.get(timeout=300) for _ in processes)
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
        expected = "KeyError: 'my own failure'" if rank == culprit else ANOTHER_FAILED
        assert expected in answer


@pytest.mark.parametrize("world_size", [2, 3])
def test_wrong_arguments_of_one_process_end_all(world_size):
    answers = spread(one_is_called_wrongly, world_size)
    expected = [
        "closure: expected a callable, got ",
        "batches: expected an iterable to be passed over more than once",
        "params: expected an iterable of tensors, got ",
        "a tensor that requires grad, got ",
        "params: expected at least one tensor, got none",
    ]
    for rank, messages in answers.items():
        for message, own in zip(messages, expected, strict=True):
            assert (own if rank == 1 else ANOTHER_FAILED) in message


def test_params_that_differ_are_refused_by_all():
    for messages in spread(params_differ, 2).values():
        for message in messages[:3]:
            assert message.startswith("ValueError: params: expected the same in all processes of process_group, got ")
        assert messages[3:] == [None]


def test_products_that_go_wrong_end_all():
    for rank, (stale, vector, random, size, params, *good) in spread(products_go_wrong, 2).items():
        assert ("changed in place" if rank == 1 else ANOTHER_FAILED) in stale
        assert vector.startswith("RuntimeError: v: expected the same in all processes of process_group, got ")
        assert random.startswith("ValueError: closure: expected the same losses in every pass over batches, got ")
        assert "got others in 1 of 2 processes" in random
        assert ("added up to" in random) == (rank == 1)  # where it is this process's own losses, how they differ
        for own, answer in (("v: expected shape ", size), ("no more of them", params)):
            assert (own if rank == 1 else ANOTHER_FAILED) in answer
        assert good == [None, None]


def test_unequal_shards():
    closure, params = problem()
    H = HessianOperator.from_batches(closure, params, [torch.arange(SAMPLES)])
    expected = H @ torch.linspace(-1, 1, H.shape[0], dtype=torch.float64)
    for *products, failures in spread(unequal_shards, 2).values():
        for product in products:
            assert torch.allclose(torch.tensor(product, dtype=torch.float64), expected, rtol=1e-12, atol=1e-15)
        for message, part in zip(
            failures, ["at least one batch, got none", "in any batch", "more than 0, got -"], strict=True
        ):
            assert message.startswith("ValueError")
            assert part in message


def test_composed_operators_of_one_process():
    closure, params = problem()
    whole = HessianOperator.from_batches(closure, params, [torch.arange(SAMPLES)])
    block = 0.75 * whole.restrict(params[:2]).to_dense()
    for rank, (values, (failure,), product) in spread(composed, 2).items():
        assert values == pytest.approx(torch.linalg.eigvalsh(block)[-2:].flip(0).tolist(), rel=1e-9)
        assert ("v: expected shape" if rank == 1 else ANOTHER_FAILED) in failure
        assert product == pytest.approx(block.sum(1).tolist(), rel=1e-9, abs=1e-12)


def test_gauss_newton_of_one_process():
    closure, params = gauss_newton_problem()
    alone = GaussNewtonOperator.from_batches(closure, params, [torch.arange(SAMPLES)]).to_dense()
    for dense in spread(gauss_newton, 2).values():
        assert torch.allclose(torch.tensor(dense), alone, rtol=1e-4, atol=1e-6)


def test_data_parallel_modules():
    first, second = spread(data_parallel, 2).values()
    for warned, refused, *_ in (first, second):
        assert len(warned) == 1
        assert warned[0].startswith(
            "loss: the curvature is that of this process's data only; HessianOperator.from_batch"
        )
        for message in refused:
            assert message.startswith("ValueError: closure: expected to call the plain module, got a call of Distribut")
    assert first[2:4] == second[2:4]
    model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    torch.nn.utils.vector_to_parameters(torch.tensor(first[2], dtype=torch.float64), model.parameters())
    x = torch.tensor(first[4] + second[4], dtype=torch.float64)
    loss = F.cross_entropy(model(x), (torch.arange(8) % 3).repeat(2))
    whole = HessianOperator(loss, model.parameters()).to_dense()
    assert torch.allclose(torch.tensor(first[3], dtype=torch.float64), whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints_tell_sums_of_equals_from_all_others(dtype):
    x = torch.randn(5000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    own = fingerprint([x, x[:7]])
    ulp = torch.nextafter(x, torch.full_like(x, torch.inf)) - x
    others = [[x + ulp * (torch.arange(5000) == i), x[:7]] for i in (0, 4999)]
    others += [[x[:7], x], [x.view(50, 100), x[:7]], [x.flip(0), x[:7]], [x]]
    up_and_down = x.clone()
    up_and_down[3], up_and_down[4] = x[3] + ulp[3], x[4] - ulp[4]
    for other in [*others, [up_and_down, x[:7]]]:
        for equals in (1, 2, 4095):
            sums = (equals * own + fingerprint(other)).to(torch.float32).tolist()
            assert not all_alike(sums, equals + 1)
    assert all_alike((4096 * own).to(torch.float32).tolist(), 4096)
    assert torch.equal(fingerprint([x.view(50, 100).T, x * 0]), fingerprint([x.view(50, 100).T.clone(), -x * 0]))


def test_fingerprints_in_pieces(monkeypatch):
    monkeypatch.setattr("dynloss_ext._batches.CHUNK", 16)
    x = torch.arange(40, dtype=torch.float64)
    assert not torch.equal(fingerprint([x]), fingerprint([torch.cat([x[16:32], x[:16], x[32:]])]))
