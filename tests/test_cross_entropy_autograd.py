"""Derivatives of the op: reverse, double, third, forward mode, torch.func, vmap over every argument, and fused."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import OPTIONS, PROBLEMS, Problem, assert_double_backward, close, describe, labels, normal
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from dynloss_ext import Oscillation, dynamic_cross_entropy, loss_and_gradient
from dynloss_ext.loss import _arguments

EVERY_PROBLEM = pytest.mark.parametrize("name", PROBLEMS)
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=describe)
SOME_PROBLEMS = pytest.mark.parametrize("name", ["matrix", "image", "shared_target", "long_rows"])
SOME_OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "label_smoothing": 0.1},
        {"normalization": "weights", "label_smoothing": 0.2},
    ],
    ids=["default", "unreduced", "weights"],
)


def small(problem):
    """Few enough numbers for the numerical checks."""
    return problem if problem.logits.numel() <= 60 else Problem(normal(2, 34), labels(34, 2), Oscillation(34, 9, 10), 7)


# ---- against exact derivatives


@EVERY_OPTION
@EVERY_PROBLEM
def test_second_and_third_derivative_equal_the_twin_on_every_route(name, options):
    problem = PROBLEMS[name]
    z, u, v = problem.logits, torch.randn_like(problem.logits), torch.randn_like(problem.logits)

    def loss(x):
        return problem.loss(x, **options).sum()

    gradient, hv, third = problem.gradient(**options), problem.hvp(v, **options), problem.third(u, v, **options)
    assert_double_backward(loss, z, v, gradient, hv)
    close(grad(loss)(z), gradient)
    close(jvp(loss, (z,), (v,))[1], (gradient * v).sum())
    close(vjp(grad(loss), z)[1](v)[0], hv)
    close(jvp(grad(loss), (z,), (v,))[1], hv)
    close(grad(lambda x: jvp(loss, (x,), (v,))[1])(z), hv)
    close(jvp(lambda x: jvp(loss, (x,), (v,))[1], (z,), (u,))[1], (hv * u).sum())
    close(jvp(lambda x: jvp(grad(loss), (x,), (v,))[1], (z,), (u,))[1], third)
    close(grad(lambda x: (vjp(grad(loss), x)[1](v)[0] * u).sum())(z), third)
    close(grad(lambda x: (jvp(grad(loss), (x,), (v,))[1] * u).sum())(z), third)
    x = problem.leaf()
    value = loss(x)
    for expected, direction in ((gradient, v), (hv, u), (third, u)):
        (derivative,) = torch.autograd.grad(value, x, create_graph=True)
        close(derivative.detach(), expected)
        value = (derivative * direction).sum()


@EVERY_OPTION
@EVERY_PROBLEM
def test_hessian_is_the_twins_and_symmetric(name, options):
    problem = small(PROBLEMS[name])
    ours = hessian(lambda x: problem.loss(x, **options).sum())(problem.logits)
    close(ours, hessian(lambda x: problem.twin(x, **options).sum())(problem.logits))
    size = problem.logits.numel()
    close(ours.reshape(size, size), ours.reshape(size, size).T)


@SOME_OPTIONS
@SOME_PROBLEMS
def test_gradcheck_in_every_mode(name, options):
    problem = small(PROBLEMS[name])

    def loss(x):
        return problem.loss(x, **options)

    def gradient(x):
        return grad(lambda y: loss(y).sum())(x)

    gradcheck(loss, problem.leaf(), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    gradgradcheck(loss, problem.leaf(), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)
    gradcheck(gradient, problem.leaf(), check_forward_ad=True)
    gradgradcheck(gradient, problem.leaf(), check_fwd_over_rev=True)


@SOME_OPTIONS
@SOME_PROBLEMS
def test_gradcheck_of_every_derivative_in_all_it_depends_on(name, options):
    """In the output's gradient too, which an outer function that is not linear brings in, and in the directions."""
    problem, ops = small(PROBLEMS[name]), torch.ops.dynloss
    x, smoothing = problem.leaf(), options.get("label_smoothing", 0.0)
    choices = options.get("reduction", "mean"), options.get("normalization", "samples"), -100, smoothing
    loss, *resolved = ops.cross_entropy(
        *_arguments(problem.logits, problem.target, problem.oscillation, problem.step, None, *choices)
    )
    resolved = [problem.target, *resolved, -100, smoothing]
    u, v = (torch.randn_like(x, requires_grad=True) for _ in range(2))
    g = torch.randn_like(loss, requires_grad=True)
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    derivative = ops.cross_entropy_derivative
    gradcheck(lambda g, x: derivative(None, None, g, x, *resolved), (g, x), **modes)
    gradcheck(lambda v, g, x: derivative(None, v, g, x, *resolved), (v, g, x), **modes)
    gradcheck(lambda u, v, g: derivative(u, v, g, x.detach(), *resolved), (u, v, g), **modes)


def test_cached_gradient_is_rejected_by_the_suite():
    """What every fused cross-entropy we know of does: right values, right gradient, and a wrong Hessian."""
    problem = PROBLEMS["matrix"]

    class CachedGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            loss, gradient = loss_and_gradient(logits, problem.target, problem.oscillation, problem.step)
            ctx.save_for_backward(gradient)
            return loss

        @staticmethod
        def backward(ctx, grad_output):
            return ctx.saved_tensors[0] * grad_output

    v = torch.randn_like(problem.logits)
    arguments = problem.logits, v, problem.gradient(), problem.hvp(v)
    assert gradcheck(CachedGradient.apply, problem.leaf()), "first order alone cannot tell"
    assert_double_backward(problem.loss, *arguments)
    with pytest.raises(AssertionError):
        assert_double_backward(CachedGradient.apply, *arguments)


# ---- through a network


def tanh_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()


@pytest.mark.parametrize("normalization", ["samples", "weights"])
def test_network_hvp_equals_torch_and_the_dense_hessian(normalization):
    network, x, y = tanh_network(), normal(40, 2), labels(3, 40)
    y[5] = -100
    oscillation = Oscillation(3, 70, 100)
    gamma, parameters = oscillation.weights(130), list(network.parameters())

    def ours(logits):
        return dynamic_cross_entropy(logits, y, oscillation, 130, normalization=normalization)

    def torchs(logits):
        if normalization == "weights":
            return F.cross_entropy(logits, y, weight=gamma)
        return F.cross_entropy(logits, y, weight=gamma, reduction="sum") / (y != -100).sum()

    def hvp(loss, v):
        gradients = torch.autograd.grad(loss(network(x)), parameters, create_graph=True)
        products = torch.autograd.grad(sum((g * w).sum() for g, w in zip(gradients, v, strict=True)), parameters)
        return torch.cat([p.flatten() for p in products])

    v = [torch.randn_like(p) for p in parameters]
    names = [n for n, _ in network.named_parameters()]

    def of_flat(flat):
        pieces = flat.split([p.numel() for p in parameters])
        values = {n: f.view_as(p) for n, f, p in zip(names, pieces, parameters, strict=True)}
        return torchs(functional_call(network, values, (x,)))

    flat = torch.cat([p.detach().flatten() for p in parameters])
    dense = hessian(of_flat)(flat)
    close(hvp(ours, v), hvp(torchs, v), 1e-10)
    close(hvp(ours, v), dense @ torch.cat([w.flatten() for w in v]), 1e-10)


# ---- torch.func and vmap

SINGLE = PROBLEMS["matrix"]
ENSEMBLE = PROBLEMS["shared_target"]


def stacked(function, in_dims, *arguments):
    """What vmap must equal: a loop."""
    batch = next(a.shape[d] for a, d in zip(arguments, in_dims, strict=True) if d is not None)
    slices = [
        [a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)] for i in range(batch)
    ]
    return torch.stack([function(*s) for s in slices])


def along(x, dim):
    return None if x is None else x.movedim(0, dim)


@SOME_OPTIONS
@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (1, None, None), (2, 1, 0), (None, 0, None), (None, None, 0), (0, None, 0)]
)
def test_vmap_over_any_argument(dims, options):
    d_logits, d_target, d_step = dims
    logits = normal(6, 4) if d_logits is None else along(normal(5, 6, 4), d_logits)
    target = labels(4, 6) if d_target is None else along(labels(4, 5, 6), d_target)
    step = torch.tensor(3) if d_step is None else torch.arange(5)

    for oscillation in (SINGLE.oscillation, PROBLEMS["ordered"].oscillation, PROBLEMS["table"].oscillation):

        def loss(x, y, s, oscillation=oscillation):
            return dynamic_cross_entropy(x, y, oscillation, s, **options)

        def gradient(x, y, s):
            return grad(lambda z: loss(z, y, s).sum())(x)

        def product(x, y, s):
            return jvp(lambda z: gradient(z, y, s), (x,), (x.sin(),))[1]

        for function in (loss, gradient, product):
            close(vmap(function, dims)(logits, target, step), stacked(function, dims, logits, target, step))


@pytest.mark.parametrize("dims", [(0, None, None), (2, 0, None), (None, 1, 0), (None, None, 1), (3, None, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_an_ensemble(dims, shared):
    d_logits, d_target, d_step = dims
    logits = normal(3, 5, 4) if d_logits is None else along(normal(2, 3, 5, 4), d_logits)
    shape = (5,) if shared else (3, 5)
    target = labels(4, *shape) if d_target is None else along(labels(4, 2, *shape), d_target)
    step = torch.tensor([1, 2, 30]) if d_step is None else along(torch.arange(6).view(2, 3), d_step)
    for reduction in ("none", "mean"):

        def loss(x, y, s, reduction=reduction):
            return dynamic_cross_entropy(x, y, ENSEMBLE.oscillation, s, reduction=reduction)

        def product(x, y, s):
            return jvp(grad(lambda z: loss(z, y, s).sum()), (x,), (x.sin(),))[1]

        for function in (loss, product):
            close(vmap(function, dims)(logits, target, step), stacked(function, dims, logits, target, step))


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (2, 1), (4, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vmap_over_images_and_nested(dims, reduction):
    logits = normal(2, 4, 3, 2) if dims[0] is None else along(normal(5, 2, 4, 3, 2), dims[0])
    target = labels(4, 2, 3, 2) if dims[1] is None else along(labels(4, 5, 2, 3, 2), dims[1])

    def loss(x, y):
        return dynamic_cross_entropy(x, y, SINGLE.oscillation, 3, reduction=reduction)

    close(vmap(loss, dims)(logits, target), stacked(loss, dims, logits, target))


def test_vmap_nested_unbatched_chunked_and_empty():
    logits, target, steps = normal(2, 5, 6, 4), labels(4, 6), torch.arange(5)

    def loss(x, s):
        return dynamic_cross_entropy(x, target, SINGLE.oscillation, s)

    nested = vmap(vmap(loss), in_dims=(0, None))(logits, steps)
    close(nested, torch.stack([stacked(loss, (0, 0), x, steps) for x in logits]))
    close(vmap(loss, chunk_size=2)(logits[0], steps), nested[0])

    def of_row(x, y):
        return dynamic_cross_entropy(x, y, SINGLE.oscillation, 3)

    close(vmap(of_row)(logits[0, 0], target), stacked(of_row, (0, 0), logits[0, 0], target))
    per_sample = vmap(hessian(of_row))(logits[0, 0], target)
    close(per_sample, stacked(lambda x, y: hessian(of_row)(x, y), (0, 0), logits[0, 0], target))
    assert vmap(loss)(logits[0, :0], steps[:0]).shape == (0,)
    close(vmap(SINGLE.oscillation.weights)(steps[:, None])[:, 0], SINGLE.oscillation.weights(steps))


def test_vmap_over_clock_and_table_of_the_op():
    """The schema's arguments that Python does not expose as tensors."""
    op, rest = torch.ops.dynloss.cross_entropy, (None, 1, False, -100, 0.0)
    z, y = SINGLE.logits, SINGLE.target
    singles = [Oscillation(4, a, 10) for a in (2, 3, 4.0)]
    clocks = torch.stack([o.on(z.device)[0] for o in singles])
    close(
        vmap(lambda clock: op(z, y, 3, None, clock, None, None, *rest)[0])(clocks),
        torch.stack([dynamic_cross_entropy(z, y, o, 3) for o in singles]),
    )
    tables = torch.rand(3, 7, 4, dtype=torch.float64)
    clock = Oscillation.from_table(tables[0]).on(z.device)[0]
    close(
        vmap(lambda table: op(z, y, 3, None, clock, None, table, *rest)[0])(tables),
        torch.stack([dynamic_cross_entropy(z, y, Oscillation.from_table(t), 3) for t in tables]),
    )
    orders = torch.stack([torch.randperm(4) for _ in range(3)])
    with pytest.raises(ValueError, match="class_order"):
        vmap(lambda order: op(z, y, 3, None, clocks[0], order, None, *rest)[0])(orders)


def test_torch_func_transforms_agree():
    z, v = SINGLE.logits, normal(6, 4, seed=1)

    def rows(x):
        return SINGLE.loss(x, reduction="none")

    close(jacrev(rows)(z), jacfwd(rows)(z))
    close(jacrev(rows)(z), torch.autograd.functional.jacobian(rows, z))
    exact = hessian(SINGLE.twin)(z)
    for route in (
        hessian(SINGLE.loss),
        jacrev(jacrev(SINGLE.loss)),
        jacfwd(jacfwd(SINGLE.loss)),
        jacrev(jacfwd(SINGLE.loss)),
        functionalize(hessian(SINGLE.loss)),
        lambda x: torch.autograd.functional.hessian(SINGLE.loss, x),
        lambda x: torch.autograd.functional.hessian(
            SINGLE.loss, x, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ):
        close(route(z), exact)
    basis = torch.eye(24, dtype=z.dtype).view(24, 6, 4)
    close(vmap(lambda w: jvp(grad(SINGLE.loss), (z,), (w,))[1])(basis).view(24, 24), exact.view(24, 24))
    close(linearize(SINGLE.loss, z)[1](v), (SINGLE.gradient() * v).sum())


def test_forward_mode_duals_over_reverse():
    import torch.autograd.forward_ad as forward_ad

    z, v = SINGLE.logits, normal(6, 4, seed=1)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(z.clone().requires_grad_(), v)
        loss = SINGLE.loss(x)
        close(forward_ad.unpack_dual(loss).tangent.detach(), (SINGLE.gradient() * v).sum())
        (g,) = torch.autograd.grad(loss, x)
        close(forward_ad.unpack_dual(g).primal.detach(), SINGLE.gradient())
        close(forward_ad.unpack_dual(g).tangent.detach(), SINGLE.hvp(v))


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_dual_grad_output_alone(scale, retain_graph):
    """The gradient that the forward pass has left is a constant, what it is multiplied by is not."""
    import torch.autograd.forward_ad as forward_ad

    x = SINGLE.leaf()
    with forward_ad.dual_level():
        grad_output = forward_ad.make_dual(torch.tensor(scale, dtype=x.dtype), torch.tensor(5.0, dtype=x.dtype))
        (g,) = torch.autograd.grad(SINGLE.loss(x), x, grad_output, retain_graph=retain_graph)
        dual = forward_ad.unpack_dual(g)
        close(dual.primal, scale * SINGLE.gradient())
        close(dual.tangent, 5 * SINGLE.gradient())


@pytest.mark.parametrize("retain_graph", [False, True])
def test_grad_outputs_of_a_half_are_not_rounded(retain_graph):
    logits = SINGLE.logits.bfloat16()

    def gradient(scale):
        x = logits.clone().requires_grad_()
        loss = SINGLE.loss(x)
        return torch.autograd.grad(loss, x, torch.tensor(scale, dtype=loss.dtype), retain_graph=retain_graph)[0]

    scale = 1 + 3 / 512  # bfloat16 has no number between 1 and 1 + 1/128
    assert torch.equal(gradient(scale), (scale * gradient(1.0).float()).bfloat16())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("problem", [SINGLE, ENSEMBLE], ids=["single", "ensemble"])
def test_batched_grad_outputs(problem, reduction):
    x = problem.leaf()
    loss = problem.loss(x, reduction=reduction)
    outputs = normal(5, *loss.shape)
    expected = torch.stack([torch.autograd.grad(loss, x, g, retain_graph=True)[0] for g in outputs])
    for options in ({"retain_graph": True}, {"create_graph": True}, {}):
        (batched,) = torch.autograd.grad(loss, x, outputs, is_grads_batched=True, **options)
        close(batched.detach(), expected)
        if "create_graph" in options:
            (second,) = torch.autograd.grad(batched.square().sum(), x, retain_graph=True)
            singles = [torch.autograd.grad(loss, x, g, create_graph=True)[0].square().sum() for g in outputs]
            close(second, torch.autograd.grad(sum(singles), x, retain_graph=True)[0])


def test_grad_output_of_an_ensemble_scales_each_member():
    x, factors = ENSEMBLE.leaf(), torch.tensor([0.0, -2.0, 3.0], dtype=torch.float64)
    expected = ENSEMBLE.gradient() * factors[:, None, None]
    for keep in (True, False):
        close(torch.autograd.grad(ENSEMBLE.loss(x), x, factors, retain_graph=keep)[0], expected)
    factors.requires_grad_()
    (g,) = torch.autograd.grad(ENSEMBLE.loss(x), x, factors, create_graph=True)
    (by_factor,) = torch.autograd.grad((g * x).sum(), factors)
    close(by_factor, (ENSEMBLE.gradient() * ENSEMBLE.logits).sum((1, 2)))


@pytest.mark.parametrize("route", ["reverse", "func", "forward"])
def test_fourth_derivative_is_refused(route):
    loss = SINGLE.loss
    with pytest.raises(NotImplementedError, match="up to the third order"):
        if route == "reverse":
            x = SINGLE.leaf()
            value = loss(x)
            for _ in range(4):
                value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        for _ in range(4):
            if route == "func":
                loss = lambda x, f=loss: grad(f)(x).square().sum()  # noqa: E731
            else:
                loss = lambda x, f=loss: jvp(f, (x,), (SINGLE.logits,))[1]  # noqa: E731
        loss(SINGLE.logits)


def test_loss_and_gradient_refuses_to_be_differentiated():
    def loss(x):
        return loss_and_gradient(x, SINGLE.target, SINGLE.oscillation, 3)[0]

    for transform in (grad(loss), jacfwd(loss), hessian(loss)):
        with pytest.raises(RuntimeError, match="use dynamic_cross_entropy"):
            transform(SINGLE.logits)
    x = SINGLE.leaf()
    value, gradient = loss_and_gradient(x, SINGLE.target, SINGLE.oscillation, 3)
    assert not value.requires_grad
    assert not gradient.requires_grad
    close(vmap(lambda q: loss_and_gradient(q, SINGLE.target, SINGLE.oscillation, 3)[1])(x.detach()[None])[0], gradient)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_make_fx_records_the_ops(order):
    function = [
        lambda x: grad(SINGLE.loss)(x),
        lambda x: jvp(grad(SINGLE.loss), (x,), (SINGLE.logits,))[1],
        grad(lambda x: jvp(grad(SINGLE.loss), (x,), (SINGLE.logits,))[1].square().sum()),
    ][order - 1]
    traced = make_fx(function)(SINGLE.logits + 1)
    close(traced(SINGLE.logits), function(SINGLE.logits))
    assert "torch.ops.dynloss.cross_entropy_" in traced.code


# ---- fused: what runs


UNFUSED = ("log_softmax", "nll_loss", "softmax", "cross_entropy_loss", "logsumexp", "gather")


def ops_run(function):
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()}


@EVERY_OPTION
@EVERY_PROBLEM
def test_no_route_leaves_the_fused_path(name, options):
    problem = PROBLEMS[name]

    def every_route():
        z, v = problem.logits, torch.randn_like(problem.logits)

        def loss(x):
            return problem.loss(x, **options).sum()

        loss(problem.leaf()).backward()
        x = problem.leaf()
        (g,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (hv,) = torch.autograd.grad((g * v).sum(), x, create_graph=True)
        torch.autograd.grad((hv * v).sum(), x)
        jvp(grad(loss), (z,), (v,))
        grad(lambda q: jvp(grad(loss), (q,), (v,))[1].sum())(z)
        vmap(grad(loss))(torch.stack([z, z]))

    ran = ops_run(every_route)
    assert "dynloss::cross_entropy_derivative" in ran
    assert not [op for op in ran if any(word in op for word in UNFUSED)]


def test_a_dimension_of_one_may_have_any_stride():
    """It keeps nothing from being read where it lies."""
    logits, target = torch.randn(5, 4, 7), torch.zeros(5, 1, 7, dtype=torch.int64)
    odd = logits.as_strided((5, 4, 1, 7), (28, 7, 999, 1))
    assert not ops_run(lambda: dynamic_cross_entropy(odd, target, SINGLE.oscillation, 0)) & {"aten::clone"}
    apart = logits.unsqueeze(2).expand(-1, -1, 3, -1)  # no one stride from row to row
    assert "aten::clone" in ops_run(
        lambda: dynamic_cross_entropy(apart, target.expand(-1, 3, -1), SINGLE.oscillation, 0)
    )


def test_the_profiler_would_see_an_unfused_path():
    assert [op for op in ops_run(lambda: F.cross_entropy(SINGLE.logits, SINGLE.target)) if "log_softmax" in op]


def test_plain_backward_is_one_pass_and_without_grad_only_the_loss():
    def training_step():
        problem.loss(problem.leaf()).backward()

    for problem in (SINGLE, PROBLEMS["image"], ENSEMBLE):
        if problem is not ENSEMBLE:
            ran = ops_run(training_step)
            assert "dynloss::cross_entropy_with_gradient" in ran
            assert not ran & {"dynloss::cross_entropy_derivative", "aten::mul"}
        with torch.no_grad():
            assert "dynloss::cross_entropy_with_gradient" not in ops_run(lambda: problem.loss(problem.leaf()))  # noqa: B023
