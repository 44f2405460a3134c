"""Targets of class probabilities: torch's own loss with the weights Γ, in value and every derivative."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import close, labels, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from dynloss_ext import (
    DynamicCrossEntropyLoss,
    HessianOperator,
    Oscillation,
    dynamic_cross_entropy,
    loss_and_gradient,
    reference,
)

OSCILLATION = Oscillation(4, 9, 10)
ENSEMBLE = Oscillation(4, torch.tensor([2.0, 5.0, 9.0]), torch.tensor([3, 10, 20]))
X, T = normal(6, 4), normal(6, 4, seed=1).softmax(1)


def probabilities(shape, dim, seed=1):
    return normal(*shape, seed=seed).softmax(dim)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from([(6, 5), (5,), (2, 5, 3), (2, 5, 3, 2), (1, 1), (3, 40), (0, 5), (2, 5, 0)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    amplitude=st.floats(1, 100),
    step=st.integers(0, 2**40),
    waveform=st.sampled_from(["triangle", "sine", "square"]),
    tensor_step=st.booleans(),
)
def test_equals_torch(shape, dtype, reduction, smoothing, amplitude, step, waveform, tensor_step):
    dim = int(len(shape) > 1)
    oscillation = Oscillation(shape[dim], amplitude, 7.5, waveform=waveform)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    x = normal(*shape, dtype=dtype).requires_grad_()
    target = probabilities(shape, dim).to(dtype).requires_grad_()
    exact, t = x.detach().double().requires_grad_(), target.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, t, weight=oscillation.weights(step), **options)
    used = torch.tensor(step) if tensor_step else step
    loss = dynamic_cross_entropy(x, target, oscillation, used, **options)
    assert loss.dtype == (dtype if reduction == "none" else torch.promote_types(dtype, torch.float32))
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 64 * eps, "atol": 64 * eps * oscillation.num_classes, "equal_nan": True}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    v = torch.ones_like(expected)
    gradients = torch.autograd.grad(loss, (x, target), v.to(loss.dtype))
    wanted = torch.autograd.grad(expected, (exact, t), v)
    for found, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found.double(), want, **tolerance)
    pair = loss_and_gradient(x, target, oscillation, used, **options)
    assert torch.equal(pair[0], loss) or loss.isnan().any()
    assert pair[1].dtype == dtype and not pair[0].requires_grad and not pair[1].requires_grad
    torch.testing.assert_close(pair[1].double(), wanted[0], **tolerance)
    if 0 not in shape:
        problem = (exact.detach(), t.detach(), oscillation, step)
        close(reference.cross_entropy(*problem, **options), expected, 1e-11)
        close(reference.gradient(*problem, **options), wanted[0], 1e-11)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step", [3, torch.tensor(13), torch.tensor([3, 14, 159])])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.2}, {"reduction": "none"}])
def test_ensembles_equal_their_members(shared, step, options):
    x, t = normal(3, 5, 4), probabilities((5, 4) if shared else (3, 5, 4), -1)
    loss = dynamic_cross_entropy(x, t, ENSEMBLE, step, **options)
    pair = loss_and_gradient(x, t, ENSEMBLE, step, **options)
    assert torch.equal(pair[0], loss)
    for e in range(3):
        member = Oscillation(4, float(ENSEMBLE.amplitude[e]), float(ENSEMBLE.period[e]))
        now = int(step[e]) if isinstance(step, torch.Tensor) and step.dim() else int(step)
        z = x[e].clone().requires_grad_()
        expected = F.cross_entropy(z, t if shared else t[e], weight=member.weights(now), **options)
        close(loss[e], expected)
        close(pair[1][e], torch.autograd.grad(expected.sum(), z)[0])
    close(loss, reference.cross_entropy(x, t, ENSEMBLE, step, **options))
    close(pair[1], reference.gradient(x, t, ENSEMBLE, step, **options))


@pytest.mark.parametrize("shape", [(6, 4), (4,), (2, 4, 3), (3, 5, 4)])
def test_one_hot_probabilities_equal_class_indices(shape):
    ensemble = shape[0] == 3
    oscillation, dim = ENSEMBLE if ensemble else OSCILLATION, -1 if ensemble or len(shape) == 1 else 1
    y = labels(4, *(n for d, n in enumerate(shape) if d != dim % len(shape)))
    one_hot = F.one_hot(y, 4).movedim(-1, dim).double()
    for options in ({}, {"reduction": "sum", "label_smoothing": 0.1}, {"reduction": "none"}):
        of_classes = loss_and_gradient(normal(*shape), y, oscillation, 7, **options)
        close(loss_and_gradient(normal(*shape), one_hot, oscillation, 7, **options), of_classes)


def test_one_hot_targets_of_integers_are_told_what_they_lack():
    with pytest.raises(ValueError, match=r"got \[6, 4\] of Long; class probabilities, as one-hot rows, are floating"):
        dynamic_cross_entropy(normal(6, 4), F.one_hot(labels(4, 6), 4), OSCILLATION, 7)
    with pytest.raises(ValueError, match=r"got \[6, 2\]$"):
        dynamic_cross_entropy(normal(6, 4), torch.zeros(6, 2, dtype=torch.int64), OSCILLATION, 7)


def test_every_derivative_in_every_mode():
    x, t, u, v = X.clone().requires_grad_(), T.clone().requires_grad_(), normal(6, 4, seed=2), normal(6, 4, seed=3)

    def loss(x, t=T, step=13):
        return dynamic_cross_entropy(x, t, OSCILLATION, step, label_smoothing=0.1)

    assert gradcheck(loss, (x, t), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(loss, (x, t), check_fwd_over_rev=True)
    problem = (X, T, OSCILLATION, 13)
    hvp = torch.func.jvp(torch.func.grad(loss), (X,), (v,))[1]
    close(hvp, reference.hvp(*problem, v, label_smoothing=0.1))
    close((torch.func.hessian(loss)(X).flatten(2).flatten(0, 1) @ v.flatten()).view(6, 4), hvp)
    third = torch.func.jvp(lambda z: torch.func.jvp(torch.func.grad(loss), (z,), (u,))[1], (X,), (v,))[1]
    close(third, reference.third(*problem, u, v, label_smoothing=0.1))
    close(HessianOperator(loss(x), [x]) @ v.flatten(), hvp.flatten())
    batch, steps = normal(5, 6, 4, seed=4), torch.arange(5) * 9
    each = torch.stack([loss(z, step=int(s)) for z, s in zip(batch, steps, strict=True)])
    close(torch.func.vmap(lambda z, s: loss(z, step=s))(batch, steps), each)
    close(torch.func.vmap(loss)(batch), torch.stack([loss(z) for z in batch]))
    gradients = torch.func.vmap(lambda z: loss_and_gradient(z, T, OSCILLATION, 13)[1])(batch)
    close(gradients, torch.stack([reference.gradient(z, T, OSCILLATION, 13) for z in batch]))


def test_constants_are_not_differentiated_silently():
    def total(x):
        loss, gradient = loss_and_gradient(x, T, OSCILLATION, 3)
        return loss + gradient.sum()

    assert not total(X.clone().requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match="loss_and_gradient: expected no transform"):
        torch.func.grad(total)(X)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="loss_and_gradient: expected no transform"):
        total(forward_ad.make_dual(X, T))


def test_compiled_whole_with_changing_steps():
    torch._dynamo.reset()
    compiles = []

    def count(graph, inputs):
        compiles.append(graph)
        return graph

    whole = torch.compile(lambda x, s: dynamic_cross_entropy(x, T, OSCILLATION, s), backend=count, fullgraph=True)
    x = X.clone().requires_grad_()
    for step in range(0, 60, 7):
        for given_step in (step, torch.tensor(step)):
            loss = whole(x, given_step)
            close(loss, reference.cross_entropy(X, T, OSCILLATION, step))
            close(torch.autograd.grad(loss, x)[0], reference.gradient(X, T, OSCILLATION, step))
    assert len(compiles) <= 3
    torch._dynamo.reset()
    criterion = DynamicCrossEntropyLoss(OSCILLATION, label_smoothing=0.1)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        close(torch.autograd.grad(compiled(x, T), x)[0], torch.autograd.grad(criterion(x, T), x)[0])
        criterion.step()
    pair = torch.compile(loss_and_gradient, backend="aot_eager", fullgraph=True)(X, T, OSCILLATION, 13)
    close(pair, loss_and_gradient(X, T, OSCILLATION, 13))


def test_every_kind_of_oscillation():
    table = Oscillation.from_table(torch.rand(7, 4))
    function = Oscillation.from_function(lambda step: [1.0, 2.0, step, 0.0], 4)
    ordered = Oscillation(4, 9, 10, class_order=[2, 0, 3, 1], start_step=2)
    for oscillation in (table, function, ordered):
        loss = dynamic_cross_entropy(X, T, oscillation, 5)
        close(loss, F.cross_entropy(X, T, weight=oscillation.weights(5)))


def test_autocast_and_infinite_logits_as_in_torch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dynamic_cross_entropy(X.bfloat16(), T.float(), OSCILLATION, 3, reduction="none")
        assert loss.dtype == torch.float32
    x = X.clone()
    x[0, 1], x[1, 2] = -torch.inf, torch.inf
    t = T.clone()
    t[0, 1] = 0
    expected = F.cross_entropy(x, t, weight=OSCILLATION.weights(3), reduction="none")
    found = dynamic_cross_entropy(x, t, OSCILLATION, 3, reduction="none")
    torch.testing.assert_close(found, expected, equal_nan=True)
    twin = reference.cross_entropy(x, t, OSCILLATION, 3, reduction="none")
    torch.testing.assert_close(twin, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (
            ValueError,
            "normalization: expected 'samples' with probabilities .* got 'weights'",
            {"normalization": "weights"},
        ),
        (ValueError, r"ignore_index: expected -100 \(none\) with probabilities .* got 2", {"ignore_index": 2}),
        (
            TypeError,
            r"target: expected class indices, or probabilities .*got torch\.float64 of shape \(6,\)",
            {"target": T[:, 0]},
        ),
        (TypeError, r"target: expected .*\(6, 4\), got torch\.float64 of shape \(5, 4\)", {"target": T[:5]}),
        (ValueError, "target: expected device cpu, got meta", {"target": T.to("meta")}),
        (ValueError, "logits: expected 4 classes", {"logits": X[:, :3], "target": T[:, :3]}),
        (ValueError, r"logits: expected shape \(C,\)", {"logits": X[0, 0], "target": T[0, 0]}),
        (
            ValueError,
            r"logits: expected shape \(3, N, C\), got \(2, 6, 4\)",
            {"logits": X.expand(2, 6, 4), "oscillation": ENSEMBLE},
        ),
        (TypeError, r"logits: expected a floating-point dtype, got torch\.int64", {"logits": X.long()}),
        (TypeError, "logits: expected a torch.Tensor, got None", {"logits": None}),
        (TypeError, "step: expected an int", {"step": 1.5}),
        (ValueError, "label_smoothing: expected", {"label_smoothing": 2}),
        (TypeError, "oscillation: expected an Oscillation", {"oscillation": None}),
    ],
)
def test_what_does_not_fit_is_named(error, message, change):
    arguments = {"logits": X, "target": T, "oscillation": OSCILLATION, "step": 3} | change
    for function in (dynamic_cross_entropy, loss_and_gradient):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_the_module_takes_them_but_not_with_an_inplace_gradient():
    criterion = DynamicCrossEntropyLoss(OSCILLATION)
    criterion.set_step(13)
    close(criterion(X, T), F.cross_entropy(X, T, weight=OSCILLATION.weights(13)))
    with pytest.raises(ValueError, match="target: expected class indices with inplace_gradient=True"):
        DynamicCrossEntropyLoss(OSCILLATION, inplace_gradient=True)(X, T)
