"""Operators over batches, layers and outputs, and what they share."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_problems import X, Y, dense_hessian, loss_of, mlp
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn

from dynloss_ext import ConvergenceWarning, EigenTracker, GaussNewtonOperator, HessianOperator, eigsh

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
    with pytest.raises(RuntimeError, match=r"params.*: expected .* got .* changed in place"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)

    def noisy(indices):
        loss = F.cross_entropy(F.dropout(logits_of(params, X[indices])), Y[indices], reduction="sum")
        return loss, len(indices)

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"loss: expected the same value .* got"):
        HessianOperator.from_batches(noisy, params, torch.arange(40).split(16))
    assert torch.equal(torch.get_rng_state(), state)


INDICES = list(torch.arange(40).split(16))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_dropout_in_any_batch_is_found(late):
    params = mlp()

    def closure(indices):
        logits = logits_of(params, X[indices])
        if indices[0] == 16 * late:
            logits = F.dropout(logits)
        return F.cross_entropy(logits, Y[indices], reduction="sum"), len(indices)

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"expected the same {'value' if late == 0 else 'losses in every pass'}"):
        H = HessianOperator.from_batches(closure, params, INDICES)
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)


class Augmented(torch.utils.data.Dataset):
    def __init__(self, noise):
        self.noise = noise

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + self.noise * torch.randn(2, dtype=torch.float64), Y[i]


@pytest.mark.parametrize(
    ("noise", "options", "refused"),
    [
        (0, {}, False),
        (0, {"shuffle": True}, False),
        (0, {"shuffle": True, "drop_last": True}, True),
        (0.1, {}, True),
    ],
)
def test_data_loaders(noise, options, refused):
    params = mlp()

    def closure(batch):
        x, y = batch
        return F.cross_entropy(logits_of(params, x), y, reduction="sum"), len(y)

    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(Augmented(noise), batch_size=7, **options)
    H = HessianOperator.from_batches(closure, params, loader)
    if refused:
        with pytest.raises(ValueError, match="closure: expected the same losses in every pass over batches, got"):
            H @ torch.ones(H.shape[0], dtype=torch.float64)
    else:
        assert torch.allclose(H.to_dense(), dense_hessian(params), atol=1e-13)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_change_are_found():
    params = mlp()
    weights = iter([1.0] * 6 + [2.0])

    def closure(indices):
        return F.cross_entropy(logits_of(params, X[indices]), Y[indices], reduction="sum"), next(weights)

    H = HessianOperator.from_batches(closure, params, INDICES[:2])
    with pytest.raises(ValueError, match=r"and 2\.0 when.*and 3\.0 now"):
        for _ in range(3):
            H @ torch.ones(H.shape[0], dtype=torch.float64)


def test_a_nan_loss_gives_a_nan_product():
    p = torch.full((3,), torch.nan, dtype=torch.float64, requires_grad=True)
    H = HessianOperator.from_batches(lambda scale: (scale * (p**3).sum(), 1), [p], [1.0, 2.0])
    with pytest.warns(ConvergenceWarning):
        assert eigsh(H, 1).status == "non-finite product"


@pytest.mark.parametrize("sizes", [[40], [16, 24]])
def test_a_batch_leaves_buffers_alone(sizes):
    torch.manual_seed(0)
    first, norm = nn.Linear(2, 8), nn.InstanceNorm1d(4, track_running_stats=True)
    head = nn.Linear(8, 3) if len(sizes) > 1 else nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
    model = nn.ModuleList([first, norm, head]).double()
    before = copy.deepcopy(model.state_dict())

    def closure(indices):
        hidden = norm(torch.tanh(first(X[indices])).view(-1, 4, 2)).flatten(1)
        return F.cross_entropy(head(hidden), Y[indices], reduction="sum"), len(indices)

    H = HessianOperator.from_batches(closure, model.parameters(), torch.arange(40).split(sizes))
    dense = H.to_dense()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = HessianOperator(closure(torch.arange(40))[0] / 40, model.parameters())
    assert torch.allclose(dense, whole.to_dense(), rtol=1e-9, atol=1e-11)


class Functional(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class Synchronised(nn.SyncBatchNorm):
    """Runs without CUDA, and leaves no node of a BatchNorm."""

    def forward(self, x):
        return (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), keepdim=True)


@pytest.mark.parametrize(
    ("norm", "training", "refused"),
    [
        (lambda: nn.BatchNorm1d(4), True, True),
        (lambda: nn.BatchNorm1d(4), False, False),
        (lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False), False, True),
        (Functional, True, True),
        (lambda: Synchronised(4), True, True),
        (lambda: nn.InstanceNorm1d(4), True, False),
        (lambda: nn.InstanceNorm1d(4), False, False),
        (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), True, False),
        (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), False, False),
        (lambda: nn.GroupNorm(2, 4), True, False),
        (lambda: nn.LayerNorm([4, 3]), True, False),
    ],
)
def test_what_couples_samples_is_refused(norm, training, refused):
    torch.manual_seed(0)
    first, norm = nn.Linear(2, 12).double(), norm().double().train(training)
    params = [*first.parameters(), *norm.parameters()]

    def closure(indices):
        outputs = norm(first(X[indices]).view(-1, 4, 3))
        return (outputs**3 * (1 + Y[indices, None, None])).sum(), len(indices)

    if refused:
        with pytest.raises(ValueError, match=r"closure: expected .* got BatchNorm in train mode on 3 batches"):
            HessianOperator.from_batches(closure, params, INDICES)
        assert HessianOperator.from_batches(closure, params, [torch.arange(40)]).to_dense().isfinite().all()
    else:
        H = HessianOperator.from_batches(closure, params, INDICES)
        whole = HessianOperator(closure(torch.arange(40))[0] / 40, params)
        assert torch.allclose(H.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-10)


def test_batch_norm_behind_the_graph_is_refused():
    """On raw inputs it leaves no node in the graph, and with one sample a batch one like InstanceNorm's."""
    norm, first = nn.BatchNorm1d(2, affine=False).double(), nn.Linear(2, 3).double()

    def of_inputs(indices):
        return F.cross_entropy(first(norm(X[indices])), Y[indices], reduction="sum"), len(indices)

    def of_one_sample(index):
        return (norm(first.weight.T[None]) ** 3).sum(), 1

    for closure, batches in [(of_inputs, INDICES), (of_one_sample, [0, 1])]:
        with pytest.raises(ValueError, match=r"closure: expected .* got BatchNorm in train mode"):
            HessianOperator.from_batches(closure, [first.weight], batches)


def test_one_graph_at_a_time():
    params = mlp()
    graphs = []

    def closure(indices):
        assert not [node for node in graphs if node() is not None]
        hidden = torch.tanh(X[indices] @ params[0] + params[1])
        graphs.append(weakref.ref(hidden))
        return F.cross_entropy(hidden @ params[2] + params[3], Y[indices], reduction="sum"), len(indices)

    H = HessianOperator.from_batches(closure, params, torch.arange(40).split(8))
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert len(graphs) == 11


def test_an_operator_that_its_closure_holds_is_collected():
    class Run:
        def __init__(self):
            self.params = mlp()
            self.H = HessianOperator.from_batches(self.closure, self.params, INDICES)

        def closure(self, indices):
            return summed(self.params)(indices)

    run = Run()
    eigsh(run.H, 1)
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None


def test_some_batch_must_depend_on_params():
    params, unused = mlp(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="loss_sum: expected a tensor that depends on params, got none in any batch"):
        HessianOperator.from_batches(summed(params), [unused], INDICES)

    def late(indices):
        loss, count = summed(params)(indices)
        return loss + ((unused**3).sum() if indices[0] == 16 else 0), count

    H = HessianOperator.from_batches(late, [unused], INDICES)
    assert torch.allclose(H.to_dense(), 6 / 40 * torch.eye(4, dtype=torch.float64))


def test_no_word_from_the_device_but_one_a_product(monkeypatch):
    params = mlp()
    H = HessianOperator.from_batches(summed(params, WEIGHTS), params, INDICES)
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, f=original, n=name: reads.append(n) or f(t))
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert reads == ["tolist"]


def test_batch_norm_in_train_mode_needs_one_batch():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    params = list(model.parameters())

    def closure(indices):
        return F.cross_entropy(model(X[indices]), Y[indices], reduction="sum"), len(indices)

    with pytest.raises(ValueError, match=r"closure: expected .* got BatchNorm in train mode on 3 batches"):
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
        (3, [1], TypeError, "closure: expected a callable, got int"),
        (lambda b: (b, 1), iter([1]), TypeError, "batches: expected .* more than once.* got list_iterator"),
        (lambda b: (b, 1), 5, TypeError, "batches: expected .* more than once.* got int"),
        (lambda b: (b, 1), [], ValueError, "batches: expected at least one batch, got none"),
        (lambda b: b, [1], TypeError, r"closure: expected to return \(loss_sum, weight_sum\), got int"),
        (lambda b: (b, 1), [1], TypeError, "loss_sum: expected a 0-d torch.Tensor, got int"),
        (lambda b: (P[0].sum(), 0.0), [1], ValueError, "weight_sum: expected .* more than 0, got 0.0"),
        (lambda b: (P[0].sum(), -1.0), [1], ValueError, "weight_sum: expected .* more than 0, got -1.0"),
        (lambda b: (P[0].sum(), float("inf")), [1], ValueError, "weight_sum: expected a finite number .* got inf"),
        (lambda b: (P[0].sum(), float("nan")), [1], ValueError, "weight_sum: expected a finite number .* got nan"),
        (lambda b: (P[0].sum(), None), [1], TypeError, "closure: expected .* as weight_sum, got NoneType"),
        (lambda b: (P[0].sum(), torch.ones(2)), [1], TypeError, "closure: expected .* as weight_sum, got Tensor"),
        (
            lambda b: (P[0].sum(),),
            [1],
            TypeError,
            r"closure: expected to return \(loss_sum, weight_sum\), got a tuple of 1",
        ),
    ],
)
def test_bad_batches(closure, batches, error, match):
    with pytest.raises(error, match=match):
        HessianOperator.from_batches(closure, P, batches)


P = mlp()


@pytest.mark.parametrize("weight", [np.float32(40), np.int64(40), torch.tensor(40), torch.tensor([40.0])])
def test_kinds_of_weights(weight):
    H = HessianOperator.from_batches(lambda _: (40 * loss_of(P), weight), P, [0])
    assert torch.allclose(H.to_dense(), dense_hessian(P), atol=1e-13)


def test_a_process_group_is_one():
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup or None, got str"):
        HessianOperator.from_batches(summed(P), P, INDICES, process_group="gloo")


def test_layers_are_the_diagonal_blocks():
    params = mlp()
    dense = dense_hessian(params)
    blocks = HessianOperator.layers(loss_of(params), {"hidden": params[:2], "bias": [params[3]]})
    assert list(blocks) == ["hidden", "bias"]
    assert torch.allclose(blocks["hidden"].to_dense(), dense[:21, :21], atol=1e-13)
    assert torch.allclose(blocks["bias"].to_dense(), dense[-3:, -3:], atol=1e-13)
    assert torch.equal(blocks["bias"].gradients[0].detach(), torch.autograd.grad(loss_of(params), params[3])[0])


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        ({"a": P[:2], "b": P[1:]}, ValueError, "all groups together: expected every tensor once, got one twice"),
        ([P], TypeError, "groups: expected a mapping from names to params, got list"),
        ({}, ValueError, "groups: expected at least one group, got none"),
        ({"a": P, "b": []}, ValueError, r"groups\['b'\]: expected at least one tensor, got none"),
        (
            {"b": [P[0].detach()]},
            ValueError,
            r"groups\['b'\]\[0\]: expected a tensor that requires grad, got .* \(2, 7\) that does not",
        ),
        (
            {"a": mlp()},
            ValueError,
            "loss: expected one that depends on the params in groups, got one that depends on none",
        ),
    ],
)
def test_bad_groups(groups, error, match):
    with pytest.raises(error, match=match):
        HessianOperator.layers(loss_of(P), groups)


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
    assert torch.allclose(dense_gauss_newton(params), expected, rtol=1e-11, atol=1e-14)
    assert torch.allclose(G.to_dense(), expected, rtol=1e-11, atol=1e-14)
    assert torch.allclose(eigsh(G, 3, tol=1e-8).values, torch.linalg.eigvalsh(expected)[-3:].flip(0), rtol=1e-10)
    with torch.no_grad():
        params[0].add_(1)
    with pytest.raises(RuntimeError, match=r"params.*: expected .* got .* changed in place"):
        eigsh(G, 1)


def dense_gauss_newton(params, weights=None):
    """Of the mean cross-entropy of all data, by forward-mode Jacobians."""

    def outputs_of(*params):
        return logits_of(params).reshape(-1)

    jacobian = torch.func.jacfwd(outputs_of, argnums=tuple(range(len(params))))(*[p.detach() for p in params])
    J = torch.cat([part.flatten(1) for part in jacobian], 1)
    z = outputs_of(*params).detach()
    curvature = torch.func.hessian(lambda z: F.cross_entropy(z.view(40, 3), Y, weight=weights))(z)
    return J.T @ curvature @ J


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("sizes", [[40], [1, 7, 32]])
def test_gauss_newton_of_batches_sums_exactly(weights, sizes):
    params = mlp()

    def closure(indices):
        z = logits_of(params, X[indices])
        weight = len(indices) if weights is None else weights[Y[indices]].sum()
        return F.cross_entropy(z, Y[indices], weight=weights, reduction="sum"), z, weight

    G = GaussNewtonOperator.from_batches(closure, params, torch.arange(40).split(sizes))
    expected = dense_gauss_newton(params, weights)
    assert torch.allclose(G.to_dense(), expected, rtol=1e-11, atol=1e-14)
    assert torch.allclose(eigsh(G, 3, tol=1e-8).values, torch.linalg.eigvalsh(expected)[-3:].flip(0), rtol=1e-10)
    assert repr(G).startswith("GaussNewtonOperator(")


@pytest.mark.parametrize(
    ("closure", "error", "match"),
    [
        (
            lambda z: (z.sum(), 1),
            TypeError,
            r"closure: expected to return \(loss_sum, outputs, weight_sum\), got a tuple of 2",
        ),
        (lambda z: (z.sum(), 1, 1), TypeError, "outputs: expected a torch.Tensor, got int"),
        (lambda z: (z.sum(), z.detach(), 1), ValueError, "outputs: expected a tensor with its graph, got"),
        (
            lambda z: (z.sum(), z * 2, 1),
            ValueError,
            "loss: expected one that depends on outputs, got one that does not",
        ),
        (
            lambda z: ((Q**2).sum(), Q, 1),
            ValueError,
            "outputs: expected a tensor that depends on params, got none in any batch",
        ),
    ],
)
def test_bad_gauss_newton_batches(closure, error, match):
    with pytest.raises(error, match=match):
        GaussNewtonOperator.from_batches(lambda _: closure(logits_of(P)), P, [0])


Q = torch.ones(3, dtype=torch.float64, requires_grad=True)


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
    with pytest.raises(ValueError, match="outputs: expected a tensor with its graph, got"):
        GaussNewtonOperator(z.sum(), z.detach(), params)
    with pytest.raises(TypeError, match=r"loss: expected a 0-d torch.Tensor, got function"):
        GaussNewtonOperator(lambda: z.sum(), z, params)
    with pytest.raises(ValueError, match="loss: expected one that depends on outputs, got one that does not"):
        GaussNewtonOperator(params[0].sum(), z, params)
    with pytest.raises(ValueError, match="loss: expected one that depends on params through outputs alone, got one"):
        GaussNewtonOperator(F.cross_entropy(z, Y) + 1e-4 * params[0].square().sum(), z, params)
    with pytest.raises(ValueError, match="loss: expected one that depends on params through outputs alone, got one"):
        GaussNewtonOperator.from_batches(
            lambda rows: (F.cross_entropy(z[rows], Y[rows]) + params[2].abs().sum(), z, 1.0), params, [slice(20)]
        )
    with pytest.raises(ValueError, match="outputs: expected a tensor that depends on params, got one"):
        GaussNewtonOperator(z.sum(), z, mlp())


def losses_that_pass_by():
    """Without a gradient at this very point, where the Hessian of what passes by is not 0."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    outputs = 1 + w.sin()
    yield w, outputs, w.square().sum()
    outputs, sibling = w.expand(2, 3).unbind()  # of one node of the graph
    yield w, outputs, sibling.square().sum()
    hidden = w.sin()
    yield w, hidden.view(3), hidden.view(3)[:2].square().sum()


@pytest.mark.parametrize(("w", "outputs", "penalty"), list(losses_that_pass_by()))
def test_gauss_newton_of_a_loss_that_passes_by_outputs(w, outputs, penalty):
    loss = outputs.exp().sum() + penalty
    for make in (
        lambda: GaussNewtonOperator(loss, outputs, [("w", w)]),
        lambda: GaussNewtonOperator.from_batches(lambda _: (loss, outputs, 1.0), [("w", w)], [0]),
    ):
        with pytest.raises(
            ValueError, match=r"^loss: expected one .* outputs alone, got one that reaches w beside them"
        ):
            make()


def test_gauss_newton_of_a_loss_that_passes_by_outputs_in_a_later_batch():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def closure(i):
        outputs = w.sin()
        return outputs.exp().sum() + i * w.square().sum() if i else outputs.exp().sum(), outputs, 1.0

    G = GaussNewtonOperator.from_batches(closure, [w], [0, 0])
    assert torch.equal(G.to_dense(), torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="through outputs alone"):
        eigsh(GaussNewtonOperator.from_batches(closure, [w], [0, 1]), 1)


def test_gauss_newton_of_outputs_with_a_part_that_the_loss_uses():
    """What the loss makes of outputs, and parameters of the loss that are none of params, pass by nothing."""
    w, scale = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outputs = (w * 2).view(1, 3)
    G = GaussNewtonOperator((scale * outputs[0, :2].mean() ** 2).sum() + scale.square().sum(), outputs, [w])
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[:2, :2] = 6.0
    assert torch.allclose(G.to_dense(), expected)


def test_scipy_bridge():
    params = mlp()
    H = HessianOperator(loss_of(params), params)
    values = scipy_eigsh(H.as_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert np.allclose(np.sort(values)[::-1], eigsh(H, 3, tol=1e-9).values.numpy(), rtol=1e-9)
    block = np.random.default_rng(0).standard_normal((H.shape[0], 2))
    assert np.allclose(H.as_scipy() @ block, (H @ torch.from_numpy(block)).numpy())
    operator = H.as_scipy()
    x = np.random.default_rng(1).standard_normal(H.shape[0])
    assert np.allclose(operator @ x[::-1], (H @ torch.from_numpy(x[::-1].copy())).numpy())
    assert np.allclose(operator @ x.astype(">f8"), operator @ x)
    assert operator.matvec(x[:, None]).shape == (H.shape[0], 1)
    assert np.array_equal(operator.matmat(x[:, None]), operator.matvec(x[:, None]))
    assert np.array_equal(operator.H @ block, operator @ block)
    for call in (operator.matvec, operator.rmatvec, operator.matmat, operator.rmatmat):
        with pytest.raises(TypeError, match="x: expected real numbers, got complex128"):
            call(x.reshape(-1, 1) * 1j)


def test_hooks_of_params_are_refused():
    """A product would call them in each of its backward passes: the result would be no Hessian."""
    params = mlp()
    hook = params[2].register_hook(lambda gradient: 0.5 * gradient)
    for build in (
        lambda: HessianOperator(loss_of(params), params),
        lambda: HessianOperator.from_batches(summed(params), params, INDICES),
        lambda: HessianOperator.layers(loss_of(params), {"last": params[2:]}),
    ):
        with pytest.raises(ValueError, match=r"\]: expected a tensor without hooks.* got .* of shape .* with a hook"):
            build()
    hook.remove()
    params[0].register_post_accumulate_grad_hook(lambda p: p.grad.zero_())  # no product accumulates
    assert torch.allclose(HessianOperator(loss_of(params), params).to_dense(), dense_hessian(params), atol=1e-13)


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_operators_are_not_copied(copying):
    params = mlp()
    for H in (
        HessianOperator(loss_of(params), params),
        HessianOperator.from_batches(summed(params), params, INDICES),
    ):
        with pytest.raises(TypeError, match="a HessianOperator holds recorded graphs and cannot be copied or pickled"):
            copying(H)


def test_threads_share_an_operator_and_the_random_state():
    params = mlp()
    exact = torch.linalg.eigvalsh(dense_hessian(params))[-3:].flip(0)
    shared = HessianOperator.from_batches(summed(params), params, INDICES)
    state = torch.get_rng_state()

    def work(i):
        H = shared if i % 2 else HessianOperator.from_batches(summed(params), params, INDICES)
        return eigsh(H, 3, tol=1e-8).values

    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(work, range(12)):
            assert torch.allclose(values, exact, rtol=1e-10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("fit", [False, True])
def test_rounding_passes_through_outputs(low, fit):
    """Layers whose recorded backward pass is another than the plain one; a loss whose gradient is next to nothing."""
    for seed in range(5):
        torch.manual_seed(seed)
        layers = (
            nn.Linear(2, 8),
            nn.LayerNorm(8),
            nn.GELU(),
            nn.BatchNorm1d(8),
            nn.SiLU(),
            nn.GroupNorm(2, 8),
            nn.Mish(),
        )
        model = nn.Sequential(*layers, nn.Linear(8, 3))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            z = model(X.float())
            loss = (z - z.detach()).square().mean() + 1e-9 * z.sum() if fit else F.cross_entropy(z, Y)
        assert GaussNewtonOperator(loss, z, model.parameters()).shape[0] > 0
