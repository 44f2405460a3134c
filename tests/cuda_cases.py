"""Inputs on CUDA, and comparisons with the CPU in float64."""

from __future__ import annotations

import cross_entropy_cases
import pytest
import torch

from dynloss_ext import dynamic_cross_entropy

#: The marks of tests that launch kernels of ours.
NEEDS_KERNELS = [
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


def labels(classes, *shape, seed=0, ignored=False):
    target = cross_entropy_cases.labels(classes, *shape, seed=seed)
    if ignored:
        target.view(-1)[::5] = -100
    return target


def near(actual, expected, dtype, least=1e-30):
    """Within some roundings of the largest element expected, or of `least`, where that is smaller."""
    expected = expected.double().cpu()
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), least) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double().cpu() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype], equal_nan=True
    )


def derivatives(logits, target, oscillation, step, u, v, **options):
    """Loss, gradient by a plain backward and by create_graph, Hessian·v and third·u·v of the summed loss."""
    leaf = logits.detach().requires_grad_()
    loss = dynamic_cross_entropy(leaf, target, oscillation, step, **options)
    (plain,) = torch.autograd.grad(loss.sum(), leaf)
    loss = dynamic_cross_entropy(leaf, target, oscillation, step, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    (hessian,) = torch.autograd.grad((gradient * v).sum(), leaf, create_graph=True)
    (third,) = torch.autograd.grad((hessian * u).sum(), leaf)
    return loss.detach(), plain, gradient.detach(), hessian.detach(), third


def compare(logits, target, oscillation, step, dtype, *, place=torch.Tensor.cuda, **options):
    """The op on the device in `dtype` against the CPU in float64, at the values that `dtype` can hold.

    `place` brings logits and directions to the device.
    """
    logits = logits.to(dtype)
    u, v = (torch.randn_like(logits, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = derivatives(logits.double(), target, oscillation, step, u.double(), v.double(), **options)
    device_step = step.cuda() if isinstance(step, torch.Tensor) else step
    on_device = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    actual = derivatives(place(logits), target.cuda(), oscillation, device_step, place(u), place(v), **on_device)
    # With one class every derivative is 0, and the third what u·v - u·v leaves of its rounding.
    single = logits.dim() == 2 and logits.shape[1] == 1
    least = (u.double() * v.double()).abs().max().item() / len(logits) if single else 1e-30
    for ours, theirs in zip(actual, expected, strict=True):
        near(ours, theirs, dtype, least)


def launched_by(call):
    """The names of what a call runs on the device, after one to warm up."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
