"""HessianOperator: products against the dense Hessian, and everything it must refuse."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y, dense_hessian, loss_of, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynloss_ext import (
    _C,
    ConvergenceWarning,
    EigenTracker,
    GaussNewtonOperator,
    HessianOperator,
    eigsh,
    spectral_density,
    trace,
)


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


def fused(optimizer):
    def step(params):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer(params, lr=1e-3, fused=True).step()

    return step


def give_and_take(params):
    """The same sum of bits."""
    bits = params[0].data.view(-1).view(torch.int32)
    bits[0] += 8
    bits[2] -= 8


BEHIND_THE_COUNTER = {
    "SGD": fused(torch.optim.SGD),
    "Adam": fused(torch.optim.Adam),
    "data": lambda params: params[0].data.mul_(1 + 1e-6),
    "to NaN": lambda params: params[0].data.fill_(float("nan")),
    "exchanged": lambda params: params[0].data.copy_(params[0].data.flip(0)),
    "given and taken": give_and_take,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", BEHIND_THE_COUNTER)
def test_a_step_that_no_version_counter_sees_is_refused_by_every_solve(how, dtype):
    params = [*mlp(dtype), torch.tensor([3.0], dtype=dtype).requires_grad_()]
    params[2] = params[2].detach()[:, ::2].requires_grad_()  # with gaps in between
    params[3] = params[3].detach()[:2].clone().requires_grad_()

    def loss():
        hidden = torch.tanh(X.to(dtype) @ params[0] + params[1])
        return F.cross_entropy(params[4] * (hidden @ params[2] + params[3]), Y % 2)

    z = params[0] * 2
    made = [
        HessianOperator(loss(), params),
        GaussNewtonOperator(z.square().sum(), z, params[:1]),
        HessianOperator.from_batches(lambda _: (loss(), 1.0), params, [0]),
    ]
    versions = [p._version for p in params]
    for H in made:
        assert eigsh(H, 1).converged.all()
    BEHIND_THE_COUNTER[how](params)
    assert [p._version for p in params] == versions
    for H in made:
        for use in (eigsh, EigenTracker(1).update, spectral_density, trace, HessianOperator.to_dense):
            with pytest.raises(RuntimeError, match=r"params.*: expected .* got .* changed in place"):
                use(H)


def by_hand(x, table):
    """Σ w_i f_i modulo 2⁶⁴ in Python's integers."""
    words = x.detach().reshape(-1).contiguous().view(torch.int32).tolist()
    return sum(word * factor for word, factor in zip(words, table, strict=False)) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints(dtype):
    """All ways to compute them agree, on the sum by hand with the factors that unit vectors show."""
    generator = torch.Generator().manual_seed(0)
    length = 10_000  # more than two blocks of factors
    one = torch.zeros(length, dtype=torch.int32)
    table = []
    for i in range(length):
        one[i] = 1
        table.append(int(_C.fingerprints([one.view(torch.float32)])))
        one[i] = 0
    assert all(factor % 2 for factor in table)
    assert len(set(table)) == length
    x = torch.randn(length // 2, dtype=dtype, generator=generator)
    with_gaps = torch.stack([x, x], 1)[:, 0]
    assert not with_gaps.is_contiguous()
    expected = by_hand(x, table)
    for given in (x, with_gaps, x.view(50, 100), x.view(100, 50).T):  # the last has the same memory
        assert int(_C.fingerprints([given])) % 2**64 == expected
    assert by_hand(x.flip(0), table) != expected
    assert _C.fingerprints([x[:0], x[0], x[:1]]).tolist()[0] == 0
    assert int(_C.fingerprints([x[0]])) == int(_C.fingerprints([x[:1]]))


def test_fingerprints_of_what_a_device_takes_in_pieces():
    """More than is taken at once, with gaps, as of tensors on a device."""
    x = torch.randn(1_500_000, generator=torch.Generator().manual_seed(0))
    assert int(_C.fingerprints([torch.stack([x, x], 1)[:, 0]])) == int(_C.fingerprints([x]))


def test_any_exchange_of_two_values_shows():
    """Also of values whose bits differ by a power of two, far apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(200_000)
    before = int(_C.fingerprints([x]))
    for exponent in range(-100, 100, 7):
        prints = set()
        for place in torch.randint(len(x), (20,), generator=generator).tolist():
            x[place] = 2.0**exponent
            prints.add(int(_C.fingerprints([x])))
            x[place] = 1.0
        assert before not in prints or exponent == 0
        assert len(prints) >= 19 or exponent == 0


def test_strides_changed_behind_the_counter_are_noticed():
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    H = HessianOperator(w.pow(3).sum(), [w])
    w.data = w.data.T
    with pytest.raises(RuntimeError, match=r"params\[0\]: expected .* changed in place"):
        H @ torch.ones(9, dtype=torch.float64)


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


class Counter(nn.Module):
    """In training mode writes to one buffer and replaces another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("empty", None)

    def forward(self, x):
        if self.training:
            self.written += 1
            self.replaced = self.replaced + 1
        return x


def batch_norm_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), Counter(), nn.Linear(4, 3)).double()


def assert_same_state(model, before, tensors):
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer is tensors[name], name


@pytest.mark.parametrize("how", ["call", "functional", "raises"])
def test_buffers_stay_as_they_were(how):
    model = batch_norm_model()
    params = list(model.parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = dict(model.named_buffers())

    def closure():
        if how == "functional":
            return F.cross_entropy(torch.func.functional_call(model, dict(model.named_buffers()), (X,)), Y)
        loss = F.cross_entropy(model(X), Y)
        if how == "raises":
            raise KeyError("mine")
        return loss

    if how == "raises":
        with pytest.raises(KeyError, match="mine"):
            HessianOperator(closure, params)
    else:
        dense = HessianOperator(closure, params).to_dense()
        assert dense.isfinite().all()
    assert_same_state(model, before, tensors)
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks


def test_buffers_of_a_vmapped_ensemble_stay_as_they_were():
    model = batch_norm_model()[:2]
    params, buffers = torch.func.stack_module_state([batch_norm_model()[:2] for _ in range(2)])
    before = {name: buffer.clone() for name, buffer in buffers.items()}

    def closure():
        outputs = torch.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (X,)))(params, buffers)
        return (outputs**3).sum()

    H = HessianOperator(closure, params.values())
    assert all(torch.equal(buffers[name], before[name]) for name in before)
    assert (H @ torch.ones(H.shape[0], dtype=torch.float64)).isfinite().all()


def test_other_threads_keep_what_they_do_to_buffers_of_other_models():
    ours, theirs = batch_norm_model(), batch_norm_model()

    def closure():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(theirs, X).result()
            return F.cross_entropy(pool.submit(ours, X).result(), Y)

    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    tensors = dict(ours.named_buffers())
    HessianOperator(closure, ours.parameters())
    HessianOperator.from_batches(lambda _: (closure(), 1), ours.parameters(), [0]).to_dense()
    assert_same_state(ours, before, tensors)
    assert theirs[1].num_batches_tracked > 2


@pytest.mark.parametrize("pool_of_before", [False, True])
def test_a_closure_may_wait_for_threads_that_measure_curvature(pool_of_before):
    """Each within the other, on threads of before or of its own, and with the random state as it was."""
    w = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def inner(power):
        if power == 3:
            return float(eigsh(HessianOperator(lambda: w.pow(3).sum() * measured(2), [w]), 1).values)
        return float(eigsh(HessianOperator.from_batches(lambda _: (w.pow(power).sum(), 1), [w], [0]), 1).values)

    def measured(power):
        if pool_of_before:
            return pool.submit(inner, power).result()
        with ThreadPoolExecutor(1) as own:
            return own.submit(inner, power).result()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: time.sleep(0.05), range(3)))
        state = torch.get_rng_state()
        H = HessianOperator(lambda: w.pow(2).sum() * measured(3), [w])
        assert torch.equal(torch.get_rng_state(), state)
    assert H.to_dense()[0, 0] == pytest.approx(2 * 6 * 3 * 2)


def test_evaluations_of_threads_take_turns():
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    state, inside, together = torch.get_rng_state(), [], []

    def closure():
        inside.append(1)
        time.sleep(0.1)  # outside of Python's threading
        together.append(len(inside))
        inside.pop()
        return w.square().sum()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: HessianOperator(closure, [w]), range(3)))
    assert set(together) == {1}
    assert torch.equal(torch.get_rng_state(), state)


class CountsAlways(Counter):
    """In eval mode, too."""

    def forward(self, x):
        self.written += 1
        self.replaced = self.replaced + 1
        return x


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_buffers_written_in_eval_mode_or_in_script_stay_as_they_were(training, scripted):
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Sequential(CountsAlways()), nn.Linear(4, 3)).double()
    model.train(training)
    if scripted:
        model[2] = torch.jit.script(model[2])
        model[1] = torch.jit.script(model[1])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    HessianOperator(lambda: F.cross_entropy(model(X), Y), model.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("dims", [(3, 4), (0, 4), (1, 1)])
def test_an_expanded_buffer_is_no_hindrance(dims):
    model = batch_norm_model()
    row = torch.arange(4.0, dtype=torch.float64)[: dims[1]]
    model[3].register_buffer("expanded", row.expand(*dims))

    def count(*_):
        row.add_(1)

    model[3].register_forward_hook(count)
    before = row.clone()
    HessianOperator(lambda: F.cross_entropy(model(X), Y), model.parameters())
    assert dims[0] == 0 or torch.equal(row, before)


def test_a_checkpoint_that_runs_again_in_every_product_keeps_its_buffers():
    model = batch_norm_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    params = list(model.parameters())

    def closure():
        return F.cross_entropy(checkpoint(model, X, use_reentrant=False), Y)

    H = HessianOperator(closure, params)
    loss = closure()
    tensors = dict(model.named_buffers())
    for name, buffer in tensors.items():
        buffer.data.copy_(before[name])
    for operator in (H, HessianOperator(loss, params)):
        eigsh(operator, 1)
        trace(operator, num_probes=6)
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)
        assert_same_state(model, before, tensors)


def test_a_module_that_calls_itself_keeps_its_buffers():
    class Twice(Counter):
        def forward(self, x, again=True):
            x = super().forward(x)
            return self(x, again=False) if again else x

    model = batch_norm_model()
    model[3] = Twice()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = dict(model.named_buffers())
    HessianOperator(lambda: F.cross_entropy(model(X), Y), model.parameters())
    assert_same_state(model, before, tensors)


def test_batch_norm_product_is_that_of_the_batch():
    model = batch_norm_model()
    params = list(model.parameters())
    H = HessianOperator(lambda: F.cross_entropy(model(X), Y), params)
    dense = HessianOperator(F.cross_entropy(model(X), Y), params).to_dense()
    assert torch.allclose(H.to_dense(), dense, rtol=1e-12, atol=1e-14)


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
    assert [name for _, name in calls] in (["apply", "apply", "setprofile"], ["setprofile"])
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
