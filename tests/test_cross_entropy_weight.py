"""Weights of classes that multiply Γ: torch's `weight` of w·Γ, in value and every derivative, on every route."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import OPTIONS, PROBLEMS, assert_double_backward, close, describe, labels, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from dynloss_ext import (
    DynamicCrossEntropyLoss,
    HessianOperator,
    Oscillation,
    dynamic_cross_entropy,
    loss_and_gradient,
    reference,
)
from dynloss_ext._configuration import pack

OSCILLATION = Oscillation(4, 9, 10, class_order=[2, 0, 3, 1], stop_step=500)
ENSEMBLE = Oscillation(4, torch.tensor([2.0, 5.0, 9.0]), torch.tensor([3, 10, 20]))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WEIGHT = torch.tensor([0.5, 2.0, 0.0, -1.25])
X, Y = normal(6, 4), labels(4, 6)


def weight_of(problem):
    """(C,); of ensembles (E, C) where members have targets of their own."""
    classes, members = problem.oscillation.num_classes, problem.oscillation.ensemble_size
    own = members is not None and problem.target.dim() == 2
    return normal(*([members] if own else []), classes, seed=7, dtype=torch.float32).abs() + 0.1


# ---- against torch


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from([(6, 5), (5,), (2, 5, 3), (2, 5, 3, 2), (1, 1), (70, 3), (9, 40), (3, 300), (2, 40, 70)]),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    ignored=st.booleans(),
    signs=st.booleans(),
    strided=st.booleans(),
    waveform=st.sampled_from(["triangle", "sine", "square", "table"]),
    step=st.integers(-3, 10**12),
    tensor_step=st.booleans(),
    target_kind=st.sampled_from(["int64", "uint8", "probabilities"]),
    seed=st.integers(0, 2**20),
)
def test_equals_torch(
    shape,
    dtype,
    weight_dtype,
    reduction,
    smoothing,
    ignored,
    signs,
    strided,
    waveform,
    step,
    tensor_step,
    target_kind,
    seed,
):
    dim = int(len(shape) > 1)
    classes = shape[dim]
    if waveform == "table":
        oscillation = Oscillation.from_table(normal(3, classes, seed=seed).abs())
    else:
        oscillation = Oscillation(classes, 9, 7.5, waveform=waveform)
    weight = normal(classes, seed=seed + 1).to(weight_dtype)
    weight = weight if signs else weight.abs()
    if strided:
        weight = torch.stack([weight, weight], 1)[:, 1]
    gamma = oscillation.weights(step) * weight.double()
    logits = normal(*shape, seed=seed, dtype=dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if target_kind == "probabilities":
        target = normal(*shape, seed=seed + 2, dtype=dtype).softmax(dim)
        expected = F.cross_entropy(exact, target.double(), weight=gamma, **options)
    else:
        target = labels(min(classes, 256), *shape[:dim], *shape[dim + 1 :], seed=seed)
        if ignored:
            options["ignore_index"] = int(target.view(-1)[0])
        summed = {**options, "reduction": "sum"} if reduction == "mean" else options
        expected = F.cross_entropy(exact, target, weight=gamma, **summed)
        if reduction == "mean":
            expected = expected / (target != options.get("ignore_index", -100)).sum()
        if target_kind == "uint8" and options.get("ignore_index", 0) < 256:
            target = target.byte()
    step = torch.tensor(step) if tensor_step else step
    loss = dynamic_cross_entropy(logits, target, oscillation, step, weight=weight, **options)
    assert loss.dtype == (dtype if reduction == "none" else torch.promote_types(dtype, torch.float32))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    pair = loss_and_gradient(logits, target, oscillation, step, weight=weight, **options)
    eps = max(torch.finfo(dtype).eps, 1e-15)
    size = gamma.abs().max().item() * (target.numel() if reduction == "sum" else 1)
    for found, want in ((loss, expected), (gradient, expected_gradient), (pair[0], expected), (pair[1], gradient)):
        torch.testing.assert_close(found.double(), want.double(), rtol=8 * eps, atol=8 * eps * size, equal_nan=True)
    twin = (exact.detach(), target if target.is_floating_point() else target.long(), oscillation, int(step))
    close(reference.cross_entropy(*twin, weight=weight, **options).nan_to_num(7), expected.nan_to_num(7), 1e-10)


@pytest.mark.parametrize("shape", [(6, 4), (4,), (2, 4, 3), (40, 70)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_normalization_by_weights_is_torchs_mean(shape, smoothing, ignore_index):
    classes = shape[int(len(shape) > 1)]
    x, y = (
        normal(*shape).requires_grad_(),
        labels(classes, *shape[:1], *shape[2:]) if len(shape) > 1 else torch.tensor(1),
    )
    oscillation, weight = Oscillation(classes, 9, 10), normal(classes, seed=1).abs() + 0.1
    options = {"label_smoothing": smoothing, "ignore_index": ignore_index}
    expected = F.cross_entropy(x, y, weight=oscillation.weights(13) * weight, **options)
    loss = dynamic_cross_entropy(x, y, oscillation, 13, weight=weight, normalization="weights", **options)
    close(loss, expected)
    close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])


def test_is_multiplied_after_the_normalisation():
    """w = 2 doubles the loss, and w_c Γ_c do not add up to C."""
    for oscillation in (OSCILLATION, Oscillation(4, 1, 10)):
        plain = dynamic_cross_entropy(X, Y, oscillation, 13)
        close(dynamic_cross_entropy(X, Y, oscillation, 13, weight=torch.full((4,), 2.0)), 2 * plain)
        assert torch.equal(dynamic_cross_entropy(X, Y, oscillation, 13, weight=torch.ones(4)), plain)
    _, weights, _ = torch.ops.dynloss.cross_entropy(
        X, Y, 13, None, *OSCILLATION.on(X.device), WEIGHT, 1, False, -100, 0.0
    )
    assert torch.equal(weights, OSCILLATION.weights(13) * WEIGHT.double())


# ---- derivatives


@pytest.mark.parametrize("options", OPTIONS, ids=describe)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_derivative_equals_the_twin(name, options):
    problem = PROBLEMS[name]
    options = {**options, "weight": weight_of(problem)}
    z, u, v = problem.logits, torch.randn_like(problem.logits), torch.randn_like(problem.logits)

    def loss(x):
        return problem.loss(x, **options).sum()

    gradient, hv, third = problem.gradient(**options), problem.hvp(v, **options), problem.third(u, v, **options)
    close(problem.loss(z, **options), problem.twin(z, **options))
    close(loss_and_gradient(z, problem.target, problem.oscillation, problem.step, **options)[1], gradient)
    assert_double_backward(loss, z, v, gradient, hv)
    close(grad(loss)(z), gradient)
    close(jvp(loss, (z,), (v,))[1], (gradient * v).sum())
    close(jvp(grad(loss), (z,), (v,))[1], hv)
    close(jvp(lambda x: jvp(grad(loss), (x,), (v,))[1], (z,), (u,))[1], third)
    x = problem.leaf()
    value = loss(x)
    for expected, direction in ((gradient, v), (hv, u), (third, u)):
        (derivative,) = torch.autograd.grad(value, x, create_graph=True)
        close(derivative.detach(), expected)
        value = (derivative * direction).sum()


@pytest.mark.parametrize("target", [Y, normal(6, 4, seed=1).softmax(1)], ids=["classes", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}, {"reduction": "sum"}])
def test_gradcheck_with_weights_of_any_sign(target, options):
    def loss(x):
        return dynamic_cross_entropy(x, target, OSCILLATION, 13, weight=WEIGHT, **options)

    x = X.clone().requires_grad_()
    gradcheck(loss, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    gradgradcheck(loss, x, check_fwd_over_rev=True, check_batched_grad=True)

    def torchs(z):
        gamma = OSCILLATION.weights(13) * WEIGHT
        summed = {**options, "reduction": "sum"} if options.get("reduction") != "none" else options
        rows = F.cross_entropy(z, target, weight=gamma, **summed).sum()
        return rows if "reduction" in options else rows / len(Y)

    exact = hessian(torchs)(X)
    close(hessian(lambda z: loss(z).sum())(X), exact)
    H = HessianOperator(loss(x).sum(), [x])
    close(H @ torch.ones(24, dtype=X.dtype), exact.view(24, 24).sum(1))


def test_backward_passes_keep_the_weights_they_began_with():
    x, weight = X.clone().requires_grad_(), WEIGHT.double()
    loss = dynamic_cross_entropy(x, Y, OSCILLATION, 13, weight=weight)
    weight.fill_(7)
    expected = reference.gradient(X, Y, OSCILLATION, 13, weight=WEIGHT)
    close(torch.autograd.grad(loss, x, create_graph=True)[0].detach(), expected)
    close(torch.autograd.grad(loss, x)[0], expected)


def test_is_a_constant():
    weight, message = WEIGHT.clone().requires_grad_(), "weight: expected a constant"
    probabilities = X.softmax(1)

    def loss(w, target=Y, call=dynamic_cross_entropy):
        result = call(X, target, OSCILLATION, 3, weight=w)
        return result[0] if isinstance(result, tuple) else result

    for target, call in itertools.product((Y, probabilities), (dynamic_cross_entropy, loss_and_gradient)):
        with pytest.raises(ValueError, match=message):
            loss(weight, target, call)
        with pytest.raises(ValueError, match=message):
            grad(lambda w: loss(w, target, call))(WEIGHT)  # noqa: B023
        with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
            loss(forward_ad.make_dual(WEIGHT, WEIGHT), target, call)
        with torch.no_grad():  # as in torch
            assert torch.equal(loss(weight, target, call), loss(WEIGHT, target, call))


# ---- transforms


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 1)])
@pytest.mark.parametrize("kind", ["single", "image", "ensemble", "ensemble of weights"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap(dims, kind, reduction):
    shape = {"single": (6, 4), "image": (2, 4, 3)}.get(kind, (3, 5, 4))
    oscillation, target = (OSCILLATION, labels(4, *shape[:1], *shape[2:])), labels(4, 5)
    oscillation, target = (ENSEMBLE, target) if kind.startswith("ensemble") else oscillation
    lead = (3,) if kind == "ensemble of weights" else ()
    logits = normal(*shape) if dims[0] is None else normal(2, *shape).movedim(0, dims[0])
    weight = normal(*lead, 4, seed=1) if dims[1] is None else normal(2, *lead, 4, seed=1).movedim(0, dims[1])

    def loss(x, w):
        return dynamic_cross_entropy(x, target, oscillation, 13, weight=w, reduction=reduction, label_smoothing=0.1)

    def product(x, w):
        return jvp(grad(lambda z: loss(z, w).sum()), (x,), (x.sin(),))[1]

    for function in (loss, product, lambda x, w: loss_and_gradient(x, target, oscillation, 13, weight=w)[1]):
        each = [
            function(*(a if d is None else a.select(d, i) for a, d in zip((logits, weight), dims, strict=True)))
            for i in range(2)
        ]
        close(vmap(function, dims)(logits, weight), torch.stack(each))


def test_members_of_an_ensemble_have_weights_of_their_own_or_share_them():
    x, y, steps = normal(3, 5, 4), labels(4, 3, 5), torch.tensor([3, 14, 159])
    for weight in (WEIGHT, normal(3, 4, seed=1)):
        for target in (y, y[0], x.softmax(2)):
            loss, gradient = loss_and_gradient(x, target, ENSEMBLE, steps, weight=weight)
            for e in range(3):
                member = Oscillation(4, float(ENSEMBLE.amplitude[e]), float(ENSEMBLE.period[e]))
                gamma = member.weights(int(steps[e])) * (weight[e] if weight.dim() == 2 else weight)
                z = x[e].clone().requires_grad_()
                own = target if target.dim() == 1 else target[e]
                expected = F.cross_entropy(z, own, weight=gamma, reduction="sum") / 5
                close(loss[e], expected)
                close(gradient[e], torch.autograd.grad(expected, z)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_with_changing_steps_and_weights(dynamic):
    torch._dynamo.reset()
    for target in (Y, X.softmax(1)):

        def loss(x, step, weight, target=target):
            return dynamic_cross_entropy(x, target, OSCILLATION, step, weight=weight, label_smoothing=0.1)

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for step, weight in ((3, WEIGHT), (torch.tensor(13), WEIGHT), (torch.tensor(14), WEIGHT.abs())):
            x = X.clone().requires_grad_()
            close(compiled(x, step, weight), loss(x, step, weight))
            close(
                torch.autograd.grad(compiled(x, step, weight), x)[0], torch.autograd.grad(loss(x, step, weight), x)[0]
            )
    traced = make_fx(grad(lambda x: loss(x, 13, WEIGHT)))(X)
    close(traced(X + 1), grad(lambda x: loss(x, 13, WEIGHT))(X + 1))


def test_fake_tensors_have_the_shapes():
    with torch.device("meta"):
        x, y = torch.empty(3, 5, 4), torch.empty(5, dtype=torch.int64)
        for weight in (torch.empty(4), torch.empty(3, 4, dtype=torch.float16)):
            assert dynamic_cross_entropy(x, y, ENSEMBLE, 3, weight=weight).shape == (3,)
        with pytest.raises(ValueError, match="weight: expected shape"):
            dynamic_cross_entropy(x, y, ENSEMBLE, 3, weight=torch.empty(3))


# ---- the module


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"normalization": "weights", "ignore_index": 2}, {"label_smoothing": 0.1, "reduction": "sum"}]
)
def test_module_with_and_without_gamma(inplace, options):
    weight = WEIGHT.abs()
    criterion = DynamicCrossEntropyLoss(
        OSCILLATION, weight=weight, plain_in_eval=True, inplace_gradient=inplace, **options
    )
    plain = {name: value for name, value in options.items() if name != "normalization"}
    x = X.clone().requires_grad_()
    for step in (5, 13):
        criterion.set_step(step)
        loss = criterion.train()(x * 1, Y)
        expected = reference.cross_entropy(x, Y, OSCILLATION, step, weight=weight, **options)
        close(loss, expected)
        close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])
        loss, expected = criterion.eval()(x * 1, Y), F.cross_entropy(x, Y, weight=weight.double(), **plain)
        if criterion.reduction == "mean" and criterion.normalization == "samples":
            expected = F.cross_entropy(x, Y, weight=weight.double(), reduction="sum") / len(Y)
        close(loss, expected)
        close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])


def test_module_keeps_its_weights():
    weight = WEIGHT.clone()
    criterion = DynamicCrossEntropyLoss(OSCILLATION, weight=weight)
    weight.zero_()  # a copy
    assert dict(criterion.named_buffers()).keys() == {"current_step", "weight"}
    whole = io.BytesIO()
    torch.save(criterion, whole)
    whole.seek(0)
    for twin in (
        copy.deepcopy(criterion),
        torch.load(whole, weights_only=False),
        copy.deepcopy(criterion).half().double().to(torch.bfloat16),
        nn.Sequential(copy.deepcopy(criterion)).float()[0],
        copy.deepcopy(criterion).to_empty(device="cpu"),
    ):
        assert twin.weight.dtype == torch.float64
        assert torch.equal(twin.weight, WEIGHT.double())
    assert nn.Sequential(copy.deepcopy(criterion)).to("meta")[0].weight.is_meta
    other = functional_call(criterion, {"weight": torch.ones(4)}, (X, Y))
    close(other, dynamic_cross_entropy(X, Y, OSCILLATION, 0))


def test_weights_are_part_of_the_configuration():
    plain, weighted = DynamicCrossEntropyLoss(OSCILLATION), DynamicCrossEntropyLoss(OSCILLATION, weight=WEIGHT)
    weighted.set_step(7)
    state = weighted.state_dict()
    assert set(state) == {"current_step", "_extra_state"}
    same = DynamicCrossEntropyLoss(OSCILLATION, weight=WEIGHT.double())
    same.load_state_dict(state)
    assert same.current_step == 7
    changed = WEIGHT.clone()
    changed[2] = 3
    for other, message in (
        (plain, r"expected weight = None, got \[0\.5, 2\.0, 0\.0, -1\.25\]"),
        (DynamicCrossEntropyLoss(OSCILLATION, weight=changed), r"expected weight\[2\] = 3\.0, got 0\.0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(state)
        other.load_state_dict(state, strict=False)
        assert other.current_step == 7
    with pytest.raises(RuntimeError, match=r"expected weight = \[0\.5, 2\.0, 0\.0, -1\.25\], got None"):
        weighted.load_state_dict(DynamicCrossEntropyLoss(OSCILLATION).state_dict())


def test_states_saved_before_there_were_weights_still_load():
    config = DynamicCrossEntropyLoss(OSCILLATION)._config()
    del config["weight"]
    state = {"current_step": torch.tensor(12), "_extra_state": pack(config)}
    criterion = DynamicCrossEntropyLoss(OSCILLATION)
    criterion.load_state_dict(state)
    assert criterion.current_step == 12
    with pytest.raises(RuntimeError, match=r"expected weight = \[.*\], got None"):
        DynamicCrossEntropyLoss(OSCILLATION, weight=WEIGHT).load_state_dict(state)


def test_module_of_an_ensemble_and_of_probabilities_and_a_function():
    x, weight = normal(3, 6, 4), normal(3, 4, seed=1)
    table = torch.rand(5, 4, dtype=torch.float64)
    function = Oscillation.from_function(lambda s: table[s % 5], 4)
    ensemble = DynamicCrossEntropyLoss(ENSEMBLE, weight=weight)
    for step in range(7):
        close(ensemble(x, Y), reference.cross_entropy(x, Y, ENSEMBLE, step, weight=weight))
        close(ensemble(x, X.softmax(1)), reference.cross_entropy(x, X.softmax(1), ENSEMBLE, step, weight=weight))
        ensemble.step()
        expected = F.cross_entropy(X, Y, weight=table[step % 5] * WEIGHT, reduction="sum") / len(Y)
        close(dynamic_cross_entropy(X, Y, function, step, weight=WEIGHT), expected)
