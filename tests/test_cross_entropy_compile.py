"""torch.compile, torch.export and opcheck: forward, backward and Hessian products, with changing steps and shapes."""

import io

import pytest
import torch
from cross_entropy_cases import PROBLEMS, close, labels, normal
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vjp, vmap

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient, reference

OSCILLATION = Oscillation(4, 5, 10)
FUNCTION = Oscillation.from_function(lambda step: torch.ones(4), 4)
X, Y = normal(6, 4), labels(4, 6)


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path, monkeypatch):
    """No graphs of other tests, nor of another build of the library: its ops are opaque to the caches' keys."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


# ---- derivatives inside and outside of the compiled graph


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}], ids=["mean", "none"])
@pytest.mark.parametrize("name", ["matrix", "tensor_step", "image", "ordered", "table", "shared_target"])
def test_forward_backward_and_products(name, options):
    problem = PROBLEMS[name]
    z, v = problem.logits, torch.randn_like(problem.logits)

    def loss(x, step):
        return dynamic_cross_entropy(x, problem.target, problem.oscillation, step, **options).sum()

    x = problem.leaf()
    value = compiled(loss)(x, problem.step)
    close(value.detach(), problem.twin(z, **options).sum())
    value.backward()
    close(x.grad, problem.gradient(**options))

    def every_product(x, v, step):
        def gradient(y):
            return grad(loss)(y, step)

        forward = jvp(gradient, (x,), (v,))[1]
        reverse = vjp(gradient, x)[1](v)[0]
        third = grad(lambda y: (jvp(gradient, (y,), (v,))[1] * v).sum())(x)
        return forward, reverse, third, vmap(gradient)(torch.stack([x, x]))

    forward, reverse, third, batched = compiled(every_product)(z, v, problem.step)
    close(forward, problem.hvp(v, **options))
    close(reverse, problem.hvp(v, **options))
    close(third, problem.third(v, v, **options))
    close(batched, torch.stack([problem.gradient(**options)] * 2))


def test_inductor_forward_backward_and_product():
    x, v = X.clone().requires_grad_(), normal(6, 4, seed=1)

    def loss(x, step):
        return dynamic_cross_entropy(x, Y, OSCILLATION, step)

    value = compiled(loss, "inductor")(x, 3)
    value.backward()
    arguments = X, Y, OSCILLATION, 3
    close(value.detach(), reference.cross_entropy(*arguments))
    close(x.grad, reference.gradient(*arguments))
    product = compiled(lambda x, v, s: jvp(lambda y: grad(loss)(y, s), (x,), (v,))[1], "inductor")
    close(product(X, v, 3), reference.hvp(*arguments, v))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_through_a_compiled_loss_is_refused_not_wrong(backend, reduction):
    x = X.clone().requires_grad_()
    loss = compiled(lambda x: dynamic_cross_entropy(x, Y, OSCILLATION, 3, reduction=reduction), backend)(x)
    (g,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad((g * x).sum(), x)


def test_double_backward_through_the_eager_backend():
    x, v = X.clone().requires_grad_(), normal(6, 4, seed=1)
    (g,) = torch.autograd.grad(
        compiled(lambda x: dynamic_cross_entropy(x, Y, OSCILLATION, 3), "eager")(x), x, create_graph=True
    )
    close(torch.autograd.grad(g, x, v)[0], reference.hvp(X, Y, OSCILLATION, 3, v))


# ---- recompilations


@pytest.mark.parametrize("kind", ["int", "tensor", "module"])
def test_twenty_steps_compile_at_most_twice(kind):
    counter = CompileCounterWithBackend("aot_eager")
    criterion = DynamicCrossEntropyLoss(OSCILLATION)
    if kind == "module":
        function = torch.compile(criterion, fullgraph=True, backend=counter)
    else:
        function = torch.compile(
            lambda x, s: dynamic_cross_entropy(x, Y, OSCILLATION, s), fullgraph=True, backend=counter
        )
    for step in range(20):
        x = X.clone().requires_grad_()
        loss = function(x, {"int": step, "tensor": torch.tensor(step), "module": Y}[kind])
        loss.backward()
        close(loss.detach(), reference.cross_entropy(X, Y, OSCILLATION, step))
        close(x.grad, reference.gradient(X, Y, OSCILLATION, step))
        criterion.step()
    assert counter.frame_count <= (2 if kind == "int" else 1)


def test_the_step_may_advance_inside_the_graph():
    criterion = DynamicCrossEntropyLoss(OSCILLATION)

    def training_step(x):
        loss = criterion(x, Y)
        criterion.step()
        return loss

    function = compiled(training_step)
    for step in range(5):
        close(function(X), reference.cross_entropy(X, Y, OSCILLATION, step))
    assert criterion.current_step == 5


def test_large_and_negative_steps_as_ints():
    function = compiled(lambda x, s: dynamic_cross_entropy(x, Y, OSCILLATION, s))
    for step in (3, 4, 2**24 + 1, 2**40 + 5, 2**53 - 7, -1, 0, 1):
        close(function(X, step), reference.cross_entropy(X, Y, OSCILLATION, step))


def test_dynamic_shapes_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda x, y, s: dynamic_cross_entropy(x, y, OSCILLATION, s), fullgraph=True, backend=counter, dynamic=True
    )
    for rows in (2, 3, 7, 8, 100):
        x, y = normal(rows, 4).requires_grad_(), labels(4, rows)
        function(x, y, rows).backward()
        close(x.grad, reference.gradient(x.detach(), y, OSCILLATION, rows))
    assert counter.frame_count <= 2


def test_another_oscillation_is_another_graph_never_the_old_one():
    function = compiled(lambda x, oscillation: dynamic_cross_entropy(x, Y, oscillation, 5))
    for oscillation in (
        OSCILLATION,
        Oscillation(4, 50, 3),
        PROBLEMS["table"].oscillation,
        PROBLEMS["ordered"].oscillation,
    ):
        close(function(X, oscillation), reference.cross_entropy(X, Y, oscillation, 5))
    built_inside = compiled(lambda x: dynamic_cross_entropy(x, Y, Oscillation(4, 5, 10), 3))
    close(built_inside(X), reference.cross_entropy(X, Y, OSCILLATION, 3))


def test_gradients_without_and_with_the_need_for_them():
    function = compiled(lambda x: dynamic_cross_entropy(x, Y, OSCILLATION, 3))
    with torch.no_grad():
        assert not function(X).requires_grad
    x = X.clone().requires_grad_()
    function(x).backward()
    close(x.grad, reference.gradient(X, Y, OSCILLATION, 3))
    value, gradient = compiled(lambda x: loss_and_gradient(x, Y, OSCILLATION, 3))(X)
    close(value, reference.cross_entropy(X, Y, OSCILLATION, 3))
    close(gradient, reference.gradient(X, Y, OSCILLATION, 3))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_inside_the_graph(reduction):
    half = X.bfloat16()

    def loss(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return dynamic_cross_entropy(x, Y, OSCILLATION, 3, reduction=reduction)

    value = compiled(loss)(half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half))


# ---- what cannot be compiled says so


def test_function_of_the_user_is_refused():
    for attempt in (
        lambda: compiled(lambda x: dynamic_cross_entropy(x, Y, FUNCTION, 3))(X),
        lambda: compiled(DynamicCrossEntropyLoss(FUNCTION))(X, Y),
        lambda: torch.export.export(WithLoss(FUNCTION), (X, Y)),
        lambda: dynamic_cross_entropy(X, Y, FUNCTION, torch.tensor(3)),
    ):
        with pytest.raises(Exception, match="from_table"):
            attempt()


def test_compiled_autograd_is_refused_not_wrong():
    x = X.clone().requires_grad_()
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(NotImplementedError, match="DynamicCrossEntropyBackward"),
    ):
        dynamic_cross_entropy(x, Y, OSCILLATION, 3).backward()


def test_bad_input_is_seen_in_the_graph():
    with pytest.raises(Exception, match="target: expected"):
        compiled(lambda x, y: dynamic_cross_entropy(x, y, OSCILLATION, 3))(X, Y[:5])
    function = compiled(lambda x, y: dynamic_cross_entropy(x, y, OSCILLATION, 3))
    with pytest.raises(IndexError, match="target: expected class indices from 0 to 3, got 7 at position 2"):
        function(X, Y.index_fill(0, torch.tensor([2]), 7))


# ---- export


class WithLoss(torch.nn.Module):
    def __init__(self, oscillation):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4).double()
        self.criterion = DynamicCrossEntropyLoss(oscillation)

    def forward(self, x, y):
        return self.criterion(self.linear(x), y)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("oscillation", [OSCILLATION, PROBLEMS["table"].oscillation], ids=["waveform", "table"])
def test_export_run_save_and_load(oscillation, strict):
    module = WithLoss(oscillation)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (X, Y), dynamic_shapes={"x": {0: rows}, "y": {0: rows}}, strict=strict)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    for exported in (program.module(), torch.export.load(saved).module(), program.run_decompositions().module()):
        close(exported(X, Y), module(X, Y))
        close(exported(2 * X[:3], Y[:3]), module(2 * X[:3], Y[:3]))
    assert "dynloss.cross_entropy" in str(program.graph)
    # The step is a buffer of the exported program.
    exported = program.module()
    dict(exported.named_buffers())["criterion.current_step"].fill_(6)
    module.criterion.current_step.fill_(6)
    close(exported(X, Y), module(X, Y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_keeps_the_step_as_a_buffer():
    module = WithLoss(OSCILLATION)
    with torch.no_grad():
        traced = torch.jit.trace(module, (X, Y))
        module.criterion.current_step.fill_(6)
        close(traced(2 * X, Y), module(2 * X, Y))


# ---- opcheck of every op


def op_arguments(name, dtype, ensemble):
    shape = (3, 5, 4) if ensemble else (5, 4)
    oscillation = Oscillation(4, torch.tensor([2.0, 3.0, 4.0]), 10) if ensemble else PROBLEMS["ordered"].oscillation
    x, y = normal(*shape, dtype=dtype).requires_grad_(), labels(4, 5)
    clock, order, table = oscillation.on(x.device)
    step = torch.tensor([1, 2, 3]) if ensemble else None
    schedule = (x, y, 3, step, clock, order, table, None if dtype == torch.float32 else torch.rand(4))
    options = (1, True, -100, 0.1)
    if name == "cross_entropy":
        return (*schedule, *options)
    if name == "cross_entropy_with_gradient":
        return (*schedule, *options, True)
    loss, weights, normalizer = torch.ops.dynloss.cross_entropy(*schedule, *options)
    grad_output = torch.ones_like(loss).detach().requires_grad_()
    directions = [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i in (1, 2)]
    order = int(name.removeprefix("cross_entropy_derivative "))
    # A derivative of the third derivative in the logits is refused.
    logits = x.detach() if order == 3 else x
    u, v = {1: (None, None), 2: (None, directions[0]), 3: directions}[order]
    return (u, v, grad_output, logits, y, weights, normalizer, -100, 0.1)


@pytest.mark.parametrize("ensemble", [False, True], ids=["single", "ensemble"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy",
        "cross_entropy_with_gradient",
        "cross_entropy_derivative 1",
        "cross_entropy_derivative 2",
        "cross_entropy_derivative 3",
    ],
)
def test_opcheck(name, dtype, ensemble):
    op = getattr(torch.ops.dynloss, name.partition(" ")[0]).default
    torch.library.opcheck(op, op_arguments(name, dtype, ensemble))


def test_opcheck_of_the_remaining_ops():
    clock, order, table = PROBLEMS["ordered"].oscillation.on(torch.device("cpu"))
    torch.library.opcheck(torch.ops.dynloss.oscillation_weights.default, (torch.arange(5), clock, order, table, 4))
    gradient, factor = torch.randn(5, 4), torch.tensor(2.0)
    torch.library.opcheck(
        torch.ops.dynloss.rescale_.default, (gradient, factor, torch.full((2,), 5.0, dtype=torch.float64))
    )
