"""Operators over batches, layers and outputs, and what they share."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y, dense_hessian, loss_of, mlp
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn

from dynloss_ext import EigenTracker, GaussNewtonOperator, HessianOperator, eigsh

WEIGHTS = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)


def logits_of(params, x=X):
    return torch.tanh(x @ params[0] + params[1]) @ params[2] + params[3]


def summed(params, weights=None):
    """closure(indices) -> (loss_sum, weight_sum)"""

    def closure(indices):
        loss = F.cross_entropy(logits_of(params, X[indices]), Y[indices], weight=weights, reduction="sum")
        return loss, len(indices) if weights is None else weights[Y[indices]].sum()

    return closure


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("sizes", [[40], [1, 7, 32], [10, 10, 10, 10]])
def test_ragged_batches_sum_exactly(weights, sizes):
    params = mlp()
    whole = HessianOperator(loss_of(params, weights), params).to_dense()
    batches = torch.arange(40).split(sizes)
    H = HessianOperator.from_batches(summed(params, weights), params, batches)
    assert torch.allclose(H.to_dense(), whole, rtol=1e-12, atol=1e-14)
    assert torch.allclose(eigsh(H, 3, tol=1e-8).values, torch.linalg.eigvalsh(whole)[-3:].flip(0), rtol=1e-10)
    assert torch.allclose(EigenTracker(3).update(H).values, torch.linalg.eigvalsh(whole)[-3:].flip(0), rtol=1e-4)


def test_batches_refuse_a_stale_state_and_randomness():
    params = mlp()
    H = HessianOperator.from_batches(summed(params), params, torch.arange(40).split(16))
    with torch.no_grad():
        params[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)

    def noisy(indices):
        loss = F.cross_entropy(F.dropout(logits_of(params, X[indices])), Y[indices], reduction="sum")
        return loss, len(indices)

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="same value"):
        HessianOperator.from_batches(noisy, params, torch.arange(40).split(16))
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_in_train_mode_needs_one_batch():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    params = list(model.parameters())

    def closure(indices):
        return F.cross_entropy(model(X[indices]), Y[indices], reduction="sum"), len(indices)

    with pytest.raises(ValueError, match="BatchNorm in train mode on 3 batches"):
        HessianOperator.from_batches(closure, params, torch.arange(40).split(16))
    HessianOperator.from_batches(closure, params, [torch.arange(40)])
    model.eval()
    before = copy.deepcopy(model.state_dict())
    H = HessianOperator.from_batches(closure, params, torch.arange(40).split(16))
    whole = HessianOperator(F.cross_entropy(model(X), Y), params)
    assert torch.allclose(H.to_dense(), whole.to_dense(), atol=1e-13)
    assert not model.training
    assert all(p.grad is None for p in params)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("closure", "batches", "error", "match"),
    [
        (3, [1], TypeError, "closure must be callable"),
        (lambda b: (b, 1), iter([1]), TypeError, "more than once"),
        (lambda b: (b, 1), 5, TypeError, "more than once"),
        (lambda b: (b, 1), [], ValueError, "at least one batch"),
        (lambda b: b, [1], TypeError, "must return"),
        (lambda b: (b, 1), [1], TypeError, "loss must be"),
        (lambda b: (P[0].sum(), 0.0), [1], ValueError, "more than 0"),
    ],
)
def test_bad_batches(closure, batches, error, match):
    with pytest.raises(error, match=match):
        HessianOperator.from_batches(closure, P, batches)


P = mlp()


def test_layers_are_the_diagonal_blocks():
    params = mlp()
    dense = dense_hessian(params)
    blocks = HessianOperator.layers(loss_of(params), {"hidden": params[:2], "bias": [params[3]]})
    assert list(blocks) == ["hidden", "bias"]
    assert torch.allclose(blocks["hidden"].to_dense(), dense[:21, :21], atol=1e-13)
    assert torch.allclose(blocks["bias"].to_dense(), dense[-3:, -3:], atol=1e-13)
    with pytest.raises(ValueError, match="twice"):
        HessianOperator.layers(loss_of(params), {"a": params[:2], "b": params[1:]})


def test_gauss_newton_is_exact():
    params = mlp()
    z = logits_of(params)
    G = GaussNewtonOperator(F.cross_entropy(z, Y), z, params)
    J = torch.cat(
        [
            torch.stack([g.reshape(-1) for g in rows], 0).reshape(z.numel(), -1)
            for rows in zip(
                *[torch.autograd.grad(z.view(-1)[i], params, retain_graph=True) for i in range(z.numel())], strict=True
            )
        ],
        1,
    )
    curvature = torch.autograd.functional.hessian(lambda flat: F.cross_entropy(flat.view_as(z), Y), z.detach().view(-1))
    expected = J.T @ curvature @ J
    assert torch.allclose(G.to_dense(), expected, rtol=1e-11, atol=1e-14)
    assert torch.allclose(eigsh(G, 3, tol=1e-8).values, torch.linalg.eigvalsh(expected)[-3:].flip(0), rtol=1e-10)
    with torch.no_grad():
        params[0].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        eigsh(G, 1)


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    z = X @ w
    loss = F.cross_entropy(z, Y)
    assert torch.allclose(
        GaussNewtonOperator(loss, z, [w]).to_dense(), HessianOperator(loss, [w]).to_dense(), atol=1e-14
    )
    linear = GaussNewtonOperator(z.sum(), z, [w])
    assert torch.equal(linear.to_dense(), torch.zeros(6, 6, dtype=torch.float64))


def test_gauss_newton_bad_input():
    params = mlp()
    z = logits_of(params)
    with pytest.raises(ValueError, match="outputs must be"):
        GaussNewtonOperator(z.sum(), z.detach(), params)
    with pytest.raises(ValueError, match="loss does not depend on outputs"):
        GaussNewtonOperator(params[0].sum(), z, params)
    with pytest.raises(ValueError, match="outputs do not depend"):
        GaussNewtonOperator(z.sum(), z, mlp())


def test_scipy_bridge():
    params = mlp()
    H = HessianOperator(loss_of(params), params)
    values = scipy_eigsh(H.as_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert np.allclose(np.sort(values)[::-1], eigsh(H, 3, tol=1e-9).values.numpy(), rtol=1e-9)
    block = np.random.default_rng(0).standard_normal((H.shape[0], 2))
    assert np.allclose(H.as_scipy() @ block, (H @ torch.from_numpy(block)).numpy())
