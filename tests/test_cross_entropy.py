"""Values of the loss and its derivatives: against torch, the twins of reference.py, and at every numeric edge."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    DTYPES,
    OPTIONS,
    PROBLEMS,
    SHAPES,
    STRIDES,
    close,
    describe,
    labels,
    near,
    normal,
    strided,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient, reference

INF, NAN = math.inf, math.nan
REDUCTIONS = ["none", "mean", "sum"]


# ---- against torch


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 2, -1])
@pytest.mark.parametrize("shape", [(6, 5), (5,), (2, 5, 3), (2, 5, 3, 2), (5, 40), (3, 70)])
def test_plain_and_fixed_weights_equal_torch(shape, reduction, smoothing, ignore_index):
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = normal(*shape)
    target = labels(classes, *(shape[:1] + shape[2:] if len(shape) > 1 else ()))
    if ignore_index == -1:
        target.view(-1)[0] = -1
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": smoothing}
    gamma = torch.rand(1, classes, dtype=torch.float64) + 0.1
    for oscillation, weight in (
        (Oscillation(classes, 1, 10), torch.ones(classes, dtype=torch.float64)),
        (Oscillation(classes, 20, 10), Oscillation(classes, 20, 10).weights(13)),
        (Oscillation.from_table(gamma), gamma[0]),
    ):
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = dynamic_cross_entropy(ours, target, oscillation, 13, normalization="weights", **options)
        expected = F.cross_entropy(theirs, target, weight=weight, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss.sum(), ours)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), theirs)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13, equal_nan=True)


def test_mean_over_samples_is_the_papers_definition():
    logits, target, oscillation = normal(9, 4), labels(4, 9), Oscillation(4, 70, 100)
    target[3] = -100
    gamma, counted = oscillation.weights(130), target != -100
    rows = gamma[target.clamp(min=0)] * F.cross_entropy(logits, target, reduction="none")
    close(dynamic_cross_entropy(logits, target, oscillation, 130), rows.sum() / counted.sum())
    smooth = F.cross_entropy(logits, target, weight=gamma, label_smoothing=0.1, reduction="sum") / counted.sum()
    close(dynamic_cross_entropy(logits, target, oscillation, 130, label_smoothing=0.1), smooth)


# ---- against the twins


@pytest.mark.parametrize("options", OPTIONS, ids=describe)
@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_and_gradient_equal_the_twin(name, options):
    problem = PROBLEMS[name]
    x = problem.leaf()
    loss = problem.loss(x, **options)
    close(loss.detach(), problem.twin(problem.logits, **options))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    close(gradient, problem.gradient(**options))
    (twin_gradient,) = torch.autograd.grad(problem.twin(y := problem.leaf(), **options).sum(), y)
    close(gradient, twin_gradient)
    both = loss_and_gradient(problem.logits, problem.target, problem.oscillation, problem.step, **options)
    close(both[0], loss.detach())
    close(both[1], gradient)
    assert not both[0].requires_grad


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(STRIDES),
    direction_layout=st.sampled_from(STRIDES[:-1]),
    target_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    options=st.sampled_from(OPTIONS),
    step=st.integers(-3, 10**12),
    ignored=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_dtype_stride_and_option(
    shape, dtype, layout, direction_layout, target_dtype, options, step, ignored, seed
):
    ensemble = shape[-1] == "ensemble"
    shape = shape[:3] if ensemble else shape
    class_dim = 2 if ensemble else min(1, len(shape) - 1)
    classes = shape[class_dim]
    oscillation = Oscillation(classes, torch.linspace(1, 9, shape[0]) if ensemble else 9, 17)
    logits = strided(3 * normal(*shape, seed=seed, dtype=dtype), layout)
    sample_shape = shape[:class_dim] + shape[class_dim + 1 :]
    target = labels(min(classes, 256), *sample_shape, seed=seed)
    options = dict(options, ignore_index=int(target.view(-1)[0]) if ignored and target.numel() else 255)
    if classes > 255 and not ignored:
        options["ignore_index"] = 256
    target = strided(target, "sliced").to(target_dtype) if target.dim() else target.to(target_dtype)

    exact = logits.detach().double()
    twin_arguments = (exact, target.long(), oscillation, step)
    # What lse and the logit, or p and the one-hot target, are multiplied by before they cancel.
    size = oscillation.weights(step).max().item() / (max(1, target.numel()) if options["reduction"] == "mean" else 1)
    x = logits.detach().requires_grad_()
    loss = dynamic_cross_entropy(x, target, oscillation, step, **options)
    expected = reference.cross_entropy(*twin_arguments, **options)
    unreduced = options["reduction"] == "none" or dtype == torch.float64
    assert loss.dtype == (dtype if unreduced else torch.float32)
    if not expected.isnan().any():
        loss_dtype = dtype if options["reduction"] == "none" else torch.promote_types(dtype, torch.float32)
        near(loss.detach(), expected, loss_dtype, size=size)
    else:
        torch.testing.assert_close(loss.detach().double(), expected, equal_nan=True, rtol=1e-5, atol=1e-5)

    (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    assert gradient.dtype == dtype
    near(gradient, reference.gradient(*twin_arguments, **options), dtype, size=size)
    u, v = (strided(normal(*shape, seed=seed + i, dtype=dtype), direction_layout) for i in (1, 2))
    (g,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (hv,) = torch.autograd.grad(g, x, v, create_graph=True)
    near(hv.detach(), reference.hvp(*twin_arguments, v.double(), **options), dtype, size=2 * size)
    (third,) = torch.autograd.grad(hv, x, u)
    near(third, reference.third(*twin_arguments, u.double(), v.double(), **options), dtype, size=4 * size)


@pytest.mark.parametrize("classes", [1025, 32_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_class_counts(classes, dtype):
    logits, target, v = 4 * normal(3, classes, dtype=dtype), labels(classes, 3), normal(3, classes, seed=1, dtype=dtype)
    oscillation = Oscillation(classes, 1000, 10)
    arguments = (logits.double(), target, oscillation, 10 * int(target[1]) + 5)
    x = logits.clone().requires_grad_()
    loss = dynamic_cross_entropy(x, *arguments[1:])
    near(loss.detach(), reference.cross_entropy(*arguments), torch.promote_types(dtype, torch.float32), classes)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    near(gradient.detach(), reference.gradient(*arguments), dtype, terms=classes)
    (hv,) = torch.autograd.grad(gradient, x, v)
    near(hv, reference.hvp(*arguments, v.double()), dtype, terms=classes)


@pytest.mark.parametrize("classes", [3, 10, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heavy_smoothing(classes, dtype):
    """So heavy that half types, too, show where ε / C is missing from a single entry."""
    logits, target, oscillation = normal(9, classes, dtype=dtype), labels(classes, 9), Oscillation(classes, 9, 10)
    arguments, options = (logits.double(), target, oscillation, 13), {"label_smoothing": 0.9}
    x = logits.clone().requires_grad_()
    loss = dynamic_cross_entropy(x, *arguments[1:], **options)
    near(loss.detach(), reference.cross_entropy(*arguments, **options), torch.promote_types(dtype, torch.float32))
    for gradient in (
        loss_and_gradient(logits, *arguments[1:], **options)[1],
        torch.autograd.grad(loss, x, create_graph=True)[0].detach(),
        torch.autograd.grad(loss, x)[0],
    ):
        near(gradient, reference.gradient(*arguments, **options), dtype)


@pytest.mark.parametrize("rows", [1, 5, 8, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_class_in_padded_planes_stays_within_its_memory(dtype, rows):
    """(N, 1, d) whose planes are apart: one class, walked along d, with a class stride that means nothing."""
    guarded = torch.full((2, 3, rows + 1), 7.0, dtype=dtype)
    logits = guarded[:, 1:2, :rows]
    gradient = loss_and_gradient(logits, torch.zeros(2, rows, dtype=torch.int64), Oscillation(1, 5, 10), 3)[1]
    assert (gradient == 0).all()
    out = torch.full((2, 3, rows + 1), 7.0, dtype=dtype)
    view = out[:, 1:2, :rows]
    criterion = DynamicCrossEntropyLoss(Oscillation(1, 5, 10), inplace_gradient=True)
    x = torch.zeros(2, 1, rows, dtype=dtype, requires_grad=True)
    criterion(view.copy_(x), torch.zeros(2, rows, dtype=torch.int64)).backward()
    out[:, 1:2, :rows] = 7.0
    assert (out == 7.0).all(), "nothing was written beside the view"


def test_row_offsets_beyond_32_bits():
    """Rows 2**30 elements apart: a lazily mapped storage of which only the pages of the rows are touched."""
    small = normal(5, 3, dtype=torch.bfloat16)
    huge = torch.empty(2**32 + 8, dtype=torch.bfloat16)
    target, oscillation = labels(3, 5), Oscillation(3, 5, 10)
    want = loss_and_gradient(small, target, oscillation, 3)
    for strides in ((2**30, 1), (1, 2**31)):
        far = huge.as_strided((5, 3), strides).copy_(small)
        loss, gradient = loss_and_gradient(far, target, oscillation, 3)
        assert torch.equal(loss, want[0])
        assert torch.equal(gradient, want[1])


# ---- numeric edges: row 1 of three holds the special value, its label is 1

EDGES = {
    "+inf": (1, 2, INF),
    "+inf at the label": (1, 1, INF),
    "all -inf": (1, slice(None), -INF),
    "-inf at the label": (1, 1, -INF),
    "-inf elsewhere": (1, 0, -INF),
    "NaN": (1, 0, NAN),
    "NaN at the label": (1, 1, NAN),
    "all but one -inf": (1, slice(1, None), -INF),
    "huge": (1, 2, 1e30),
    "hugely negative": (1, slice(None), -1e30),
}


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("edge", EDGES)
def test_special_values_behave_as_in_torch(edge, dtype, classes, smoothing):
    row, column, value = EDGES[edge]
    logits, target = normal(3, classes, dtype=dtype), torch.tensor([0, 1, 2])
    logits[row, column] = value
    oscillation = Oscillation(classes, 5, 10)
    weight = oscillation.weights(3).to(dtype)
    for reduction in REDUCTIONS:
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = dynamic_cross_entropy(
            ours, target, oscillation, 3, reduction=reduction, normalization="weights", label_smoothing=smoothing
        )
        expected = F.cross_entropy(theirs, target, weight=weight, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss.sum(), ours)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), theirs)
        torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)
        other = gradient[[0, 2]]
        assert other.isfinite().all(), "a row never spoils its neighbours"


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_at_minus_infinity_has_infinite_loss_and_finite_gradient(dtype):
    x = torch.tensor([[0.0, -INF, 1.0]], dtype=dtype).requires_grad_()
    loss = dynamic_cross_entropy(x, torch.tensor([1]), Oscillation(3, 5, 10), 3)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss == INF
    assert gradient.isfinite().all()
    assert gradient[0, 1] < 0


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_row_never_contributes(dtype, value, classes):
    logits, target = normal(5, classes, dtype=dtype), labels(3, 5)
    logits[2], target[2] = value, -100
    oscillation = Oscillation(classes, 5, 10)
    kept = [0, 1, 3, 4]
    for options in OPTIONS:
        x, y = logits.clone().requires_grad_(), logits[kept].clone().requires_grad_()
        loss = dynamic_cross_entropy(x, target, oscillation, 3, **options)
        expected = dynamic_cross_entropy(y, target[kept], oscillation, 3, **options)
        if options["reduction"] == "none":
            assert loss[2] == 0
            loss = loss[kept]
        torch.testing.assert_close(loss, expected)
        v = torch.full_like(x, 2.0)
        v[2] = value
        for a, b, w in ((loss, x, v), (expected, y, v[kept])):
            (g,) = torch.autograd.grad(a.sum(), b, create_graph=True)
            (h,) = torch.autograd.grad(g, b, torch.nan_to_num(w, 2.0, 2.0, 2.0))
            if b is x:
                mine = (g.detach(), h)
            else:
                torch.testing.assert_close(mine[0][kept], g.detach())
                torch.testing.assert_close(mine[1][kept], h)
        assert (mine[0][2] == 0).all()
        assert (mine[1][2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [False, True])
def test_all_ignored_is_nan_for_mean_and_zero_for_sum(dtype, keep):
    target = torch.full((6,), -100)
    for classes in (3, 40):
        for reduction, expected in (("none", 0.0), ("sum", 0.0), ("mean", NAN)):
            for scale in (1.0, 3.0):
                x = normal(6, classes, dtype=dtype).requires_grad_()
                loss = dynamic_cross_entropy(x, target, Oscillation(classes, 5, 10), 3, reduction=reduction)
                torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)
                (gradient,) = torch.autograd.grad(scale * loss.sum(), x, retain_graph=keep)
                assert (gradient == 0).all(), (reduction, scale)


@pytest.mark.parametrize("shape", [(0, 3), (0, 1), (0, 40), (0, 3, 4), (2, 3, 0), (2, 0, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(shape, reduction):
    oscillation, sample_shape = Oscillation(shape[1], 5, 10) if shape[1] else None, shape[:1] + shape[2:]
    if oscillation is None:  # an ensemble without samples
        oscillation, sample_shape = Oscillation(3, torch.tensor([2.0, 3.0]), 10), (0,)
    x = torch.empty(shape, requires_grad=True)
    loss = dynamic_cross_entropy(x, torch.empty(sample_shape, dtype=torch.int64), oscillation, 3, reduction=reduction)
    assert loss.numel() == 0 or bool((loss.isnan() if reduction == "mean" else loss == 0).all())
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (hv,) = torch.autograd.grad(gradient.sum(), x)
    assert gradient.shape == hv.shape == x.shape


def test_one_class_has_zero_loss_and_gradient():
    x = normal(5, 1).requires_grad_()
    loss = dynamic_cross_entropy(x, torch.zeros(5, dtype=torch.int64), Oscillation(1, 5, 10), 3)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss == 0
    assert (gradient == 0).all()


def test_zero_total_weight_is_nan_as_in_torch():
    table = Oscillation.from_table(torch.tensor([[0.0, 0.0, 1.0]]))
    loss = dynamic_cross_entropy(normal(4, 3), torch.tensor([0, 1, 0, 1]), table, 0, normalization="weights")
    assert loss.isnan()
    assert dynamic_cross_entropy(normal(4, 3), torch.tensor([0, 1, 0, 1]), table, 0) == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_target_dtypes_agree_and_out_of_range_names_index_and_position(dtype):
    logits, oscillation = normal(6, 4), Oscillation(4, 5, 10)
    target = torch.tensor([0, 1, 2, 3, 1, 0])
    expected = dynamic_cross_entropy(logits, target, oscillation, 3)
    assert torch.equal(dynamic_cross_entropy(logits, target.to(dtype), oscillation, 3), expected)
    target[4] = 4
    with pytest.raises(IndexError, match=r"target: expected class indices from 0 to 3, got 4 at position 4"):
        dynamic_cross_entropy(logits, target.to(dtype), oscillation, 3)
    if dtype != torch.uint8:
        target[4] = -1
        with pytest.raises(IndexError, match=r"target: expected class indices from 0 to 3, got -1 at position 4"):
            dynamic_cross_entropy(logits, target.to(dtype), oscillation, 3)
    target[4] = 4
    assert dynamic_cross_entropy(logits, target.to(dtype), oscillation, 3, ignore_index=4).isfinite()


# ---- half types


@pytest.mark.parametrize("rows", [65_536, 70_000])
@pytest.mark.parametrize("normalization", ["samples", "weights"])
def test_mean_of_many_float16_rows(rows, normalization):
    """torch's weighted mean in float16 is NaN at 65,536 rows, and its gradient exactly 0 at 70,000."""
    logits, target = normal(rows, 3, dtype=torch.float16), labels(3, rows)
    oscillation = Oscillation(3, 5, 10)
    x = logits.clone().requires_grad_()
    loss = dynamic_cross_entropy(x, target, oscillation, 13, normalization=normalization)
    arguments = (logits.double(), target, oscillation, 13)
    expected = reference.cross_entropy(*arguments, normalization=normalization)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = reference.gradient(*arguments, normalization=normalization)
    (scaled,) = torch.autograd.grad(loss * 65536.0, x, retain_graph=True)
    near(scaled, gradient * 65536, torch.float16)
    assert (scaled != 0).float().mean() > 0.999
    (plain,) = torch.autograd.grad(loss, x)
    assert (plain.double() - gradient).abs().max() <= 1.001 * 2**-25, "half a unit of float16's smallest number"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
def test_grad_output_is_not_rounded_to_the_half_type(dtype, keep):
    """A factor that the type cannot hold: 1 + 2**-12, whose rounding would be seen after 1/3 of ulp cancels."""
    logits, target, oscillation = normal(64, 10, dtype=dtype), labels(10, 64), Oscillation(10, 5, 10)
    factor = 1 / 3
    x = logits.clone().requires_grad_()
    loss = dynamic_cross_entropy(x, target, oscillation, 3, reduction="sum")
    (gradient,) = torch.autograd.grad(loss * factor, x, retain_graph=keep)
    expected = factor * reference.gradient(logits.double(), target, oscillation, 3, reduction="sum")
    error = ((gradient.double() - expected).abs() / expected.abs()).max()
    assert error <= 1.02 * torch.finfo(dtype).eps, "two roundings to nearest at most, of the gradient and the product"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_returns_float32_as_torch(dtype, reduction):
    logits, target, oscillation = normal(8, 4, dtype=dtype), labels(4, 8), Oscillation(4, 5, 10)
    x = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = dynamic_cross_entropy(x, target, oscillation, 3, reduction=reduction, normalization="weights")
        expected = F.cross_entropy(logits, target, weight=oscillation.weights(3).float(), reduction=reduction)
        assert dynamic_cross_entropy(logits.double(), target, oscillation, 3).dtype == torch.float64
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected)
    loss.sum().backward()
    assert x.grad.dtype == dtype
    near(
        x.grad,
        reference.gradient(logits.double(), target, oscillation, 3, reduction=reduction, normalization="weights"),
        dtype,
    )


# ---- determinism

BITS = """
import hashlib, sys, torch
from dynloss_ext import Oscillation, dynamic_cross_entropy
digest = hashlib.sha256()
values = []
for shape in ((70_000, 3), (3_000, 50), (40, 5_000), (64, 3, 500), (5, 3_000, 10)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        ensemble = shape[0] == 5
        classes = shape[2] if ensemble else shape[1]
        target = torch.randint(classes, (shape[1],) if ensemble else shape[:1] + shape[2:], generator=generator)
        oscillation = Oscillation(classes, torch.linspace(1, 9, 5) if ensemble else 9, 17)
        loss = dynamic_cross_entropy(x, target, oscillation, 40, label_smoothing=0.1)
        (g0,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        (g1,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        v = torch.randn(shape, generator=generator).to(dtype)
        (hv,) = torch.autograd.grad(g1, x, v)
        for result in (loss, g0, g1, hv):
            digest.update(result.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        values += [loss.double().sum().item(), g0.double().square().sum().item(), hv.double().square().sum().item()]
"""


def test_same_bits_on_every_run_and_for_every_number_of_threads():
    threads = torch.get_num_threads()
    digests = set()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            scope = {}
            exec(BITS, scope)
            digests.add(scope["digest"].hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def output_of(script, **variables):
    """The lines that a new process prints."""
    return run_python("-c", f"import torch\n{script}", **variables).splitlines()


def test_instruction_sets_agree_and_are_deterministic_each():
    results = {}
    for capability in ("default", "avx2", "avx512"):
        script = f"for threads in (1, 2):\n torch.set_num_threads(threads)\n exec({BITS!r})\n print(digest.hexdigest())"
        output = output_of(f"{script}\nprint(*values)", DYNLOSS_CPU_CAPABILITY=capability)
        assert output[0] == output[1], capability
        results[capability] = torch.tensor([float(v) for v in output[2].split()], dtype=torch.float64)
    for capability in ("avx2", "avx512"):
        torch.testing.assert_close(results[capability], results["default"], rtol=2e-5, atol=0)


THREADS = """
import os
import numpy as np
from dynloss_ext import Oscillation, dynamic_cross_entropy

torch.set_num_threads(2)
for rows in (2, 300, 1_000_000):
    logits = torch.from_numpy(np.zeros((rows, 3))).requires_grad_()  # torch.zeros would start threads
    target = torch.from_numpy(np.zeros(rows, dtype=np.int64))
    if rows == 2:  # starts the profiler's thread and whatever else torch starts once
        dynamic_cross_entropy(logits, target, Oscillation(3, 70.0, 5000), 7).backward()
    before = len(os.listdir("/proc/self/task"))
    dynamic_cross_entropy(logits, target, Oscillation(3, 70.0, 5000), 7).backward()
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_a_small_problem_starts_no_threads():
    """300 rows take less time than a second thread needs to wake up; a million are shared out."""
    assert output_of(THREADS) == ["0", "0", "1"]
