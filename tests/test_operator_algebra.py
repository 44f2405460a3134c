"""Sums, multiples, blocks and congruences of operators, against the same of dense matrices."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y, dense_hessian, loss_of, mlp
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dynloss_ext import (
    CapturedHessian,
    ConvergenceWarning,
    EigenTracker,
    GaussNewtonOperator,
    HessianOperator,
    Oscillation,
    PerceptronEnsemble,
    diagonal,
    eigsh,
    preconditioner,
    spectral_density,
    trace,
)

NAMES = ("w1", "b1", "w2", "b2")
P = sum(p.numel() for p in mlp())


def gauss_newton(params):
    outputs = torch.tanh(X @ params[0] + params[1]) @ params[2] + params[3]
    return GaussNewtonOperator(F.cross_entropy(outputs, Y), outputs, params)


def from_batches(params):
    def closure(indices):
        logits = torch.tanh(X[indices] @ params[0] + params[1]) @ params[2] + params[3]
        return F.cross_entropy(logits, Y[indices], reduction="sum"), len(indices)

    return HessianOperator.from_batches(closure, params, torch.arange(40).split(16))


@pytest.fixture(scope="module")
def problem():
    """Parameters, H, G, H of batches, and the dense H and G."""
    params = mlp()
    H, G, B = HessianOperator(loss_of(params), params), gauss_newton(params), from_batches(params)
    return params, H, G, B, dense_hessian(params), G.to_dense()


CASES = {
    "sum": (lambda H, G, B: H + G, lambda h, g: h + g),
    "difference": (lambda H, G, B: H - G, lambda h, g: h - g),
    "multiple": (lambda H, G, B: 2.5 * H, lambda h, g: 2.5 * h),
    "multiple from the right": (lambda H, G, B: H * -0.5, lambda h, g: -0.5 * h),
    "of NumPy": (lambda H, G, B: np.float64(2.5) * H, lambda h, g: 2.5 * h),
    "quotient": (lambda H, G, B: H / 4, lambda h, g: h / 4),
    "sum of a list": (lambda H, G, B: sum([H, G, B]), lambda h, g: 2 * h + g),
    "negative": (lambda H, G, B: -H, lambda h, g: -h),
    "transposed": (lambda H, G, B: H.T, lambda h, g: h),
    "with batches": (lambda H, G, B: B - 3 * G + H, lambda h, g: 2 * h - 3 * g),
    "zero": (lambda H, G, B: H - H, lambda h, g: 0 * h),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_dense_matrices(problem, case):
    _, H, G, B, dense_h, dense_g = problem
    of_operators, of_matrices = CASES[case]
    composed, dense = of_operators(H, G, B), of_matrices(dense_h, dense_g)
    assert (composed.shape, composed.dtype, composed.device) == (H.shape, H.dtype, H.device)
    torch.testing.assert_close(composed.to_dense(), dense, rtol=1e-12, atol=1e-13)
    v = torch.randn(P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(composed @ v[:, 0], dense @ v[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.from_numpy(composed.as_scipy() @ v.numpy()), dense @ v, rtol=1e-12, atol=1e-12)


def test_whatever_takes_an_operator_takes_a_composed_one(problem):
    params, _, G, B, dense_h, dense_g = problem
    D = torch.linspace(0.5, 2, P, dtype=torch.float64)
    root = D.rsqrt()
    composed = (B - 0.5 * G).preconditioned(D).restrict(params[:2])
    dense = (root[:, None] * (dense_h - 0.5 * dense_g) * root)[:21, :21]
    expected = torch.linalg.eigvalsh(dense).flip(0)
    found = eigsh(composed, 3, tol=1e-9)
    assert found.status == "converged"
    torch.testing.assert_close(found.values, expected[:3], rtol=1e-10, atol=0)
    tracker = EigenTracker(2, tol=1e-9, which="SA")
    torch.testing.assert_close(tracker.update(composed).values, expected[-2:], rtol=1e-9, atol=0)
    assert trace(composed, num_probes=63).value == pytest.approx(dense.trace().item())  # the range is everything
    nodes = spectral_density(composed, num_steps=21, num_probes=1).nodes[0]
    torch.testing.assert_close(nodes, expected.flip(0), rtol=1e-6, atol=1e-9)
    estimate = diagonal(composed, num_samples=400)
    assert ((estimate.values - dense.diagonal()).abs() < 5 * estimate.stderr).all()


@pytest.mark.parametrize("chosen", [[0], [2, 1], [3, 0, 1, 2]])
def test_blocks_are_those_of_the_parameters_chosen(problem, chosen):
    params, H, _, B, dense, _ = problem
    index = torch.cat([torch.arange(P).split([p.numel() for p in params])[i] for i in chosen])
    for whole in (H, B):
        block = whole.restrict([params[i] for i in chosen])
        torch.testing.assert_close(block.to_dense(), dense[index][:, index], rtol=1e-12, atol=1e-13)
    again = block.restrict([params[chosen[-1]]])
    own = params[chosen[-1]].numel()
    torch.testing.assert_close(again.to_dense(), dense[index[-own:]][:, index[-own:]], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
@pytest.mark.parametrize("pieces", [False, True])
def test_a_preconditioned_operator_has_roots_on_both_sides(problem, pieces, weight_decay):
    params, H, _, _, dense, _ = problem
    D = torch.rand(P, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e-3
    given = [d.view(p.shape) for d, p in zip(D.split([p.numel() for p in params]), params, strict=True)]
    seen = H.preconditioned(given if pieces else D, weight_decay=weight_decay)
    expected = D.rsqrt()[:, None] * (dense + weight_decay * torch.eye(P).double()) * D.rsqrt()
    torch.testing.assert_close(seen.to_dense(), expected, rtol=1e-12, atol=1e-12)
    before, _ = seen @ torch.ones(P, dtype=torch.float64), D.mul_(2)  # it has a copy
    assert torch.equal(seen @ torch.ones(P, dtype=torch.float64), before)
    unsymmetric = torch.linalg.eigvals((dense + weight_decay * torch.eye(P).double()) / (D / 2)[:, None]).real
    assert eigsh(seen, 1, tol=1e-9).values.item() == pytest.approx(unsymmetric.max().item())


def test_vectors_take_the_shapes_and_names_of_the_parameters(problem):
    params, H, G, _, _, _ = problem
    v = torch.arange(P, dtype=torch.float64)
    pieces = (H + G).unflatten(v)
    assert isinstance(pieces, list)
    assert [tuple(piece.shape) for piece in pieces] == [tuple(p.shape) for p in params]
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), v)
    named = HessianOperator(loss_of(params), zip(NAMES, params, strict=True))
    block = (-named).restrict([params[3], params[0]])
    vectors = eigsh(block, 2).vectors
    shaped = block.unflatten(vectors)
    assert list(shaped) == ["b2", "w1"]
    assert shaped["w1"].shape == (2, 7, 2)
    assert torch.equal(shaped["w1"][..., 1].reshape(-1), vectors[3:, 1])
    layers = HessianOperator.layers(loss_of(params), {"first": zip(NAMES, params[:2], strict=False)})
    assert list(layers["first"].unflatten(v[:21])) == ["w1", "b1"]


def test_what_does_not_belong_together_is_refused(problem):
    params, H, G, _, _, _ = problem
    with pytest.raises(ValueError, match=r"H: expected operators of one shape.* got \(14, 14\)"):
        H + H.restrict(params[:1])
    square = [torch.ones(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = (square[0] ** 2).sum() * square[1].sum() ** 2
    with pytest.raises(ValueError, match=r"H: expected operators by the same params in the same order, got others"):
        HessianOperator(loss, square) - HessianOperator(loss, square[::-1])
    with pytest.raises(TypeError):
        np.ones(2) * H  # rather than an array of operators
    for wrong in (2, torch.ones(P, P, dtype=torch.float64), None):
        with pytest.raises(TypeError):
            H + wrong
        with pytest.raises(TypeError):
            H - wrong
    with pytest.raises(TypeError, match=r"factor: expected a number"):
        H * G
    with pytest.raises(TypeError, match=r"factor: expected a number"):
        True * H
    for wrong in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=r"factor: expected a number in \(-inf, inf\), got"):
            wrong * H
    with pytest.raises(ValueError, match=r"params\[1\]: expected one of the operator's params, got .* shape \(2, 2\)"):
        H.restrict([params[0], square[0]])
    with pytest.raises(ValueError, match=r"params: expected every tensor once"):
        H.restrict([params[0], params[0]])
    with pytest.raises(ValueError, match=r"v: expected shape \(45,\) or \(45, k\), got \(3,\)"):
        H.unflatten(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"divisor: expected a number that is not 0"):
        H / 0.0
    with pytest.raises(TypeError):
        1 + H
    named = HessianOperator(loss_of(params), [("w", p) for p in params])
    with pytest.raises(ValueError, match=r"params: expected a name for each, got w for several"):
        named.unflatten(torch.ones(P, dtype=torch.float64))


def test_operators_by_differences_are_composed_in_every_dtype_they_take():
    """A preconditioner has the dtypes of the parameters, and an operator of them its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4).bfloat16(), nn.Tanh(), nn.Linear(4, 3))
    x, y = X.float(), Y

    def loss():
        return F.cross_entropy(model[2](model[1](model[0](x.bfloat16())).float()), y)

    optimizer = torch.optim.Adam(model.parameters())
    loss().backward()
    optimizer.step()
    H = HessianOperator.from_gradients(loss, model.parameters())
    pieces = preconditioner(optimizer, model.parameters())
    assert [piece.dtype for piece in pieces] == [torch.bfloat16] * 2 + [torch.float32] * 2
    root = torch.cat([piece.float().reshape(-1) for piece in pieces]).rsqrt()
    v = torch.linspace(-1, 1, H.shape[0])
    torch.testing.assert_close(H.preconditioned(pieces) @ v, root * (H @ (root * v)))
    block = H.restrict(list(model[2].parameters()))
    torch.testing.assert_close(block @ v[12:], (H @ torch.cat([torch.zeros(12), v[12:]]))[12:])


def test_diagonals_that_are_none_are_refused(problem):
    params, H, _, _, _, _ = problem
    good = torch.ones(P, dtype=torch.float64)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        bad = good.clone()
        bad[7] = value
        with pytest.raises(ValueError, match=r"diagonal: expected finite numbers that are more than 0, got"):
            H.preconditioned(bad)
    with pytest.raises(ValueError, match=r"diagonal: expected shape \(45,\) or \(45, k\), got \(3,\)"):
        H.preconditioned(good[:3])
    with pytest.raises(ValueError, match=r"diagonal: expected shape \(45,\), got \(45, 1\)"):
        H.preconditioned(good[:, None])
    with pytest.raises(ValueError, match=r"diagonal: expected torch.float64 on cpu, got torch.float32"):
        H.preconditioned(good.float())
    with pytest.raises(ValueError, match=r"diagonal: expected shapes \[\(2, 7\), .*got \[\(7,\), \(2, 7\)"):
        H.preconditioned([torch.ones_like(params[i]) for i in (1, 0, 2, 3)])
    with pytest.raises(TypeError, match=r"diagonal: expected a tensor of shape \(45,\) or a list .*, got float"):
        H.preconditioned(2.0)
    with pytest.raises(ValueError, match=r"weight_decay: expected a number in \[0"):
        H.preconditioned(good, weight_decay=-1.0)


@pytest.mark.parametrize(
    "compose", [lambda H: 2 * H, lambda H: H + H, lambda H: H.preconditioned(torch.ones(P).double())]
)
@pytest.mark.parametrize("silently", [False, True])
def test_a_composed_operator_is_stale_where_a_part_is(compose, silently):
    params = mlp()
    composed = compose(HessianOperator(loss_of(params), params))
    if silently:  # as fused optimizers do: no version counter tells of it
        params[0].data.mul_(2)
    else:
        with torch.no_grad():
            params[0].mul_(2)
    v = torch.ones(P, dtype=torch.float64)
    for use in (lambda: composed @ v, lambda: eigsh(composed, 1), lambda: trace(composed), lambda: diagonal(composed)):
        with pytest.raises(RuntimeError, match="changed in place"):
            use()


def test_a_composed_operator_follows_a_part_that_is_refreshed():
    params = mlp()
    H = CapturedHessian(lambda: loss_of(params), params)
    doubled = 2 * H
    with torch.no_grad():
        params[0].mul_(2)
    H.refresh()
    torch.testing.assert_close(doubled.to_dense(), 2 * dense_hessian(params), rtol=1e-12, atol=1e-13)


def test_an_asymmetry_of_a_part_is_told():
    torch.manual_seed(0)
    linear = weight_norm(nn.Linear(2, 8)).double()  # its second derivative is wrong in torch
    params = list(linear.parameters())
    H = HessianOperator(torch.tanh(linear(X)).square().mean(), params)
    penalty = HessianOperator(sum(p.square().sum() for p in params), params)
    for composed in (penalty + H, -0.5 * H, H.preconditioned(torch.full(H.shape[:1], 2.0, dtype=torch.float64))):
        with pytest.warns(ConvergenceWarning, match="perhaps that of WeightNormInterfaceBackward"):
            assert eigsh(composed, 2).status == "not symmetric"
        with pytest.raises(ValueError, match=r"H: expected a symmetric operator.* WeightNormInterfaceBackward"):
            trace(composed)


def test_a_member_of_an_ensemble_composes_but_knows_no_parameters():
    inputs, labels = X[:20], Y[:20]
    ensemble = PerceptronEnsemble(inputs, labels, Oscillation(3, torch.tensor([1.0, 2.0]), 10), hidden=3, lr=0.1)
    H = ensemble.hessian(1)
    torch.testing.assert_close((H + 2 * H).to_dense(), 3 * H.to_dense())
    D = torch.full((H.shape[0],), 4.0, dtype=torch.float64)
    torch.testing.assert_close(H.preconditioned(D.split([1, H.shape[0] - 1])).to_dense(), H.to_dense() / 4)
    for use in (lambda: H.unflatten(D), lambda: H.restrict([D.requires_grad_()])):
        with pytest.raises(ValueError, match="H: expected an operator that was made with params, got one that knows"):
            use()


def test_checkpoints_and_buffers_of_two_parts_stay_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    before = copy.deepcopy(model.state_dict())

    def loss():
        hidden = torch.utils.checkpoint.checkpoint(model[:2], X, use_reentrant=False)
        return F.cross_entropy(model[2](hidden), Y)

    H = HessianOperator(loss, model.parameters())
    G = HessianOperator(lambda: loss() ** 2, model.parameters())
    torch.testing.assert_close((H + G).to_dense(), H.to_dense() + G.to_dense())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_composed_operators_are_not_pickled(problem):
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.copy(2 * problem[1])
    assert repr(2 * problem[1]) == "CurvatureOperator(shape=(45, 45), dtype=torch.float64, device=cpu)"


def test_what_is_made_of_inexact_products_is_inexact():
    params = mlp()
    D = HessianOperator.from_gradients(lambda: loss_of(params), params)
    H = HessianOperator(loss_of(params), params)
    assert H.noise == 0 < D.noise
    scale = torch.full((P,), 4.0, dtype=torch.float64)
    for made, noise in (
        (D - H, 1.0),
        (-3 * D + D, 4.0),
        (D.restrict(params[:2]), 1.0),
        (D.preconditioned(scale), 0.25),
    ):
        assert made.noise == pytest.approx(noise * D.noise)
    with pytest.warns(ConvergenceWarning, match="noise floor"):
        result = eigsh(D - H, tol=1e-6)
    assert result.values.abs().max() <= 3 * D.noise and result.residuals.min() >= D.noise
