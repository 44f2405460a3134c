"""Rows that the model is sure of, rightly or wrongly, where p is rounded to 1: the loss and its derivatives keep the
digits of 1 - p. Against the definitions in 150 decimal places."""

import functools
import itertools
from decimal import Decimal, localcontext

import pytest
import torch
from cross_entropy_cases import labels, normal
from processes import run_python

from dynloss_ext import HessianOperator, Oscillation, dynamic_cross_entropy, eigsh, loss_and_gradient, reference
from dynloss_ext._C import cpu_instruction_set

STEP = 13
HALF_TYPES = (torch.float16, torch.bfloat16)
EPSILON = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def problems(classes):
    """Logits (N, C) and labels (N,): each class in turn is the one that stands out, and either it or another is
    the label."""
    rows, targets = [], []
    for scale, wrong in itertools.product((0, 1, 8, 16, 18, 25, 40, 80), (False, True)):
        z = normal(classes, seed=scale)
        top = (scale + wrong) % classes
        z[top] = z.max() + scale
        if scale == 25:
            z[(top + 1) % classes] = z[top]  # a tie
        rows.append(z)
        targets.append((top + wrong) % classes)
    if classes == 3:
        rows += [torch.tensor([18.0, 0, -1])] * 2
        targets += [0, 1]
    return torch.stack([z.bfloat16().double() for z in rows]), torch.tensor(targets)


def exact(z, label, gamma, smoothing, u, v):
    """Loss, gradient, Hessian·v and third·u·v of one row by their definitions, and what rounding errors of each are
    relative to."""
    with localcontext() as context:
        context.prec = 150
        z, gamma, u, v = ([Decimal(x) for x in row.tolist()] for row in (z, gamma, u, v))
        smoothing = Decimal(smoothing)
        q = [g * (((1 - smoothing) if c == label else 0) + smoothing / len(z)) for c, g in enumerate(gamma)]
        e = [x.exp() for x in z]
        p, total, lse = [x / sum(e) for x in e], sum(q), sum(e).ln()

        def mean(x):
            return sum(a * b for a, b in zip(p, x, strict=True))

        du, dv = [x - mean(u) for x in u], [x - mean(v) for x in v]
        covariance = mean([a * b for a, b in zip(du, dv, strict=True)])
        loss = [sum(a * (lse - b) for a, b in zip(q, z, strict=True))]
        gradient = [total * a - b for a, b in zip(p, q, strict=True)]
        hvp = [total * a * b for a, b in zip(p, dv, strict=True)]
        third = [total * a * (b * c - covariance) for a, b, c in zip(p, du, dv, strict=True)]
        size = [10 * total * a * (1 - a) for a in p]
        smoothed = smoothing * sum(gamma) / len(z)
        sizes = [[abs(x) for x in loss], [abs(x) + smoothed for x in gradient], size, size]
        return [torch.tensor([float(x) for x in values], dtype=torch.float64) for values in
                (loss, gradient, hvp, third, *sizes)]  # fmt: skip


@functools.cache  # all numbers are bfloat16, so that they are the same in every type
def exact_rows(classes, smoothing):
    z, target = problems(classes)
    u, v = (normal(*z.shape, seed=i, dtype=torch.bfloat16).double() for i in (5, 6))
    gamma = Oscillation(classes, 5, 10).weights(STEP)
    rows = [exact(z[i], target[i], gamma, smoothing, u[i], v[i]) for i in range(len(z))]
    values = [torch.stack(x) for x in zip(*rows, strict=True)]
    return z, target, u, v, values[:4], values[4:]


def derivatives(x, *arguments, u, v, **options):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = dynamic_cross_entropy(x, *arguments, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (hvp,) = torch.autograd.grad(gradient, x, v, create_graph=True)
    (third,) = torch.autograd.grad(hvp, x, u)
    saved = loss_and_gradient(x.detach(), *arguments, reduction="sum", **options)[1]
    return [loss.detach()[:, None], gradient.detach(), hvp.detach(), third], saved


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("classes", [2, 3, 10, 17, 40, 300])
def test_rows_have_the_digits_of_the_definition(classes, dtype, smoothing):
    z, target, u, v, expected, sizes = exact_rows(classes, smoothing)
    z, u, v = (x.to(dtype) for x in (z, u, v))
    oscillation = Oscillation(classes, 5, 10)
    # The logits' differences are rounded, to half a unit in the last place of a number up to 128.
    arithmetic = EPSILON[torch.float64 if dtype == torch.float64 else torch.float32]
    smallest = 1e-7 if dtype == torch.float16 else 1e-35
    layouts = (z, z.t().contiguous().t()) if classes <= 256 else (z,)
    for x in layouts:
        results, saved = derivatives(x, target, oscillation, STEP, u=u, v=v, label_smoothing=smoothing)
        for result, exactly, size in zip([*results, saved], [*expected, expected[1]], [*sizes, sizes[1]], strict=True):
            rounded = EPSILON[dtype] * exactly.abs() if dtype in HALF_TYPES else 0
            error = (result.double() - exactly).abs() - rounded
            assert bool((error <= 200 * arithmetic * size + smallest).all()), (error / size).max() / arithmetic


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_has_them_too(dtype, smoothing):
    """Also by autograd of its loss, in every order."""
    z, target, u, v, expected, sizes = exact_rows(3, smoothing)
    x, u, v = (x.to(dtype) for x in (z, u, v))
    x.requires_grad_()
    oscillation, options = Oscillation(3, 5, 10), {"reduction": "none", "label_smoothing": smoothing}
    arguments = (x.detach(), target, oscillation, STEP)
    by_hand = [
        reference.cross_entropy(*arguments, **options)[:, None],
        reference.gradient(*arguments, **options),
        reference.hvp(*arguments, v, **options),
        reference.third(*arguments, u, v, **options),
    ]
    loss_by_autograd = reference.cross_entropy(x, *arguments[1:], **options)
    (g,) = torch.autograd.grad(loss_by_autograd.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g, x, v, create_graph=True)
    (t,) = torch.autograd.grad(h, x, u)
    for results in (by_hand, [loss_by_autograd.detach()[:, None], g.detach(), h.detach(), t]):
        for result, exactly, size in zip(results, expected, sizes, strict=True):
            error = (result.double() - exactly).abs()
            assert bool((error <= 300 * EPSILON[dtype] * size + 1e-35).all()), (error / size).max() / EPSILON[dtype]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_on_every_instruction_set(capability):
    run = functools.partial(run_python, timeout=900, DYNLOSS_CPU_CAPABILITY=capability)

    if run("-c", "import dynloss_ext._C as c; print(c.cpu_instruction_set())").strip() != capability:
        pytest.skip(f"this machine has no {capability}")
    if capability == cpu_instruction_set():
        return  # by the tests above
    tests = f"{__file__}::test_rows_have_the_digits_of_the_definition"
    assert " passed" in run("-m", "pytest", "-q", "-x", tests, "-k", "0.2 and not 300")


def confident_clusters():
    """A network that is sure of nearly all of its points, and of some of them wrongly."""
    centers = torch.tensor([[1.0, 0], [-0.5, 0.9], [-0.5, -0.9]], dtype=torch.float64)
    target = labels(3, 200, seed=2)
    points = centers[target] + 0.05 * normal(200, 2, seed=3)
    target[:5] = (target[:5] + 1) % 3
    return points.float(), target, (11 * centers).float()


@pytest.mark.parametrize("wrong", [False, True])
def test_curvature_of_confident_clusters(wrong):
    points, target, weight = confident_clusters()
    if not wrong:
        points, target = points[5:], target[5:]
    oscillation = Oscillation(3, 70, 100)
    gamma = oscillation.weights(30)
    # H = (1/N) Σ_n Γ_n (diag p - p pᵀ) ⊗ x xᵀ, from differences of classes, which cancel nothing.
    x = points.double()
    p = torch.softmax(x @ weight.double().t(), -1)
    pairs = torch.eye(3, dtype=torch.float64)[:, None] - torch.eye(3, dtype=torch.float64)  # e_i - e_j
    cross = torch.einsum("ni,nj,ija,ijb->nab", p, p, pairs, pairs) / 2
    dense = torch.einsum("n,nab,nk,nl->akbl", gamma[target] / len(x), cross, x, x).reshape(6, 6)
    expected = torch.linalg.eigvalsh(dense)
    param = weight.clone().requires_grad_()
    loss = dynamic_cross_entropy(points @ param.t(), target, oscillation, 30)
    largest = eigsh(HessianOperator(loss, [param]), k=1, tol=1e-6).values
    torch.testing.assert_close(largest.double(), expected[-1:], rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(loss, param, create_graph=True)
    columns = [torch.autograd.grad(gradient, param, e.view(3, 2), retain_graph=True)[0] for e in torch.eye(6)]
    found = torch.stack([c.flatten() for c in columns]).double()
    assert torch.linalg.eigvalsh((found + found.t()) / 2).min() > -1e-5 * expected[-1]
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5 * float(expected[-1]))
