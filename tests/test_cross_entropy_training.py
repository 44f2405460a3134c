"""The loss in training loops: checkpointing, loss scaling, DDP, in-place gradients."""

import faulthandler
import os
from datetime import timedelta

import pytest
import torch
from cross_entropy_cases import close, labels, normal
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_cases import OSCILLATION, gradients, model, train

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, reference

# ---- loops


def test_gradient_accumulation_equals_one_batch():
    x, y, whole, parts = normal(20, 3), labels(4, 20), model(), model()
    dynamic_cross_entropy(whole(x), y, OSCILLATION, 7).backward()
    for i in range(0, 20, 5):
        (dynamic_cross_entropy(parts(x[i : i + 5]), y[i : i + 5], OSCILLATION, 7) / 4).backward()
    close(gradients(parts), gradients(whole))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_model_and_loss(reentrant):
    x, y, plain, checkpointed = normal(20, 3).requires_grad_(), labels(4, 20), model(), model()
    step = torch.tensor(7)

    def loss_of(network, inputs):
        return dynamic_cross_entropy(network(inputs), y, OSCILLATION, step)

    loss_of(plain, x).backward()
    loss = checkpoint(loss_of, checkpointed, x, use_reentrant=reentrant)
    loss.backward()
    close(gradients(checkpointed), gradients(plain))
    if not reentrant:
        loss, v = checkpoint(loss_of, checkpointed, x, use_reentrant=False), normal(20, 3, seed=2)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (hv,) = torch.autograd.grad(g, x, v)
        (expected,) = torch.autograd.grad(loss_of(plain, x), x, create_graph=True)
        close(hv, torch.autograd.grad(expected, x, v)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_grad_scaler_with_autocast(dtype, inplace):
    """The gradients of a mixed-precision step, unscaled, against those in float64; scale 65536 is beyond float16."""
    x, y, network, exact = normal(256, 3, dtype=torch.float32), labels(4, 256), model(dtype=torch.float32), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    criterion = DynamicCrossEntropyLoss(OSCILLATION, inplace_gradient=inplace)
    with torch.autocast("cpu", dtype=dtype):
        logits = network(x)
        assert logits.dtype == dtype
        loss = criterion(logits, y)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    criterion(exact(x.double()), y).backward()
    error = (gradients(network) - gradients(exact)).abs().max() / gradients(exact).abs().max()
    assert error < 8 * torch.finfo(dtype).eps
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16, "no overflow was seen"


def test_anomaly_mode_and_hooks():
    x, seen = normal(6, 4).requires_grad_(), []
    x.register_hook(seen.append)
    with torch.autograd.detect_anomaly(check_nan=True):
        dynamic_cross_entropy(x, labels(4, 6), OSCILLATION, 3).backward()
    assert torch.equal(seen[0], x.grad)
    assert seen[0] is not x.grad
    loss = dynamic_cross_entropy(x, labels(4, 6), OSCILLATION, 3)
    assert "DynamicCrossEntropyBackward" in loss.grad_fn.name()


# ---- the gradient in the place of the logits


@pytest.mark.parametrize("shape", [(20, 4), (3, 4, 5), (20, 70), (2, 10, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"normalization": "weights"}])
def test_inplace_gradient_equals_the_plain_one(shape, dtype, options):
    ensemble = shape[0] == 2
    classes = shape[-1] if ensemble else shape[1]
    oscillation = Oscillation(classes, torch.tensor([3.0, 9.0]) if ensemble else 9, 10)
    target = labels(classes, shape[1]) if ensemble else labels(classes, shape[0], *shape[2:])
    x = normal(*shape, dtype=dtype).requires_grad_()
    for factor in (1.0, 3.0):
        results = []
        for inplace in (False, True):
            criterion = DynamicCrossEntropyLoss(oscillation, inplace_gradient=inplace, **options)
            criterion.current_step.fill_(13)
            logits = x * 1
            before, version = logits.detach().clone(), logits._version
            loss = criterion(logits, target)
            assert inplace == (not torch.equal(before, logits.detach()))
            assert inplace == (logits._version > version)
            x.grad = None
            (factor * loss.sum()).backward()
            results.append((loss.detach(), x.grad))
        torch.testing.assert_close(results[0], results[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-7 * factor)


def test_inplace_gradient_refuses_what_it_would_get_wrong():
    criterion, x, y = (
        DynamicCrossEntropyLoss(OSCILLATION, inplace_gradient=True),
        normal(6, 4).requires_grad_(),
        labels(4, 6),
    )
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(criterion(x * 1, y), x, create_graph=True)
    for leaf in (x, x.view(3, 2, 4).view(6, 4), x[:3]):
        before = x.detach().clone()
        with pytest.raises(RuntimeError, match="a leaf that requires grad"):
            criterion(leaf, y[: len(leaf)])
        assert torch.equal(x.detach(), before)
    with pytest.raises(RuntimeError, match=r"internal overlap|single memory location"):
        criterion((x[:1] * 1).expand(6, 4), y)
    hidden = torch.tanh(x)  # saves its output
    loss = criterion(hidden, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(RuntimeError, match="inplace_gradient"):
            transform(lambda z: criterion(z * 1, y))(x.detach())
    # Forward mode needs no gradient, so it runs as without the option.
    forward = torch.func.jacfwd(lambda z: criterion(z * 1, y))(x.detach())
    close(forward, reference.gradient(x.detach(), y, OSCILLATION, 0))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="inplace_gradient"):
        torch.compile(lambda z: criterion(z * 1, y), backend="aot_eager", fullgraph=True)(x)
    loss = criterion(x * 1, y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inplace_gradient_leaves_inference_and_bad_targets_alone():
    criterion, x, y = DynamicCrossEntropyLoss(OSCILLATION, inplace_gradient=True), normal(6, 4), labels(4, 6)
    before = x.clone()
    expected = reference.cross_entropy(x, y, OSCILLATION, 0)
    close(criterion(x, y), expected)
    with torch.no_grad():
        close(criterion(x.clone().requires_grad_(), y), expected)
    logits = x.clone().requires_grad_() * 1
    y[3] = 9
    with pytest.raises(IndexError, match="target: expected class indices from 0 to 3, got 9 at position 3"):
        criterion(logits, y)
    assert torch.equal(logits, before)
    assert torch.equal(x, before)


def test_inplace_gradient_kept_graph():
    criterion, x, y = (
        DynamicCrossEntropyLoss(OSCILLATION, inplace_gradient=True),
        normal(6, 4).requires_grad_(),
        labels(4, 6),
    )
    expected = reference.gradient(x.detach(), y, OSCILLATION, 0)
    loss = criterion(x * 1, y)
    close(torch.autograd.grad(2 * loss, x, retain_graph=True)[0], 2 * expected)
    close(torch.autograd.grad(3 * loss, x)[0], 3 * expected)


# ---- data parallel


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.criterion = model(), DynamicCrossEntropyLoss(OSCILLATION)

    def forward(self, x, y):
        return self.criterion(self.network(x), y)


def data_parallel_worker(rank, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limits = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", **limits)  # no port for others to take
    faulthandler.dump_traceback_later(100, exit=True)
    module = WithLoss()
    parallel = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5)
    x, y = normal(20, 3).chunk(world)[rank], labels(4, 20).chunk(world)[rank]
    for _ in range(6):
        optimizer.zero_grad()
        parallel(x, y).backward()
        optimizer.step()
        module.criterion.step()
    torch.save([p.detach() for p in module.parameters()] + [module.criterion.current_step], f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    # Not by ~Reducer: with the GIL held it ends the group, whose thread may wait for the GIL (seen in torch 2.13).
    os._exit(0)


@pytest.mark.parametrize("world", [1, 2])
def test_distributed_data_parallel_equals_one_process(world, tmp_path):
    context = torch.multiprocessing.get_context("fork" if world == 1 else "spawn")
    workers = [
        context.Process(target=data_parallel_worker, args=(rank, world, str(tmp_path)), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    single = WithLoss()
    train(single.criterion, 6, single.network)
    expected = [p.detach() for p in single.parameters()] + [single.criterion.current_step]
    for rank in range(world):
        torch.testing.assert_close(torch.load(f"{tmp_path}/{rank}.pt"), expected, rtol=1e-12, atol=1e-13)
