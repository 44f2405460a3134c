"""HessianOperator: products against the dense Hessian, and everything it must refuse."""

import sys

import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y, dense_hessian, loss_of, mlp
from torch import nn

from dynloss_ext import ConvergenceWarning, GaussNewtonOperator, HessianOperator, eigsh


@pytest.mark.parametrize("as_closure", [False, True])
def test_product_is_the_dense_one(as_closure):
    params = mlp()
    H = HessianOperator((lambda: loss_of(params)) if as_closure else loss_of(params), params)
    dense = dense_hessian(params)
    assert H.shape == dense.shape
    assert (H.dtype, H.device) == (torch.float64, torch.device("cpu"))
    V = torch.randn(H.shape[0], 4, dtype=torch.float64)
    assert torch.allclose(H @ V[:, 0], dense @ V[:, 0], rtol=1e-12, atol=1e-13)
    assert torch.allclose(H @ V, dense @ V, rtol=1e-12, atol=1e-13)
    assert (H @ V[:, :0]).shape == (H.shape[0], 0)


def test_generator_of_parameters_and_module():
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    H = HessianOperator(F.cross_entropy(model(X), Y), model.parameters())
    v = torch.randn(H.shape[0], dtype=torch.float64)
    assert (H @ v).shape == v.shape
    assert all(p.grad is None for p in model.parameters())


def test_parameters_are_left_alone_and_the_gradient_is_shared():
    params = mlp()
    before = [p.detach().clone() for p in params]
    H = HessianOperator(loss_of(params), params)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    expected = torch.autograd.grad(loss_of(params), params)
    for p, b, g, e in zip(params, before, H.gradients, expected, strict=True):
        assert p.grad is None
        assert torch.equal(p, b)
        assert torch.equal(g.detach(), e)


def test_unused_parameter_has_zero_rows():
    params = mlp()
    unused = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="rows and columns of zeros"):
        H = HessianOperator(loss_of(params), [unused, *params])
    product = H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert torch.equal(product[:4], torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(product[4:], dense_hessian(params).sum(1), atol=1e-13)


def test_linear_loss_has_a_zero_hessian():
    p = torch.ones(5, dtype=torch.float64, requires_grad=True)
    H = HessianOperator(p.sum(), [p])
    assert torch.equal(H @ torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("how", ["optimizer", "copy", "data"])
def test_stale_graph_is_refused(how):
    params = mlp()
    H = HessianOperator(loss_of(params), params)
    if how == "optimizer":
        for p, g in zip(params, H.gradients, strict=True):
            p.grad = g.detach()
        torch.optim.SGD(params, lr=0.1).step()
    elif how == "copy":
        with torch.no_grad():
            params[2].copy_(params[2] + 1)
    else:
        params[2].data = params[2].data.clone()
    with pytest.raises(RuntimeError, match=r"params\[[02]\]: expected .* got .* changed in place"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"params.*: expected .* got .* changed in place"):
        eigsh(H)


def test_a_changed_parameter_is_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    x = torch.randn(5, 3)

    def loss():
        return net(x).square().sum()

    named = dict(net.named_parameters())
    groups = {"first": [("0.weight", net[0].weight)], "last": [("1.weight", net[1].weight)]}
    outputs = net(x)
    made = [
        HessianOperator(loss, named.items()),
        HessianOperator.from_batches(lambda _: (loss(), 1), named.items(), [0]),
        HessianOperator.layers(loss, groups)["last"],
        GaussNewtonOperator(outputs.square().sum(), outputs, named.items()),
    ]
    for change in (lambda p: p.data.neg_(), lambda p: p.detach().neg_()):  # without and with the counter
        change(net[1].weight)
        for H in made:
            with pytest.raises(RuntimeError, match=r"^1\.weight: expected the values .* changed in place"):
                eigsh(H, 1)


def test_a_dict_or_a_module_as_parameters_is_refused_with_a_hint():
    net = nn.Linear(3, 1)

    def loss():
        return net(torch.ones(3)).square().sum()

    for make in (
        lambda params: HessianOperator(loss, params),
        lambda params: HessianOperator.from_batches(lambda _: (loss(), 1), params, [0]),
        lambda params: HessianOperator.layers(loss, {"all": params}),
    ):
        with pytest.raises(TypeError, match=r": expected an iterable .* got a dict: pass its \.items\(\)"):
            make(dict(net.named_parameters()))
        with pytest.raises(TypeError, match=r": expected .* got a module, Linear: pass its \.parameters\(\)"):
            make(net)
    with pytest.raises(TypeError, match=r"got a module, Sequential: pass its \.parameters\(\)"):  # an iterable
        HessianOperator(loss, nn.Sequential(net))
    with pytest.raises(ValueError, match=r"every tensor once, got one twice, as weight and tied"):
        HessianOperator(loss, [*net.named_parameters(), ("tied", net.weight)])


def test_random_closure_is_refused_and_rng_state_kept():
    params = mlp()

    def noisy():
        hidden = F.dropout(torch.tanh(X @ params[0] + params[1]), 0.5)
        return F.cross_entropy(hidden @ params[2] + params[3], Y)

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"loss: expected the same value .* got"):
        HessianOperator(noisy, params)
    assert torch.equal(torch.get_rng_state(), state)


def nan_then(*values):
    values = iter([torch.nan, *values])
    return lambda p: (p * 0).sum() + next(values)


def test_a_nan_once_is_not_repeatable():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    once, always = nan_then(1.0), nan_then(torch.nan)
    with pytest.raises(ValueError, match=r"loss: expected the same value.*got.*nan"):
        HessianOperator(lambda: once(p), [p])
    H = HessianOperator(lambda: always(p), [p])
    assert H.shape == (3, 3)
    diverged = torch.full((3,), torch.nan, dtype=torch.float64, requires_grad=True)
    with pytest.warns(ConvergenceWarning):
        assert eigsh(HessianOperator(lambda: (diverged**3).sum(), [diverged]), 1).status == "non-finite product"


def test_an_infinite_loss_once_is_not_repeatable():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    values = iter([torch.inf, 1.0])
    with pytest.raises(ValueError, match=r"loss: expected the same value.*got.*inf"):
        HessianOperator(lambda: p.sum() + next(values), [p])


def test_products_are_constants_for_autograd():
    params = mlp()
    H = HessianOperator(loss_of(params), params)
    v = torch.ones(H.shape[0], dtype=torch.float64, requires_grad=True)
    assert not (H @ v).requires_grad


def test_inference_mode_is_named():
    params = mlp()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"loss: expected .* got .*inference_mode"):
        HessianOperator(lambda: loss_of(params), params)


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(ValueError, match=r"params: expected dense gradients, got.*sparse_coo.*\(5, 3\)"):
        HessianOperator((model(torch.tensor([1, 2])) ** 2).sum(), model.parameters())


def test_no_python_runs_between_products():
    params = mlp()
    H = HessianOperator(loss_of(params), params)
    op = H._op
    calls = []
    v = torch.ones(H.shape[0], dtype=torch.float64)
    eigsh(H)  # imports and caches
    sys.setprofile(lambda frame, event, arg: calls.append((event, getattr(arg, "__name__", frame.f_code.co_name))))
    try:
        op.apply(v)
    finally:
        sys.setprofile(None)
    # How often each is told of is the interpreter's.
    assert "setprofile" in (told := {name for _, name in calls}) and told <= {"apply", "setprofile"}
    assert events_of(lambda: eigsh(H, tol=1e-1)) == events_of(lambda: eigsh(H, tol=1e-9))


def events_of(call):
    """How many Python and builtin calls happen: the same for few products and for many."""
    count = 0

    def profile(*_):
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    assert result.num_hvp > 0
    return count


def test_exception_in_a_python_backward_passes_through():
    class Marker(Exception):
        pass

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return Second.apply(g)

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g):
            return g.clone()

        @staticmethod
        def backward(ctx, g):
            raise Marker("from the second backward")

    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="autograd.Function Broken"):
        H = HessianOperator((Broken.apply(p) ** 3).sum(), [p])
    with pytest.raises(Marker, match="second backward"):
        H @ torch.ones(3, dtype=torch.float64)
    with pytest.raises(Marker, match="second backward"):
        eigsh(H, 1)


def bad_inputs():
    params = mlp()
    good = loss_of(params)
    half = torch.ones(3, dtype=torch.float16, requires_grad=True)
    single = torch.ones(3, dtype=torch.float32, requires_grad=True)
    yield "loss", 1.0, params, TypeError, "loss: expected a 0-d torch.Tensor or a closure .* got float"
    yield "loss shape", torch.stack([good, good]), params, ValueError, r"loss: expected a 0-d tensor, got shape \(2,\)"
    yield (
        "loss graph",
        good.detach(),
        params,
        ValueError,
        "loss: expected a tensor with its graph, got one made without grad",
    )
    yield "closure", lambda: 1.0, params, TypeError, "loss: expected a 0-d torch.Tensor, got float"
    yield "params", good, 3, TypeError, "params: expected an iterable of tensors, got int"
    yield "empty", good, [], ValueError, "params: expected at least one tensor, got none"
    yield "one tensor", good, params[0], TypeError, "params: expected an iterable of tensors, got one tensor"
    yield "not tensors", good, ["w"], TypeError, r"params\[0\]: expected a torch.Tensor, got str"
    yield "half", good, [half], ValueError, r"params\[0\]: expected float32 or float64, got torch.float16"
    yield (
        "mixed",
        good,
        [*params, single],
        ValueError,
        r"params\[4\]: expected one dtype and device .* got torch.float32 on cpu",
    )
    yield (
        "no grad",
        good,
        [params[0].detach()],
        ValueError,
        r"params\[0\]: expected a tensor that requires grad, got .* \(2, 7\) that does not",
    )
    yield "twice", good, [params[0], params[0]], ValueError, "params: expected every tensor once, got one twice"
    yield (
        "unrelated",
        good,
        mlp(),
        ValueError,
        "loss: expected one that depends on params, got one",
    )


@pytest.mark.parametrize("case", list(bad_inputs()), ids=lambda case: case[0])
def test_bad_input(case):
    _, loss, params, error, match = case
    with pytest.raises(error, match=match):
        HessianOperator(loss, params)


@pytest.mark.parametrize(
    ("v", "error", "match"),
    [
        ([1.0], TypeError, "v: expected a torch.Tensor, got list"),
        (torch.ones(3, dtype=torch.float64), ValueError, r"v: expected shape \(45,\) or \(45, k\), got \(3,\)"),
        (torch.ones(45, 1, 1, dtype=torch.float64), ValueError, r"v: expected shape .* got \(45, 1, 1\)"),
        (torch.ones(45), ValueError, "v: expected torch.float64 on cpu, got torch.float32 on cpu"),
    ],
)
def test_bad_vector(v, error, match):
    params = mlp()
    with pytest.raises(error, match=match):
        HessianOperator(loss_of(params), params) @ v
