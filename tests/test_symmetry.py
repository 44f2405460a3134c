"""Second derivatives of torch's that are wrong are told from the noise of products."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dynloss_ext import (
    ConvergenceWarning,
    EigenResult,
    EigenTracker,
    GaussNewtonOperator,
    HessianOperator,
    eigsh,
    spectral_density,
    trace,
)

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 5


class Times(torch.autograd.Function):
    """x w, whose backward pass hides from autograd what w does to the gradient of x."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w.detach(), (gradient * x).sum(0)


class Nearly(Times):
    """The same, which hides a thousandth of it."""

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * (w + (w.detach() - w) / 1000), (gradient * x).sum(0)


class Deaf(Times):
    """The same, whose backward pass hides what it is given."""

    @staticmethod
    def backward(ctx, gradient):
        return Times.backward(ctx, gradient.detach())


class Scale(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.times = times

    def forward(self, x):
        return self.times(x, self.weight)


def scaled(times=Times.apply):
    return nn.Sequential(nn.Linear(6, 8), Scale(times), nn.Tanh(), nn.Linear(8, 5)), X


def normed(old):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    if old:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(model[0])
    else:
        weight_norm(model[0])
    return model


def embedded():
    embedding = nn.Embedding(9, 3, scale_grad_by_freq=True)
    return nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), nn.Linear(6, 5)), torch.arange(128).view(64, 2) ** 2 % 9


WRONG = {
    "WeightNormInterfaceBackward": lambda: (normed(old=True), X),
    "WeightNormInterface": lambda: (normed(old=False), X),
    "EmbeddingBackward": embedded,
    "TimesBackward": scaled,
}


def make(build, dtype=torch.float64):
    torch.manual_seed(0)
    model, x = build()
    return model.to(dtype), x.to(dtype) if x.is_floating_point() else x


def by_differences(loss, params, step=1e-5):
    """The dense Hessian from first derivatives alone."""
    rows = []
    for p in params:
        for i in range(p.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                sides.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), params)]))
                with torch.no_grad():
                    p.view(-1)[i] -= sign * step
            rows.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(rows)


@pytest.mark.parametrize("name", sorted(WRONG.keys() - {"EmbeddingBackward"}))  # what that calls a gradient is none
def test_what_is_called_wrong_is_wrong(name):
    model, x = make(WRONG[name])
    params = list(model.parameters())
    expected = by_differences(lambda: F.cross_entropy(model(x), Y), params)
    H = HessianOperator(F.cross_entropy(model(x), Y), params).to_dense()
    scale = expected.abs().max()
    assert (expected - expected.T).abs().max() < 1e-6 * scale
    assert (H - expected).abs().max() > 1e-2 * scale


def operators(model, x, factor=1.0):
    params = list(model.parameters())

    def batch(rows):
        return factor * F.cross_entropy(model(x[rows]), Y[rows], reduction="sum"), len(rows)

    yield HessianOperator(factor * F.cross_entropy(model(x), Y), params)
    yield HessianOperator.from_batches(batch, params, [torch.arange(40), torch.arange(40, 64)])


@pytest.mark.parametrize("factor", [1e-12, 1.0, -1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_no_solver_returns_numbers_of_a_wrong_hessian(name, dtype, factor):
    model, x = make(WRONG[name], dtype)
    for H in operators(model, x, factor):
        for solve in (eigsh, EigenTracker().update):
            with pytest.warns(ConvergenceWarning, match=f"stopped by not symmetric .* some layer is wrong, .*{name}"):
                result = solve(H)
            assert result.status == "not symmetric"
            assert not result.converged.any()
            assert result.num_hvp < 24
        for solve in (spectral_density, trace, lambda H: trace(H, method="hutchinson")):
            with pytest.raises(ValueError, match=f"H: expected .* not symmetric: .* {name}"):
                solve(H)


@pytest.mark.filterwarnings("ignore:loss. its second derivative is only as right")
def test_a_hessian_is_held_to_rounding_and_a_callable_to_the_tolerance():
    """What is wrong by less than a coarse tolerance is wrong, where products are known to be derivatives."""
    H = next(operators(*make(lambda: scaled(Nearly.apply))))
    with pytest.warns(ConvergenceWarning, match="not symmetric"):
        assert eigsh(H, tol=0.1).status == "not symmetric"
    assert eigsh(lambda v: H @ v, n=H.shape[0], dtype=torch.float64, tol=0.1).converged.all()


def test_the_tracker_says_so_between_audits_too():
    right, wrong = (make(lambda times=times: scaled(times)) for times in (torch.mul, Times.apply))
    tracker = EigenTracker()
    assert tracker.update(next(operators(*right))).converged.all()
    with pytest.warns(ConvergenceWarning, match="not symmetric"):
        assert tracker.update(next(operators(*wrong))).status == "not symmetric"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_an_eigenvector_to_start_from_hides_nothing(name, dtype):
    """One vector that H is done with has no other to compare its product with."""
    model, x = make(WRONG[name], dtype)
    for H in operators(model, x):
        values, vectors = torch.linalg.eig(H.to_dense().double())
        top = values.real.argmax()
        assert values.imag[top] == 0
        v0 = vectors[:, top].real.to(dtype)
        with pytest.warns(ConvergenceWarning, match="not symmetric"):
            result = eigsh(H, 1, v0=v0)
        assert result.status == "not symmetric"
        assert not result.converged.any()
        assert result.num_hvp <= 6


@pytest.mark.filterwarnings("ignore::dynloss_ext.ConvergenceWarning")
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", WRONG)
def test_a_tracker_of_one_eigenvector_says_so_at_every_update(name, which):
    model, x = make(WRONG[name])
    tracker = EigenTracker(k=1, which=which)
    for H in [H for _ in range(3) for H in operators(model, x)]:
        assert tracker.update(H).status == "not symmetric"
        again = EigenTracker(k=1, which=which)
        again.load_state_dict(tracker.state_dict())
        tracker = again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 200, 20_000])
def test_a_callable_with_an_eigenvector_to_start_from(n, dtype):
    """S + a bᵀ with the eigenvector a of the symmetric S, of which Hᵀ makes something else."""
    a, b = torch.linalg.qr(torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0].T
    d = torch.linspace(-1, 1, n, dtype=torch.float64)
    P = lambda v: v - a * (a @ v)  # noqa: E731

    def product(asymmetry):
        return lambda v: (P(d * P(v.double())) + 5 * a * (a @ v.double()) + asymmetry * a * (b @ v.double())).to(dtype)

    v0 = a.to(dtype)
    assert float(eigsh(product(0.0), 1, v0=v0).values) == pytest.approx(5, rel=1e-3)
    with pytest.raises(ValueError, match="H: expected a symmetric operator, got one that is not symmetric"):
        eigsh(product(0.5), 1, v0=v0)
    tracker = EigenTracker(k=1)
    tracker.update(product(0.0), n=n, dtype=dtype)
    for _ in range(3):
        with pytest.raises(ValueError, match="not symmetric"):
            tracker.update(product(0.5), audit=tracker._num_asymmetric == 0)


def test_a_training_loop_is_warned_once():
    """Python's filter knows a warning by its words and place."""
    model, x = make(WRONG["WeightNormInterface"])
    tracker, asymmetries = EigenTracker(), set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(4):
            result = tracker.update(HessianOperator(F.cross_entropy(model(x), Y), model.parameters()))
            assert 0 < result.asymmetry < 1
            asymmetries.add(f"{result.asymmetry:.1g}")
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.3)
    assert len(asymmetries) > 1
    assert [w.category for w in caught] == [ConvergenceWarning]


def test_gauss_newton_is_measured_too():
    """Its product J v is a second derivative, of the pullback."""
    model, x = make(lambda: scaled(Deaf.apply))
    outputs = model(x)
    H = GaussNewtonOperator(F.cross_entropy(outputs, Y), outputs, model.parameters())
    with pytest.warns(ConvergenceWarning, match="not symmetric .* DeafBackward"):
        eigsh(H)


def deep(norm, width=16, depth=3, activation=nn.GELU):
    layers = [module for i in range(depth) for module in (nn.Linear(width if i else 6, width), norm(), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def saturated(model, x, composite=False):
    z = 30 * model(x)
    y = z.argmax(1)
    return (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean() if composite else F.cross_entropy(z, y)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(x), Y)


def plain(model, x):
    return F.cross_entropy(model(x), Y)


def spread(model, x):
    return F.cross_entropy(model(x * torch.logspace(-4, 4, 6).to(x)), Y)


RIGHT = {
    "batch norm": (lambda: deep(lambda: nn.BatchNorm1d(16), depth=8), plain),
    "batch norm, inputs over eight decades": (lambda: deep(lambda: nn.BatchNorm1d(16)), spread),
    "layer norm, inputs over eight decades": (lambda: deep(lambda: nn.LayerNorm(16)), spread),
    "inputs over eight decades": (lambda: deep(nn.Identity, activation=nn.Tanh), spread),
    "saturated": (lambda: deep(nn.Identity), saturated),
    "saturated, by hand": (lambda: deep(nn.Identity), lambda model, x: saturated(model, x, composite=True)),
    "autocast": (lambda: deep(nn.Identity), autocast),
    "autocast, batch norm": (lambda: deep(lambda: nn.BatchNorm1d(16)), autocast),
    "nothing left": (lambda: deep(nn.Identity), lambda model, x: F.mse_loss(model(x), model(x).detach())),
    "cancelling": (
        lambda: deep(nn.Identity),
        lambda model, x: 1e3 * (model(x) - model(x)).sum() + 1e-6 * plain(model, x),
    ),
    "huge": (lambda: deep(nn.Identity), lambda model, x: 1e20 * plain(model, x)),
    "tiny": (lambda: deep(nn.Identity), lambda model, x: -1e-20 * plain(model, x)),
}


@pytest.mark.filterwarnings("ignore::dynloss_ext.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RIGHT)
def test_noise_is_no_asymmetry(name, dtype):
    build, loss = RIGHT[name]
    for seed in range(2):
        torch.manual_seed(seed)
        model, x = build().to(dtype), X.to(dtype)
        H = HessianOperator(loss(model, x), model.parameters())
        for which in ("LA", "SA"):
            assert eigsh(H, 3, which=which, tol=1e-6, max_hvp=40).status != "not symmetric"
            v0 = eigsh(H, 1, which=which, max_hvp=40).vectors
            assert eigsh(H, 1, which=which, v0=v0, max_hvp=40).status != "not symmetric"
        assert math.isfinite(trace(H, num_probes=12).value)
        assert spectral_density(H, num_steps=20, num_probes=2).nodes.isfinite().all()


def test_random_rounding_leaves_no_trace():
    """The products that measure the noise hook into the graph of the loss for as long as they take."""
    model, x = make(WRONG["WeightNormInterface"], torch.float32)
    loss = F.cross_entropy(model(x), Y)
    H = HessianOperator(loss, model.parameters())
    v = torch.randn(H.shape[0])
    before, state = H @ v, torch.get_rng_state()
    noisy = H._op.apply_noisily(v)
    assert not torch.equal(noisy, before)
    assert torch.allclose(noisy, before, rtol=1e-3, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(H @ v, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_costs_products_only_where_there_is_some():
    model, x = make(lambda: (deep(nn.Identity), X))
    H = HessianOperator(F.cross_entropy(model(x), Y), model.parameters())
    calls = []
    result = eigsh(lambda v: (calls.append(1), H @ v)[1], 3, n=H.shape[0], dtype=torch.float64)
    assert eigsh(H, 3).num_hvp == result.num_hvp == len(calls)
    calls.clear()
    trace(lambda v: (calls.append(1), H @ v)[1], num_probes=30, n=H.shape[0], dtype=torch.float64)
    assert len(calls) == 30


def test_every_status_is_in_the_table():
    for status in (
        "converged",
        "converged, not audited",
        "converged, audit inconclusive",
        "max_hvp",
        "noise floor",
        "not symmetric",
        "non-finite product",
    ):
        assert f'"{status}"' in EigenResult.__doc__
