"""Limits of optimizers, what they divide by, and the sharpness of batches: by training, and against dense matrices."""

import math

import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y, mlp
from torch import nn

from dynloss_ext import HessianOperator, batch_sharpness, eigsh, preconditioner, stability_limit

# ---- SGD -------------------------------------------------------------------------------------------------


def final_distance(curvature, settings, steps=6000):
    weight = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], **settings)
    limit = stability_limit(optimizer)
    for _ in range(steps):
        weight.grad = curvature(limit) * weight.detach()
        optimizer.step()
        if not abs(weight.item()) < 1e9:
            break
    return abs(weight.item())


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1.0},
        {"lr": 0.3, "weight_decay": 0.5},
        {"lr": 0.3, "dampening": 0.5},  # without momentum torch ignores it
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.2},
        {"lr": 0.1, "momentum": 0.9, "dampening": -0.5},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 1.0, "nesterov": True},  # its damping grows with the curvature
        {"lr": 0.1, "momentum": 1.2, "nesterov": True},
        {"lr": 0.2, "momentum": 0.6, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_sgd_on_a_quadratic_converges_below_the_limit_and_diverges_above(settings):
    assert final_distance(lambda limit: 0.99 * limit, settings) < 1e-6
    assert final_distance(lambda limit: 1.01 * limit, settings) > 1e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "optimizer: expected a momentum below 1 .* got 1.0"),
        ({"momentum": 1.1}, "optimizer: expected a momentum below 1 .* got 1.1"),
        ({"momentum": 0.9, "dampening": 1.0}, "optimizer: expected a dampening below 1 .* got 1.0"),
        ({"momentum": 0.9, "dampening": 1.5}, "optimizer: expected a dampening below 1 .* got 1.5"),
    ],
)
def test_settings_with_which_no_curvature_converges_are_refused(settings, message):
    for curvature in (0.07, 0.7, 7.0, 70.0):
        weight = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1, **settings)
        distance = []
        for _ in range(4000):
            weight.grad = curvature * weight.detach()
            optimizer.step()
            distance.append(abs(weight.item()))
        assert not max(distance[2000:]) < 1e-3  # plain descent is at 1e-6 after 2000 steps
    with pytest.raises(ValueError, match=message):
        stability_limit(optimizer)


def test_nesterov_with_momentum_above_one_needs_a_curvature_too():
    settings = {"lr": 0.1, "momentum": 1.2, "nesterov": True}
    least = (1 - 1 / 1.2) / 0.1
    assert final_distance(lambda _: 0.9 * least, settings) > 1e6
    assert final_distance(lambda _: 1.1 * least, settings) < 1e-6


def test_limit_of_a_tensor_learning_rate_and_of_zero():
    weight = torch.zeros(1, requires_grad=True)
    assert stability_limit(torch.optim.SGD([weight], lr=torch.tensor(0.5))) == 4
    assert stability_limit(torch.optim.SGD([weight], lr=0.0)) == math.inf


def test_unknown_limits_are_refused():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"optimizer: expected a torch.optim.SGD.* got Adagrad"):
        stability_limit(torch.optim.Adagrad([a]))
    with pytest.raises(ValueError, match=r"optimizer: expected a torch.optim.SGD.* got float"):
        stability_limit(0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer: expected equal .* got parameter groups that differ"):
        stability_limit(torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}]))
    with pytest.raises(ValueError, match=r"optimizer: expected .* got maximize=True"):
        stability_limit(torch.optim.SGD([a], lr=0.1, maximize=True))


# ---- optimizers that divide by a diagonal ----------------------------------------------------------------

STILL = 1 - 2**-53  # of an average that does not move, as long as gradients are not large
START = 1e-8
V = torch.tensor([0.04, 1.0, 9.0, 0.25], dtype=torch.float64)
MEAN = torch.tensor([0.1, 0.0, 2.0, 0.3], dtype=torch.float64)
Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
MATRIX = (Q * torch.tensor([1.0, 0.8, 0.5, 0.4], dtype=torch.float64)) @ Q.T


def frozen(make, settings):
    """An optimizer whose diagonal rests, its parameter, and the diagonal."""
    x = torch.full((4,), START, dtype=torch.float64, requires_grad=True)
    optimizer = make([x], eps=0.1, foreach=False, **settings)
    state = {"step": torch.tensor(1e20)}  # no bias is left, and one more is none
    if make is torch.optim.RMSprop:
        state |= {"square_avg": V.clone(), "grad_avg": MEAN.clone(), "momentum_buffer": torch.zeros_like(x)}
    else:
        state |= {"exp_avg_sq": V.clone(), "exp_avg": torch.zeros_like(x), "max_exp_avg_sq": V.clone()}
    optimizer.state[x] = state
    return optimizer, x, (V - MEAN**2 if settings.get("centered") else V).sqrt() + 0.1


def distance_at(share, make, settings, coupled, steps=3000):
    """How far training ends from the minimum of a quadratic whose preconditioned curvature is a share of the limit."""
    optimizer, x, diagonal = frozen(make, settings)
    root = diagonal.rsqrt()
    decay = settings.get("weight_decay", 0.0) * coupled
    limit = stability_limit(optimizer)
    # the scale s of the Hessian s M at which the largest eigenvalue is that share, by bisection on dense matrices
    low, high = 0.0, 1e6
    for _ in range(200):
        scale = (low + high) / 2
        seen = root[:, None] * (scale * MATRIX + decay * torch.eye(4)) * root
        low, high = (scale, high) if torch.linalg.eigvalsh(seen)[-1] < share * limit else (low, scale)
    hessian = scale * MATRIX
    H = HessianOperator(x @ hessian @ x / 2, [x])
    of_package = eigsh(H.preconditioned(preconditioner(optimizer), weight_decay=decay), 1, tol=1e-8).values.item()
    assert of_package == pytest.approx(share * limit, rel=1e-9)
    for _ in range(steps):
        x.grad = hessian @ x.detach()
        optimizer.step()
        if not x.abs().max() < 1e7 * START:
            break
    return x.detach().abs().max().item() / START


DIVIDING = [
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.9, STILL)}, False),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.0, STILL)}, False),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, STILL), "amsgrad": True}, False),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, STILL), "weight_decay": 2.0}, True),
    (torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, STILL), "weight_decay": 3.0}, False),
    (torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, STILL), "weight_decay": 12.0}, False),
    (torch.optim.RMSprop, {"lr": 0.1, "alpha": STILL}, False),
    (torch.optim.RMSprop, {"lr": 0.1, "alpha": STILL, "momentum": 0.8}, False),
    (torch.optim.RMSprop, {"lr": 0.1, "alpha": STILL, "momentum": 0.5, "weight_decay": 2.0}, True),
    (torch.optim.RMSprop, {"lr": 0.1, "alpha": STILL, "centered": True}, False),
]


@pytest.mark.parametrize(("make", "settings", "coupled"), DIVIDING)
def test_a_frozen_preconditioner_converges_below_the_limit_and_diverges_above(make, settings, coupled):
    assert distance_at(0.98, make, settings, coupled) < 1e-5
    assert distance_at(1.02, make, settings, coupled) > 1e5


def test_adam_with_decoupled_decay_has_the_limit_of_adamw():
    x = torch.zeros(1, requires_grad=True)
    settings = {"lr": 0.1, "weight_decay": 3.0, "betas": (0.5, 0.9)}
    adam = torch.optim.Adam([x], decoupled_weight_decay=True, **settings)
    assert stability_limit(adam) == pytest.approx(stability_limit(torch.optim.AdamW([x], **settings)))
    assert stability_limit(torch.optim.AdamW([x], **settings)) == pytest.approx(1.5 * 1.7 / 0.05)
    assert stability_limit(torch.optim.Adam([x], lr=0.0)) == math.inf


def test_settings_of_dividing_optimizers_with_which_nothing_converges_are_refused():
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"optimizer: expected lr \* weight_decay below 1 \+ 1 / 0.9 .* got 2.2"):
        stability_limit(torch.optim.AdamW([x], lr=0.1, weight_decay=22.0))
    assert stability_limit(torch.optim.AdamW([x], lr=0.1, weight_decay=21.0)) > -21  # what is left above -w
    with pytest.raises(ValueError, match=r"optimizer: expected a momentum below 1 .* got 1.0"):
        stability_limit(torch.optim.RMSprop([x], momentum=1.0))
    groups = [{"params": [x]}, {"params": [torch.zeros(1, requires_grad=True)], "weight_decay": 0.5}]
    with pytest.raises(ValueError, match=r"optimizer: expected equal lr, betas, .* got parameter groups that differ"):
        stability_limit(torch.optim.AdamW(groups))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True, "betas": (0.8, 0.6)}),
        (torch.optim.Adam, {"weight_decay": 0.3}),
        (torch.optim.AdamW, {"weight_decay": 0.3}),
        (torch.optim.RMSprop, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_step_divides_by_the_preconditioner(make, settings, steps):
    """To rounding, from the first step on, whatever groups set for themselves."""
    params = mlp()
    eps = {} if make is torch.optim.SGD else {"eps": 1e-3}
    optimizer = make([{"params": params[:1], **eps}, {"params": params[1:]}], lr=0.05, **settings)
    for _ in range(steps):
        before = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        F.cross_entropy(torch.tanh(X @ params[0] + params[1]) @ params[2] + params[3], Y).backward()
        optimizer.step()
    shrink = 1 - 0.05 * settings.get("weight_decay", 0) if make is torch.optim.AdamW else 1
    for p, old, diagonal in zip(params, before, preconditioner(optimizer), strict=True):
        state = optimizer.state[p]
        if settings.get("momentum"):
            continue  # its buffer is divided already: below
        numerator = state.get("exp_avg", p.grad)
        torch.testing.assert_close(p.detach(), shrink * old - 0.05 * numerator / diagonal, rtol=1e-12, atol=1e-14)
    if settings.get("momentum") and steps == 1:
        for p, diagonal in zip(params, preconditioner(optimizer), strict=True):
            buffer = optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(buffer, p.grad / diagonal, rtol=1e-12, atol=1e-14)


def test_the_preconditioner_is_a_copy_in_the_order_asked_for():
    model = nn.Linear(3, 2).double()
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
    adam.step()
    weight, bias = preconditioner(adam)
    kept = weight.clone()
    reordered = preconditioner(adam, [("b", model.bias), ("w", model.weight)])
    assert torch.equal(reordered[0], bias) and torch.equal(reordered[1], weight)
    adam.step()
    assert torch.equal(weight, kept)
    ones = preconditioner(torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(d, torch.ones_like(p)) for d, p in zip(ones, model.parameters(), strict=True))
    assert not any(d.requires_grad for d in ones)


def test_preconditioners_that_are_not_there_are_refused():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"expected the state of at least one step, got none for params\[0\]"):
        preconditioner(torch.optim.Adam([a]))
    adam = torch.optim.Adam([a, b])
    a.grad = torch.ones(1)
    adam.step()  # b has no gradient
    with pytest.raises(ValueError, match=r"got none for params\[1\]: call optimizer.step\(\) with gradients first, or"):
        preconditioner(adam)
    assert len(preconditioner(adam, [a])) == 1
    with pytest.raises(ValueError, match=r"other: expected a parameter of the optimizer, got another of shape \(3,\)"):
        preconditioner(adam, [("other", torch.zeros(3, requires_grad=True))])
    with pytest.raises(ValueError, match=r"optimizer: expected one lr, got parameter groups with \[0.1, 0.2\]"):
        preconditioner(torch.optim.Adam([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}]))
    for make in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        for of in (preconditioner, stability_limit):
            with pytest.raises(ValueError, match=r"optimizer: expected one that minimises, got maximize=True"):
                of(make([a], maximize=True))
    with pytest.raises(ValueError, match=r"optimizer: expected a torch.optim.SGD, Adam, .* got Adadelta"):
        preconditioner(torch.optim.Adadelta([a]))


# ---- batches along their gradients -----------------------------------------------------------------------


def dense_sharpness(params, indices):
    """gᵀ H g and ‖g‖² of the mean loss, by torch.autograd.functional."""
    sizes = [p.numel() for p in params]

    def loss(flat):
        w1, b1, w2, b2 = (v.view(p.shape) for v, p in zip(flat.split(sizes), params, strict=True))
        return F.cross_entropy(torch.tanh(X[indices] @ w1 + b1) @ w2 + b2, Y[indices])

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    g = torch.autograd.functional.jacobian(loss, flat)
    return float(g @ torch.autograd.functional.hessian(loss, flat) @ g), float(g @ g)


def sums(params):
    def closure(indices):
        logits = torch.tanh(X[indices] @ params[0] + params[1]) @ params[2] + params[3]
        return F.cross_entropy(logits, Y[indices], reduction="sum"), torch.tensor([len(indices)])

    return closure


def test_batch_sharpness_is_the_mean_of_dense_quotients():
    params = mlp()
    batches = torch.arange(40).split([1, 7, 12, 20])
    curvature, squares = torch.tensor([dense_sharpness(params, i) for i in batches], dtype=torch.float64).unbind(1)
    expected = curvature / squares
    found = batch_sharpness(sums(params), params, iter(batches))
    assert found.value == pytest.approx(expected.mean().item(), rel=1e-11)
    assert found.stderr == pytest.approx(expected.std().item() / 2, rel=1e-9)
    assert all(p.grad is None for p in params)
    single = batch_sharpness(sums(params), [(f"p{i}", p) for i, p in enumerate(params)], batches[:1])
    assert single.value == pytest.approx(expected[0].item(), rel=1e-11) and math.isnan(single.stderr)
    weighted = batch_sharpness(sums(params), params, batches, weighted=True)
    assert weighted.value == pytest.approx((curvature.sum() / squares.sum()).item(), rel=1e-11)


def test_the_standard_error_of_the_weighted_batch_sharpness_is_its_spread():
    """Of batches whose gradients and curvatures vary together: x² and y² of random scales, at a random place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)

    def draw():
        return torch.rand(60, 2, dtype=torch.float64, generator=generator) + 0.1

    found = [batch_sharpness(lambda s: ((s * x**2).sum(), 1), [x], draw(), weighted=True) for _ in range(60)]
    values, errors = torch.tensor([[f.value, f.stderr] for f in found], dtype=torch.float64).unbind(1)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.25)


def test_batch_sharpness_of_tiny_gradients_in_float32():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    found = batch_sharpness(lambda _: (1e-25 * (x**2).sum(), 1), [x], [0])
    assert found.value == pytest.approx(2e-25, rel=1e-5)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), torch.tensor(0), torch.tensor(float("inf"))])
def test_batch_sharpness_refuses_weights_that_are_none(weight):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight_sum: expected a finite number that is more than 0, got"):
        batch_sharpness(lambda _: ((x**2).sum(), weight), [x], [0])
    with pytest.raises(TypeError, match="closure: expected a number or a 0-d tensor as weight_sum, got Tensor"):
        batch_sharpness(lambda _: ((x**2).sum(), torch.ones(2)), [x], [0])


def test_batch_sharpness_leaves_batch_norm_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def closure(indices):
        return model(X[indices]).square().sum(), len(indices)

    assert math.isfinite(batch_sharpness(closure, model.named_parameters(), torch.arange(40).split(10)).value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_without_a_direction_and_closures_that_are_random_are_refused():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(ValueError, match=r"batches: expected at least one batch, got none"):
        batch_sharpness(lambda _: (x.sum(), 1), [x], [])
    with pytest.raises(ValueError, match=r"batches: expected gradients that are finite and not 0, got one of norm 0.0"):
        batch_sharpness(lambda scale: (scale * (x**2).sum(), 1), [x], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"batches: expected gradients that are finite and not 0, got one of norm nan"):
        batch_sharpness(lambda scale: (scale * (x**2).sum(), 1), [x], [math.nan])
    with pytest.raises(TypeError, match=r"closure: expected to return \(loss_sum, weight_sum\), got Tensor"):
        batch_sharpness(lambda _: (x**2).sum(), [x], [0])
    with pytest.raises(TypeError, match=r"closure: expected a callable, got Tensor"):
        batch_sharpness((x**2).sum(), [x], [0])
    with pytest.raises(TypeError, match=r"batches: expected an iterable, got int"):
        batch_sharpness(lambda _: ((x**2).sum(), 1), [x], 3)
    with pytest.raises(ValueError, match=r"loss: expected the same value"):
        batch_sharpness(lambda _: (F.dropout(x**2).sum(), 1), [x], [0])
