"""What a training step allocates, and tensors of more elements than 32 bits can count."""

from pathlib import Path

import pytest
import torch
from cross_entropy_cases import labels, normal

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient


def peak_of(function):
    """The most bytes that were allocated at once, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, bytes_ in sorted(changes, key=lambda change: change[0]):
        held += bytes_
        peak = max(peak, held)
    return peak


SHAPES = {"rows": (20_000, 10), "long rows": (200, 1000), "images": (20, 10, 1000), "ensemble": (4, 5000, 10)}


CASES = [(s, d) for s in SHAPES for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"normalization": "weights", "label_smoothing": 0.1}], ids=["plain", "smooth"])
def test_a_training_step_holds_one_gradient_at_most(dtype, shape, factor, options):
    ensemble, shape = shape == "ensemble", SHAPES[shape]
    classes = shape[2] if ensemble else shape[1]
    oscillation = Oscillation(classes, torch.linspace(2, 9, 4) if ensemble else 9, 10)
    logits = normal(*shape, dtype=dtype).requires_grad_()
    target = labels(classes, shape[1]) if ensemble else labels(classes, shape[0], *shape[2:])
    size = logits.numel() * logits.element_size()
    slack = 8 * target.numel() // 4 + 65536  # what is small: sums of chunks, Γ

    def training_step():
        loss = dynamic_cross_entropy(logits, target, oscillation, 3, **options)
        (factor * loss.sum()).backward()

    training_step()
    logits.grad = None
    assert size <= peak_of(training_step) <= size + slack
    with torch.no_grad():
        assert peak_of(lambda: dynamic_cross_entropy(logits, target, oscillation, 3, **options)) <= slack
    criterion = DynamicCrossEntropyLoss(oscillation, inplace_gradient=True, **options)
    hidden = logits * 1

    def inplace_step():
        (gradient,) = torch.autograd.grad(factor * criterion(hidden, target).sum(), hidden)
        assert gradient.data_ptr() == hidden.data_ptr()

    assert peak_of(inplace_step) <= slack


def test_the_peak_would_show_a_second_gradient():
    logits, target = normal(20_000, 10).requires_grad_(), labels(10, 20_000)
    size = logits.numel() * logits.element_size()

    def kept():
        loss = dynamic_cross_entropy(logits, target, Oscillation(10, 9, 10), 3)
        torch.autograd.grad(3 * loss, logits, retain_graph=True)

    assert peak_of(kept) >= 2 * size


def available_memory():
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [32, 32_768])
def test_more_than_2_to_the_31_elements(classes):
    """The loss, and the gradient in the place of the logits: 4 GiB each."""
    if available_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    rows = 2**31 // classes + 3
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16)
    last = normal(5, classes, dtype=torch.bfloat16)
    logits[-5:] = last
    target = torch.zeros(rows, dtype=torch.int64)
    target[-5:] = labels(classes, 5)
    oscillation = Oscillation(classes, 9, 10)
    rows_loss, gradient = loss_and_gradient(last, target[-5:], oscillation, 3, reduction="sum")
    expected = rows_loss.double() + (rows - 5) * oscillation.weights(3)[0] * torch.tensor(float(classes)).log()
    loss = dynamic_cross_entropy(logits, target, oscillation, 3, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    clock, class_order, table = oscillation.on(logits.device)
    arguments = (target, 3, None, clock, class_order, table, None, 2, False, -100, 0.0)
    torch.ops.dynloss.cross_entropy_into_logits(logits, *arguments)
    assert torch.equal(logits[-5:], gradient)
    zeros = torch.zeros(1, classes, dtype=torch.bfloat16)
    _, of_zeros = loss_and_gradient(zeros, target[:1], oscillation, 3, reduction="sum")
    for row in (0, rows // 2, rows - 6):
        assert torch.equal(logits[row], of_zeros[0])
