"""Hessian products by differences of gradients: what closures and parameters may be, and that all is put back."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from difference_problems import Problem, directions, error_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynloss_ext import ConvergenceWarning, EigenTracker, HessianOperator, eigsh
from dynloss_ext._evaluation import graph_nodes


@pytest.mark.parametrize("batches", [None, [0, 1]])
def test_an_autocast_around_it_sees_the_parameters_move(batches):
    """It keeps its copies of them in bfloat16 until it ends."""
    problem = Problem("tanh").to(torch.float32)
    matrix = Problem("tanh").dense()
    closure = problem.loss if batches is None else lambda _: (problem.loss(), 1)
    outside = HessianOperator.from_gradients(problem.autocast_loss, problem.model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        before = problem.loss()
        H = HessianOperator.from_gradients(closure, problem.model.parameters(), batches)
        assert error_of(H, matrix, directions(matrix)) <= 4 * H.noise
        assert error_of(outside, matrix, directions(matrix)) <= 4 * outside.noise
        assert torch.equal(problem.loss(), before)
    assert H.noise <= float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize("order", [2, 4])
def test_memory(order):
    """In vectors of length P, the gradients of a backward pass among them."""
    from torch.profiler import ProfilerActivity, profile

    model, x = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)), torch.randn(2, 300)
    size = 4 * sum(p.numel() for p in model.parameters())

    def most(call):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call()
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        return max(held) / size

    def make():
        return HessianOperator.from_gradients(lambda: model(x).square().mean(), model.parameters(), order=order)

    def stays(call):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            kept = call()
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert kept is not None
        return sum(event.nbytes() for event in events) / size

    H, v = make(), torch.ones(size // 4)
    assert 0.9 < stays(make) <= 1.1
    assert most(lambda: H @ v) <= {2: 5, 4: 6}[order] + 0.1
    assert most(make) <= 9.1


def test_a_tracker_over_a_training():
    problem = Problem("tanh").to(torch.float64)
    params = list(problem.model.parameters())
    tracker, step = EigenTracker(k=2, tol=1e-5), None
    for _ in range(6):
        H = HessianOperator.from_gradients(problem.loss, params, step=step)
        step = H.step
        result = tracker.update(H)
        expected = torch.linalg.eigvalsh(problem.dense()).flip(0)[:2]
        assert result.converged.all()
        assert ((result.values - expected).abs() <= result.residuals).all()
        problem.loss().backward()
        with torch.no_grad():
            for p in params:
                p -= 0.3 * p.grad
                p.grad = None
    assert tracker.identities.tolist() == [0, 1]


def test_fused_attention_stays_fused():
    problem, seen = Problem("transformer").to(torch.float64), set()

    def closure():
        loss = problem.loss()
        seen.add(any("FlashAttention" in node.name() for node in graph_nodes([loss])))
        return loss

    with pytest.raises(RuntimeError, match="fused attention"):
        HessianOperator(problem.loss(), problem.model.parameters()).to_dense()
    H = HessianOperator.from_gradients(closure, problem.model.parameters())
    assert eigsh(H, 1).status == "converged"
    assert seen == {True}


def test_compiled_modules_stay_compiled_and_are_compiled_once():
    problem, compilations, runs = Problem("tanh").to(torch.float64), 0, 0

    def backend(graph, _):
        nonlocal compilations
        compilations += 1

        def run(*inputs):
            nonlocal runs
            runs += 1
            return graph(*inputs)

        return run

    matrix = problem.dense()
    plain, problem.model = problem.model, torch.compile(problem.model, backend=backend)
    H = HessianOperator.from_gradients(problem.loss, plain.parameters())
    before = runs
    assert error_of(H, matrix, directions(matrix, 2)) <= 1e-11 * float(torch.linalg.matrix_norm(matrix, 2))
    assert runs - before == 4 * 5
    assert compilations == 1


class Everything(nn.Module):
    """Buffers written to and replaced, random numbers, and a parameter that is not asked about."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.last = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False

    def forward(self, x):
        self.calls = self.calls + 1
        hidden = self.dropout(torch.tanh(self.norm(self.first(x)))) * self.calls.sqrt()
        if self.fails:
            raise KeyError("my own failure")
        return self.last(hidden)


def bits(t):
    return t.detach().clone().view(torch.int64)


def everything():
    model = Everything().double()
    X, Y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
    return model, lambda: F.cross_entropy(model(X), Y)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back_to_the_bit(fails):
    model, closure = everything()
    model.first.weight.grad = torch.randn(6, 3, dtype=torch.float64)
    model.last.weight.grad = torch.randn(3, 6, dtype=torch.float64)
    params = [model.first.weight, model.first.bias, model.norm.weight]
    random = torch.get_rng_state()
    state = {name: bits(t.double()) for name, t in model.state_dict().items()}
    gradients = {name: (p.grad, None if p.grad is None else bits(p.grad)) for name, p in model.named_parameters()}
    buffers, versions = dict(model._buffers), [p._version for p in model.parameters()]
    H = HessianOperator.from_gradients(closure, params)
    v = torch.randn(H.shape[0], dtype=torch.float64, generator=torch.Generator())
    product = H @ v
    if fails:
        model.fails = True
        with pytest.raises(KeyError, match="my own failure"):
            H @ v
        model.fails = False
    assert torch.equal(random, torch.get_rng_state())
    torch.rand(7)  # which random numbers come next is nothing to H
    assert torch.equal(H @ v, product)
    for name, t in model.state_dict().items():
        assert torch.equal(bits(t.double()), state[name]), name
    for name, p in model.named_parameters():
        gradient, values = gradients[name]
        assert p.grad is gradient
        assert gradient is None or torch.equal(bits(gradient), values)
    assert all(model._buffers[name] is buffer for name, buffer in buffers.items())
    assert [p._version for p in model.parameters()] == versions


def test_dropout_draws_the_same_numbers_every_time():
    model, closure = everything()
    H = HessianOperator.from_gradients(closure, model.parameters(), seed=5)
    result = eigsh(H, 2, tol=1e-6)
    assert result.status == "converged"
    other = HessianOperator.from_gradients(closure, model.parameters(), seed=6)
    assert abs(eigsh(other, 1).values[0] - result.values[0]) > 1e-3

    def seeded():
        with torch.random.fork_rng():
            torch.manual_seed(6)  # that of the first batch
            return closure()

    matrix = HessianOperator(seeded, model.parameters()).to_dense()
    assert error_of(H, matrix, directions(matrix)) <= 1e-9 * float(matrix.norm())


def test_sums_over_batches():
    problem = Problem("tanh").to(torch.float64)
    weights = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)

    def closure(rows):
        target = problem.target[rows]
        loss = F.cross_entropy(problem.model(problem.inputs[rows]), target, weight=weights, reduction="sum")
        return loss, weights[target].sum()

    batches = torch.arange(48).split(13)
    exact = HessianOperator.from_batches(closure, problem.model.parameters(), batches)
    H = HessianOperator.from_gradients(closure, problem.model.named_parameters(), batches)
    matrix = exact.to_dense()
    assert error_of(H, matrix, directions(matrix)) <= 1e-11 * float(torch.linalg.matrix_norm(matrix, 2))


def test_batches_that_change_are_refused():
    problem = Problem("tanh").to(torch.float64)
    batches = [slice(0, 20), slice(20, 48)]

    def closure(rows):
        target = problem.target[rows]
        return F.cross_entropy(problem.model(problem.inputs[rows]), target, reduction="sum"), len(target)

    H = HessianOperator.from_gradients(closure, problem.model.parameters(), batches)
    batches.pop()
    with pytest.raises(ValueError, match="closure: expected the same losses and weights in every pass"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)


def test_parameters_of_several_dtypes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].to(torch.bfloat16)
    X, Y = torch.randn(30, 3), torch.arange(30) % 3

    def closure():
        return F.cross_entropy(model[2](torch.tanh(model[0](X.bfloat16()).float())), Y)

    H = HessianOperator.from_gradients(closure, model.parameters())
    assert H.dtype == torch.float32
    exact = HessianOperator(lambda: F.cross_entropy(double(X.double()), Y), (double := _double(model)).parameters())
    matrix = exact.to_dense()
    assert error_of(H, matrix, directions(matrix)) <= 5 * H.noise


def _double(model):
    double = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    double.load_state_dict(model.state_dict())
    return double


def test_reentrant_checkpoints_and_sparse_gradients():
    torch.manual_seed(0)
    table, inner, last = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 6), nn.Linear(6, 3)
    model = nn.ModuleList([table, inner, last]).double()
    tokens, Y = torch.randint(7, (20,)), torch.arange(20) % 3
    inner.weight.grad = torch.ones(6, 4, dtype=torch.float64)

    def closure(reentrant=True):
        def block(x):
            return torch.tanh(inner(x))

        return F.cross_entropy(last(checkpoint(block, table(tokens), use_reentrant=reentrant)), Y)

    H = HessianOperator.from_gradients(closure, model.parameters())
    assert torch.equal(inner.weight.grad, torch.ones(6, 4, dtype=torch.float64))
    table.sparse = False
    matrix = HessianOperator(lambda: closure(reentrant=False), model.parameters()).to_dense()
    table.sparse = True
    assert error_of(H, matrix, directions(matrix)) <= 1e-10 * float(matrix.norm())


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x**2 / 3).detach()


def test_a_gradient_that_is_none_of_a_function_is_not_symmetric():
    problem = Problem("tanh").to(torch.float64)

    def closure():
        hidden = WrongGradient.apply(problem.model[0](problem.inputs))
        return F.cross_entropy(problem.model[2](hidden), problem.target)

    H = HessianOperator.from_gradients(closure, problem.model.parameters())
    with pytest.warns(ConvergenceWarning, match="not symmetric.*gradients are those of no function"):
        assert eigsh(H, 1).status == "not symmetric"


def test_parameters_that_changed_are_refused():
    problem = Problem("tanh")
    H = HessianOperator.from_gradients(problem.loss, problem.model.named_parameters())
    problem.model[2].bias.data.add_(0.1)
    with pytest.raises(
        RuntimeError, match=r"2.bias: expected the values it had when the operator was made, got others"
    ):
        H @ torch.ones(H.shape[0])


def test_parameters_that_are_not_finite_are_named_as_that():
    problem = Problem("tanh")
    problem.model[2].bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r"2\.bias: expected finite values, got NaN"):
        HessianOperator.from_gradients(problem.loss, problem.model.named_parameters())


X = torch.ones(3, dtype=torch.float64, requires_grad=True)


def hooked():
    x = torch.ones(3, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda p: None)
    return x


@pytest.mark.parametrize(
    "closure, params, options, kind, message",
    [
        (lambda: 1.0, [X], {}, TypeError, "loss: expected a 0-d torch.Tensor, got float"),
        (lambda: X**2, [X], {}, ValueError, "loss: expected a 0-d tensor, got shape"),
        (lambda: X.detach().sum(), [X], {}, ValueError, "loss: expected a tensor with its graph"),
        (
            lambda: torch.ones(2, requires_grad=True).sum(),
            [X],
            {},
            ValueError,
            "closure: expected a loss that depends on params, got no gradient of any of them",
        ),
        (lambda: (X - 1).sqrt().sum(), [X], {}, ValueError, "closure: expected finite gradients, got NaN or infinity"),
        (lambda: X.sum(), [2 * X], {}, ValueError, "expected a leaf, such as an nn.Parameter, got a tensor"),
        (lambda: X.sum(), [X.detach()], {}, ValueError, "expected a tensor that requires grad"),
        (lambda: X.sum(), [hooked()], {}, ValueError, "expected a tensor without hooks"),
        (lambda: X.sum(), [], {}, ValueError, "params: expected at least one tensor, got none"),
        (3, [X], {}, TypeError, "closure: expected a callable, got int"),
        (lambda b: X.sum(), [X], {"batches": [1]}, TypeError, r"closure: expected to return \(loss_sum, weight_sum\)"),
        (lambda b: (X.sum(), 0), [X], {"batches": [1]}, ValueError, "weight_sum: expected a finite number"),
        (lambda b: (X.sum(), 1), [X], {"batches": []}, ValueError, "batches: expected at least one batch, got none"),
        (lambda b: (X.sum(), 1), [X], {"batches": iter([])}, TypeError, "batches: expected an iterable to be passed"),
        (lambda: X.sum(), [X], {"order": 3}, ValueError, "order: expected 2 or 4, got 3"),
        (lambda: X.sum(), [X], {"step": 0.0}, TypeError, r"step: expected a number in \(0, inf\), got 0.0"),
        (lambda: X.sum(), [X], {"process_group": 1}, TypeError, "process_group: expected a torch.distributed"),
    ],
)
def test_bad_input(closure, params, options, kind, message):
    with pytest.raises((kind, ValueError) if "step" in options else kind, match=message):
        HessianOperator.from_gradients(closure, params, **options)


def test_a_random_closure_is_refused():
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="closure: expected the same losses and weights"):
        HessianOperator.from_gradients(lambda: (x * torch.rand(3, generator=generator)).sum() ** 2, [x])


def test_a_parameter_that_no_gradient_reaches_is_named():
    x, y = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with pytest.warns(UserWarning, match=r"no gradient of the loss reaches unused \(3,\)"):
        H = HessianOperator.from_gradients(lambda: (x**3).sum(), [("used", x), ("unused", y)])
    assert torch.allclose(H.to_dense(), torch.diag(torch.tensor([6.0] * 3 + [0.0] * 3).double()), atol=1e-9)
    frozen = nn.Linear(3, 3).double()

    def cut():
        with torch.no_grad():
            hidden = frozen(x)
        return (hidden * x).sum() ** 2

    with warnings.catch_warnings(), pytest.raises(ValueError, match="expected a gradient, got none, though its Linear"):
        HessianOperator.from_gradients(cut, [x, *frozen.parameters()])
