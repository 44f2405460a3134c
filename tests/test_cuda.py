"""The ops on a CUDA device against the CPU's, in float64; streams, graphs, launches and bad targets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("dynloss::cross_entropy", "CUDA"),
        reason="built without CUDA kernels",
    ),
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
#: Relative to the largest entry: a few roundings of the storage type.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

#: Every regime of the kernels, with one block and with several.
SHAPES = [
    (1, 1), (31, 1), (1025, 1), (300, 3), (70000, 3), (5000, 2), (512, 10), (65536, 10), (1025, 17), (31, 31),
    (1025, 32), (31, 33), (2000, 100), (31, 257), (1025, 1000), (7, 1023), (31, 1025), (40, 32000), (3, 128256),
]  # fmt: skip


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(classes, *shape, seed=0, ignored=False):
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    if ignored:
        target.view(-1)[::5] = -100
    return target


def near(actual, expected, dtype):
    expected = expected.double().cpu()
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double().cpu() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype], equal_nan=True
    )


def derivatives(logits, target, oscillation, step, u, v, **options):
    """Loss, gradient by a plain backward and by create_graph, Hessian·v and third·u·v of the summed loss."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = dynamic_cross_entropy(leaf, target, oscillation, step, **options)
    (plain,) = torch.autograd.grad(loss.sum(), leaf)
    loss = dynamic_cross_entropy(leaf, target, oscillation, step, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    (hessian,) = torch.autograd.grad((gradient * v).sum(), leaf, create_graph=True)
    (third,) = torch.autograd.grad((hessian * u).sum(), leaf)
    return loss.detach(), plain, gradient.detach(), hessian.detach(), third


def compare(logits, target, oscillation, step, dtype, **options):
    """The op on the device in `dtype` against the CPU in float64, at the values that `dtype` can hold."""
    logits = logits.to(dtype)
    u, v = (torch.randn_like(logits, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = derivatives(logits.double(), target, oscillation, step, u.double(), v.double(), **options)
    device_step = step.cuda() if isinstance(step, torch.Tensor) else step
    actual = derivatives(logits.cuda(), target.cuda(), oscillation, device_step, u.cuda(), v.cuda(), **options)
    for ours, theirs in zip(actual, expected, strict=True):
        near(ours, theirs, dtype)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_regime_equals_the_cpu(shape, dtype):
    rows, classes = shape
    compare(randn(*shape), labels(classes, rows, ignored=rows > 1), Oscillation(classes, 70, 100), 1234, dtype)


@pytest.mark.parametrize("classes", [3, 10, 40, 1100])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("normalization", ["samples", "weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [50, 2000])
def test_options_equal_the_cpu(classes, reduction, normalization, smoothing, rows):
    options = {"reduction": reduction, "normalization": normalization, "label_smoothing": smoothing}
    target = labels(classes, rows, ignored=True)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(1)).tolist()
    for oscillation in (
        Oscillation(classes, 20, 13, waveform="sine", class_order=order),
        Oscillation(classes, 20, 12.5, closed=True, waveform="square", stop_step=40),
        Oscillation.from_table(randn(4, classes).abs()),
    ):
        for dtype in (torch.float32, torch.float64):
            compare(randn(rows, classes), target, oscillation, 33, dtype, **options)


@pytest.mark.parametrize("classes", [3, 40, 1100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [7, 3000])
def test_ensembles_equal_the_cpu(classes, shared, rows):
    oscillation = Oscillation(classes, torch.tensor([2.0, 30.0, 70.0]), torch.tensor([5, 100, 7]))
    target = labels(classes, *([rows] if shared else [3, rows]), ignored=True)
    for step in (77, torch.tensor([3, 50, 1000])):
        for reduction in ("mean", "none"):
            compare(randn(3, rows, classes), target, oscillation, step, torch.float32, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 40])
def test_layouts_equal_the_cpu(classes, dtype):
    oscillation = Oscillation(classes, 9, 10)
    images = randn(4, classes, 9, 7)
    target = labels(classes, 4, 9, 7, ignored=True)
    compare(images, target, oscillation, 3, dtype)
    compare(images.to(memory_format=torch.channels_last), target, oscillation, 3, dtype)
    compare(images[:, :, ::2], target[:, ::2], oscillation, 3, dtype)
    rows = randn(classes, 300).t()
    compare(rows, labels(classes, 300), oscillation, 3, dtype)
    compare(randn(classes), torch.tensor(classes - 1), oscillation, 3, dtype)
    # Rows that do not begin at multiples of 16 bytes.
    logits = randn(301 * classes + 1)[1:].view(301, classes).to(dtype)
    target = labels(classes, 301)
    expected = loss_and_gradient(logits.double(), target, oscillation, 3)
    storage = torch.empty(301 * classes + 1, device="cuda", dtype=dtype)
    misaligned = storage[1:].view(301, classes).copy_(logits)
    for ours, theirs in zip(loss_and_gradient(misaligned, target.cuda(), oscillation, 3), expected, strict=True):
        near(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_target_dtypes(dtype):
    target = labels(10, 2000)
    compare(randn(2000, 10), target.to(dtype), Oscillation(10, 70, 100), 5, torch.float32, ignore_index=3)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rows", [100, 70_000])
def test_gradient_of_a_scaled_loss_in_float16(rows, keep):
    logits, target = randn(rows, 10).half(), labels(10, rows)
    oscillation = Oscillation(10, 70, 100)
    leaf = logits.cuda().requires_grad_()
    loss = dynamic_cross_entropy(leaf, target.cuda(), oscillation, 7)
    (gradient,) = torch.autograd.grad(loss * rows, leaf, retain_graph=keep)
    _, expected = loss_and_gradient(logits.double(), target, oscillation, 7)
    near(gradient, expected * rows, torch.float16)


@pytest.mark.parametrize("rows", [40, 5000])
@pytest.mark.parametrize("keep", [False, True])
def test_all_ignored(rows, keep):
    logits = torch.full((rows, 10), float("nan"), device="cuda", requires_grad=True)
    target = torch.full((rows,), -100, device="cuda")
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss = dynamic_cross_entropy(logits, target, Oscillation(10, 70, 100), 7, reduction=reduction)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=keep)
        assert not gradient.any()


@pytest.mark.parametrize("classes", [10, 100, 1100])
@pytest.mark.parametrize("rows", [20, 3000])
def test_target_out_of_range_is_nan_and_touches_nothing_else(classes, rows):
    logits = randn(rows, classes, dtype=torch.float32).cuda().requires_grad_()
    target = labels(classes, rows).cuda()
    oscillation = Oscillation(classes, 70, 100)
    _, expected = loss_and_gradient(logits, target, oscillation, 3, reduction="sum")
    target[1], target[2] = classes, -(2**40)
    loss = dynamic_cross_entropy(logits, target, oscillation, 3, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isnan() and gradient[1:3].isnan().all()
    assert torch.equal(gradient[3:], expected[3:])
    torch.cuda.synchronize()


def test_checked_targets_raise():
    code = (
        "import torch, dynloss_ext as d\n"
        "try: d.dynamic_cross_entropy(torch.zeros(4, 3).cuda(), torch.tensor([0, 1, 3, 2]).cuda(), "
        "d.Oscillation(3, 2, 5), 0)\n"
        "except IndexError as error: assert 'class index 3 at position 2' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "DYNLOSS_CHECK": "1"})


@pytest.mark.parametrize("classes", [3, 10, 40, 1100, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_in_the_place_of_the_logits(classes, dtype):
    oscillation = Oscillation(classes, 70, 100)
    target = labels(classes, 300).cuda()
    leaf = randn(300, classes, dtype=dtype).cuda().requires_grad_()
    gradients = []
    for inplace in (False, True):
        criterion = DynamicCrossEntropyLoss(oscillation, inplace_gradient=inplace).cuda()
        leaf.grad = None
        criterion(leaf * 2, target).backward()
        gradients.append(leaf.grad)
    if dtype == torch.float16:  # rounded a second time when it is divided by the number of samples
        near(gradients[1], gradients[0], dtype)
    else:
        assert torch.equal(*gradients)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_in_the_place_of_logits_with_gaps(dtype, ignored):
    oscillation, rows = Oscillation(5, 70, 100), 70_000
    target = torch.full((rows,), -100) if ignored else labels(5, rows)
    wide = randn(rows, 8, dtype=dtype).cuda().requires_grad_()
    _, expected = loss_and_gradient(wide.detach()[:, :5].double().cpu(), target, oscillation, 0)
    output = wide * 1
    loss = DynamicCrossEntropyLoss(oscillation, inplace_gradient=True).cuda()(output[:, :5], target.cuda())
    (gradient,) = torch.autograd.grad(loss * rows, wide)
    near(gradient[:, :5], torch.zeros_like(expected) if ignored else expected * rows, dtype)
    assert not gradient[:, 5:].any()


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    classes, rows = 10, 2**31 // 10 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * classes + 8 * rows:
        pytest.skip("needs 15 GB of free device memory")
    logits = torch.zeros(rows, classes, device="cuda", dtype=torch.bfloat16)
    logits[-1] = randn(classes).bfloat16().cuda()
    target = torch.zeros(rows, device="cuda", dtype=torch.int64)
    oscillation = Oscillation(classes, 70, 100)
    _, gradient = loss_and_gradient(logits, target, oscillation, 3, reduction="sum")
    _, expected = loss_and_gradient(logits[-2:].double().cpu(), target[-2:].cpu(), oscillation, 3, reduction="sum")
    near(gradient[-2:], expected, torch.bfloat16)


# ---- streams, graphs, launches


def test_same_bits_on_every_run_and_stream():
    logits, target = randn(20000, 10, dtype=torch.float32).cuda(), labels(10, 20000, ignored=True).cuda()
    oscillation = Oscillation(10, 70, 100)
    loss, gradient = loss_and_gradient(logits, target, oscillation, 7)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(loss_and_gradient(logits, target, oscillation, 7))
    torch.cuda.synchronize()
    assert all(torch.equal(x, loss) and torch.equal(y, gradient) for x, y in results)


@pytest.mark.parametrize("rows", [512, 20000])
def test_replayed_graph_advances_the_oscillation(rows):
    logits = randn(rows, 10, dtype=torch.float32).cuda().requires_grad_()
    target = labels(10, rows, ignored=True).cuda()
    criterion = DynamicCrossEntropyLoss(Oscillation(10, 70, 10)).cuda()

    def training_step():
        logits.grad = None
        loss = criterion(logits, target)
        loss.backward()
        criterion.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step()
    criterion.current_step.zero_()
    captured = logits.grad
    for step in range(30):
        graph.replay()
        expected, gradient = loss_and_gradient(logits.detach(), target, criterion.oscillation, step)
        torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=0)
        torch.testing.assert_close(captured, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("module", [False, True])
def test_function_of_the_user_is_refused_in_a_graph(module, where):
    code = (
        "import torch, dynloss_ext as d\n"
        f"o = d.Oscillation.from_function(lambda step: torch.ones(3, device='{where}'), 3)\n"
        "x, y = torch.zeros(4, 3).cuda(), torch.zeros(4, dtype=torch.int64).cuda()\n"
        "criterion = d.DynamicCrossEntropyLoss(o).cuda()\n"
        f"loss = (lambda: criterion(x, y)) if {module} else (lambda: d.dynamic_cross_entropy(x, y, o, 3))\n"
        "loss()\n"
        "try:\n"
        "    with torch.cuda.graph(torch.cuda.CUDAGraph()): loss()\n"
        "except Exception as error: print(error)\n"
        "else: raise SystemExit('captured a constant, silently')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_waits_for_the_device():
    logits = randn(20000, 10, dtype=torch.float32).cuda().requires_grad_()
    target, step = labels(10, 20000).cuda(), torch.tensor(3, device="cuda")
    oscillation = Oscillation(10, 70, 10)
    dynamic_cross_entropy(logits, target, oscillation, step).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = dynamic_cross_entropy(logits, target, oscillation, step)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        torch.autograd.grad(gradient.sum(), logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(300, 3), (512, 10), (65536, 10), (4096, 1000), (64, 32000)], ids=str)
def test_one_launch_for_loss_and_gradient_and_one_to_scale_it(shape):
    logits = randn(*shape, dtype=torch.float32).cuda().requires_grad_()
    target = labels(shape[1], shape[0]).cuda()
    oscillation = Oscillation(shape[1], 70, 10)
    dynamic_cross_entropy(logits, target, oscillation, 3).backward()
    logits.grad = None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        dynamic_cross_entropy(logits, target, oscillation, 3).backward()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in kernels if "dynloss" in name]
    assert len(ours) == 2
    # Beside ours only the 1 that backward begins with.
    assert len(kernels) <= 3, kernels
