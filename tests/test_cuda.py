"""The ops on a CUDA device against the CPU's, in float64, and bad targets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cross_entropy_cases import normal as randn
from cuda_cases import DTYPES, NEEDS_KERNELS, SHAPES, compare, labels, launched_by, near

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient, reference

pytestmark = NEEDS_KERNELS


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
        Oscillation(classes, 20, 12, closed=True, waveform="square", stop_step=40),
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
@pytest.mark.parametrize("classes", [2, 3, 10, 40, 1100, 10000])
@pytest.mark.parametrize("normalization", ["samples", "weights"])
def test_weights_of_classes_equal_the_cpu(classes, normalization, dtype):
    ensemble = Oscillation(classes, torch.tensor([2.0, 30.0, 70.0]), torch.tensor([5, 100, 7]))
    target, weight = labels(classes, 70, ignored=True), randn(3, classes, seed=1, dtype=dtype).abs() + 0.1
    options = {"normalization": normalization, "label_smoothing": 0.1}
    for step in (77, torch.tensor(77)):
        compare(randn(70, classes), target, Oscillation(classes, 70, 100), step, dtype, weight=weight[0], **options)
    for own in (weight[0], weight):
        compare(randn(3, 70, classes), target, ensemble, torch.tensor([3, 50, 1000]), dtype, weight=own, **options)


@pytest.mark.parametrize("rows", [300, 20000, 600_000])
def test_weights_of_classes_add_one_launch(rows):
    logits, target, weight = randn(rows, 10, dtype=torch.float32).cuda(), labels(10, rows).cuda(), torch.rand(10).cuda()
    oscillation = Oscillation(10, 70, 10)

    def call(**options):
        return loss_and_gradient(logits, target, oscillation, 3, **options)

    plain, weighted = launched_by(call), launched_by(lambda: call(weight=weight))
    assert len(weighted) == len(plain) + 1
    assert len([name for name in weighted if "weigh_classes" in name]) == 1
    near(call(weight=torch.ones(10).cuda())[1], call()[1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_probabilities_equal_the_cpu(reduction, dtype):
    options = {"reduction": reduction, "label_smoothing": 0.1}
    ensemble = Oscillation(10, torch.tensor([2.0, 30.0, 70.0]), torch.tensor([5, 100, 7]))
    for shape, dim, oscillation, step in (
        ((300, 10), 1, Oscillation(10, 20, 13), 33),
        ((4, 10, 9), 1, Oscillation.from_table(randn(4, 10).abs()), torch.tensor(7)),
        ((3, 50, 10), 2, ensemble, torch.tensor([3, 50, 1000])),
    ):
        logits, target = randn(*shape), randn(*shape, seed=1).softmax(dim).to(dtype)
        compare(logits, target, oscillation, step, dtype, **options)
        device_step = step.cuda() if isinstance(step, torch.Tensor) else step
        pair = loss_and_gradient(logits.to(dtype).cuda(), target.cuda(), oscillation, device_step, **options)
        expected = loss_and_gradient(logits, target.double(), oscillation, step, **options)
        for ours, theirs in zip(pair, expected, strict=True):
            near(ours, theirs, dtype)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("classes", [3, 10, 17, 32, 33, 100, 257, 1000, 1025, 4099, 60001])
def test_rows_that_do_not_begin_at_multiples_of_16_bytes(classes, offset, dtype):
    rows = 301 if classes < 1000 else 9

    def misaligned(x):
        storage = torch.empty(x.numel() + offset, device="cuda", dtype=dtype)
        return storage[offset:].view(x.shape).copy_(x)

    target = labels(classes, rows, ignored=True)
    compare(randn(rows, classes), target, Oscillation(classes, 9, 10), 3, dtype, place=misaligned)


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
        "except IndexError as error: assert 'got 3 at position 2' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "DYNLOSS_CHECK": "1"})


@pytest.mark.parametrize("classes", [3, 10, 40, 1100, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_in_the_place_of_the_logits(classes, dtype):
    oscillation = Oscillation(classes, 70, 100)
    target = labels(classes, 300).cuda()
    leaf = randn(300, classes, dtype=dtype).cuda().requires_grad_()
    for weight in (None, torch.rand(classes)):
        gradients = []
        for inplace in (False, True):
            criterion = DynamicCrossEntropyLoss(oscillation, weight=weight, inplace_gradient=inplace).cuda()
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
@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_offsets_beyond_32_bits(classes):
    rows = 2**31 // classes + 1000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * classes + 16 * rows:
        pytest.skip("needs 17 GB of free device memory")
    logits = torch.empty(rows, classes, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.randint(classes, (rows,), device="cuda")
    oscillation = Oscillation(classes, 70, 100)
    picked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
    some = (logits[picked].double().cpu(), target[picked].cpu(), oscillation, 3)
    arguments = (logits, target, 3, None, *oscillation.on(logits.device), None, 2, False, -100, 0.0, True)
    _, gradient, weights, normalizer = torch.ops.dynloss.cross_entropy_with_gradient(*arguments)
    near(gradient[picked], reference.gradient(*some, reduction="sum"), torch.bfloat16)
    del gradient
    product = torch.ops.dynloss.cross_entropy_derivative(
        None, logits, torch.ones((), device="cuda"), logits, target, weights, normalizer, -100, 0.0
    )
    near(product[picked], reference.hvp(*some, some[0], reduction="sum"), torch.bfloat16)
