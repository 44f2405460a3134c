"""The ops behind PerceptronEnsemble against their twins by autograd, in float64."""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import run_python
from torch import Tensor

from dynloss_ext import _C, Oscillation, reference

ops = torch.ops.dynloss
ACTIVATIONS = ("relu", "tanh")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}  # of the norm


class Problem:
    """M random perceptrons, as the ops and as the twins take them."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        classes: int,
        samples: int,
        members: int = 2,
        *,
        dtype: torch.dtype = torch.float64,
        activation: str = "relu",
        own_inputs: bool = False,
        own_target: bool = False,
        seed: int = 0,
        step: int = 17,
        oscillation: Oscillation | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = inputs * hidden + hidden + hidden * classes + classes

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.activation, self.step = hidden, activation, step
        self.parameters, self.v = normal(members, size) / 2, normal(members, size)
        self.inputs = normal(*([members] if own_inputs else []), samples, inputs)
        labels = (members, samples) if own_target else (samples,)
        self.target = torch.randint(classes, labels, generator=generator)
        amplitudes, periods = torch.linspace(1, 70, members), torch.linspace(9, 100, members)
        self.oscillation = oscillation or Oscillation(classes, amplitudes, periods)

    def arguments(self) -> tuple:
        schedule = self.oscillation.on(self.parameters.device)
        activation = ACTIVATIONS.index(self.activation)
        return self.parameters, self.inputs, self.target, self.hidden, activation, self.step, *schedule

    def of(self, member: int) -> tuple[Tensor, tuple, dict]:
        """Parameters, problem and options of a member as its twin takes them."""
        inputs = self.inputs[member] if self.inputs.dim() == 3 else self.inputs
        target = self.target[member] if self.target.dim() == 2 else self.target
        options = {
            "hidden": self.hidden,
            "activation": self.activation,
            "member": None if self.oscillation.ensemble_size is None else member,
        }
        return self.parameters[member].double(), (inputs.double(), target, self.oscillation), options

    def twins(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, gradients and products."""
        rows = []
        for member, v in enumerate(self.v.double()):
            parameters, problem, options = self.of(member)
            loss = reference.perceptron_loss(parameters, *problem, self.step, **options)
            gradient = reference.perceptron_gradient(parameters, *problem, self.step, **options)
            product = reference.perceptron_hvp(parameters, v, *problem, self.step, **options)
            rows.append((loss, gradient, product))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Every member's row, relative to its norm."""
    error = (actual.double() - expected).reshape(len(expected), -1).norm(dim=1)
    assert bool((error <= TOLERANCE[dtype] * (expected.reshape(len(expected), -1).norm(dim=1) + 1e-30)).all()), error


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.just((2, 3)) | st.tuples(st.integers(1, 9), st.integers(1, 12)),  # kernels of their own, or any
    hidden=st.integers(1, 40),
    samples=st.integers(1, 70),
    members=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    activation=st.sampled_from(ACTIVATIONS),
    own_inputs=st.booleans(),
    own_target=st.booleans(),
    seed=st.integers(0, 1000),
)
@example((2, 3), 100, 300, 2, torch.float64, "relu", False, False, 0)  # the paper's
@example((2, 3), 100, 300, 2, torch.float32, "tanh", True, True, 0)
@example((2, 3), 17, 5001, 2, torch.float64, "relu", True, False, 0)  # more than one block of samples
@example((2, 3), 9, 9001, 1, torch.float32, "relu", False, False, 0)
@example((3, 3), 700, 900, 1, torch.float64, "tanh", False, False, 0)
@example((3, 10), 900, 900, 1, torch.float32, "relu", False, False, 0)
def test_loss_gradient_and_product(sizes, hidden, samples, members, dtype, activation, own_inputs, own_target, seed):
    inputs, classes = sizes
    problem = Problem(
        inputs,
        hidden,
        classes,
        samples,
        members,
        dtype=dtype,
        activation=activation,
        own_inputs=own_inputs,
        own_target=own_target,
        seed=seed,
    )
    loss, gradient = ops.perceptron_gradient(*problem.arguments())
    product = ops.perceptron_hvp(*problem.arguments(), problem.v)
    expected_loss, expected_gradient, expected_product = problem.twins()
    assert_same(loss, expected_loss, dtype)
    if classes > 1:  # one class has nothing to learn: the rest is rounding
        assert_same(gradient, expected_gradient, dtype)
        assert_same(product, expected_product, dtype)


@pytest.mark.parametrize("samples", [5, 9001])
def test_products_of_an_operator_one_after_the_other(samples):
    problem = Problem(2, 7, 3, samples, 1)
    operator = _C.PerceptronOperator(_C.Perceptrons(*problem.arguments()), 0)
    for v in (problem.v[0], problem.v[0].flip(0), problem.v[0]):
        assert torch.equal(operator.apply(v), ops.perceptron_hvp(*problem.arguments(), v[None])[0])


@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("which", [0, -1])
def test_a_logit_beyond_the_range_of_numbers_is_noticed(which, classes):
    """Whichever class it is of."""
    problem = Problem(2, 4, classes, 20, 1, dtype=torch.float32)
    problem.inputs.abs_()
    problem.parameters[:, : 3 * 4] = 1e20
    problem.parameters[:, 3 * 4 : -classes].view(4, classes)[:, which] = 1e30
    loss, gradient = ops.perceptron_gradient(*problem.arguments())
    assert loss.isnan().all() and gradient.isnan().any()
    assert not train(problem, 1)[2].any()


@pytest.mark.parametrize("classes", [3, 4])
def test_a_unit_at_zero_is_not_active(classes):
    """As in torch, relu has the slope 0 there."""
    problem = Problem(2, 7, classes, 20, 1)
    problem.parameters[:, : 3 * 7] = 0
    _, gradient = ops.perceptron_gradient(*problem.arguments())
    product = ops.perceptron_hvp(*problem.arguments(), problem.v)
    for actual, expected in zip((gradient, product), problem.twins()[1:], strict=True):
        assert_same(actual, expected, torch.float64)
        assert not actual[:, : 3 * 7].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_product_is_the_dense_hessian(activation):
    problem = Problem(2, 5, 3, 20, 1, activation=activation)
    parameters, rest, options = problem.of(0)
    dense = torch.autograd.functional.hessian(
        lambda x: reference.perceptron_loss(x, *rest, problem.step, **options), parameters
    )
    rows = [ops.perceptron_hvp(*problem.arguments(), e[None])[0] for e in torch.eye(len(dense), dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(rows), dense, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["one for all", "order", "table", "tables", "stops", "waveforms"])
def test_every_kind_of_schedule(kind):
    generator = torch.Generator().manual_seed(3)
    oscillation = {
        "one for all": lambda: Oscillation(3, 70, 9),
        "order": lambda: Oscillation(3, torch.tensor([5.0, 70.0]), 9, class_order=[2, 0, 1], closed=True),
        "table": lambda: Oscillation.from_table(torch.rand(7, 3, generator=generator)),
        "tables": lambda: Oscillation.from_table(torch.rand(2, 7, 3, generator=generator)),
        "stops": lambda: Oscillation(3, 70, 50, stop_step=[17, None]),
        "waveforms": lambda: Oscillation(3, 70, 9, waveform="sine", start_step=3),
    }[kind]()
    problem = Problem(2, 10, 3, 30, 2, oscillation=oscillation)
    loss, gradient = ops.perceptron_gradient(*problem.arguments())
    expected_loss, expected_gradient, _ = problem.twins()
    assert_same(loss, expected_loss, torch.float64)
    assert_same(gradient, expected_gradient, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confident_network_has_the_right_curvature(dtype):
    """Where p is rounded to 1 the loss would lose its gradient and its Hessian to 1 - p."""
    problem = Problem(2, 20, 3, 50, 1, dtype=dtype, oscillation=Oscillation(3, 1, 5))
    problem.parameters[:, -3:] += torch.tensor([40.0, 0, 0], dtype=dtype)  # b2
    problem.target.zero_()
    _, gradient = ops.perceptron_gradient(*problem.arguments())
    product = ops.perceptron_hvp(*problem.arguments(), problem.v)
    _, expected_gradient, expected_product = problem.twins()
    assert expected_gradient.abs().max() < 1e-10
    assert_same(gradient, expected_gradient, dtype)
    assert_same(product, expected_product, dtype)


# ---- training


def train(problem: Problem, num_steps: int, *, lr=0.3, momentum=None, record_every=1, finite=None):
    """What the op leaves of copies: parameters, velocity, finite, records."""
    members = len(problem.parameters)
    parameters, device = problem.parameters.clone(), problem.parameters.device
    finite = torch.ones(members, dtype=torch.bool, device=device) if finite is None else finite.clone()
    velocity = None if momentum is None else torch.zeros_like(parameters)
    lr, momentum = (
        None if x is None else torch.as_tensor(x, dtype=torch.float64, device=device).expand(members)
        for x in (lr, momentum)
    )
    arguments = (parameters, *problem.arguments()[1:], velocity, finite, lr, momentum, num_steps, record_every)
    return parameters, velocity, finite, ops.perceptron_train_(*arguments)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_is_gradient_descent(activation, momentum):
    problem = Problem(2, 12, 3, 40, 3, activation=activation, step=0, own_inputs=True)
    rates = torch.tensor([0.1, 0.3, 0.5])
    parameters, _, finite, records = train(problem, 25, lr=rates, momentum=momentum)
    assert bool(finite.all()) and records.shape == (25, 3, 3)
    for member in range(3):
        start, rest, options = problem.of(member)
        expected, losses = reference.perceptron_train(
            start, *rest, 25, lr=float(rates[member]), momentum=momentum or 0.0, **options
        )
        torch.testing.assert_close(parameters[member], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(records[:, member, 0], losses, rtol=1e-10, atol=0)


def test_records_are_of_the_parameters_after_each_update():
    problem = Problem(2, 12, 3, 40, 2, step=5)
    *_, records = train(problem, 23, record_every=4)
    assert len(records) == 5  # 8, 12, 16, 20, 24
    plain = Oscillation(3, 1, 1)
    for row, update in enumerate(range(8, 28, 4)):
        after, *_ = train(problem, update - 5 + 1)
        for member in range(2):
            _, (inputs, target, _), options = problem.of(member)
            flat = after[member]
            weighted = reference.perceptron_loss(flat, inputs, target, problem.oscillation, update + 1, **options)
            options["member"] = None
            loss = reference.perceptron_loss(flat, inputs, target, plain, 0, **options)
            w1, b1, w2, b2 = flat.split([24, 12, 36, 3])
            logits = (inputs @ w1.view(2, 12) + b1).relu() @ w2.view(12, 3) + b2
            accuracy = (logits.argmax(1) == target).double().mean()
            torch.testing.assert_close(
                records[row, member], torch.stack([weighted, loss, accuracy]), rtol=1e-12, atol=0
            )


def test_the_first_of_equal_logits_is_the_answer():
    problem = Problem(2, 4, 3, 6, 1)
    problem.parameters.zero_()
    problem.target = torch.tensor([0, 0, 1, 2, 1, 2])
    *_, records = train(problem, 1, lr=0.0)
    assert records[0, 0, 2].item() == 2 / 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_depend_on_neither_the_split_nor_threads_nor_neighbours(dtype):
    problem = Problem(2, 33, 3, 100, 5, dtype=dtype, step=0)
    whole, velocity, _, records = train(problem, 30, momentum=0.5, record_every=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(train(problem, 30, momentum=0.5)[0], whole)
    finally:
        torch.set_num_threads(threads)
    parts, momenta = problem.parameters.clone(), torch.zeros_like(problem.parameters)
    finite, rates = torch.ones(5, dtype=torch.bool), torch.full((5,), 0.3, dtype=torch.float64)
    rows = []
    for steps in (1, 2, 7, 20):
        rest = problem.arguments()[1:]
        more = (momenta, finite, rates, torch.full((5,), 0.5, dtype=torch.float64), steps, 3)
        rows.append(ops.perceptron_train_(parts, *rest, *more))
        problem.step += steps
    assert torch.equal(parts, whole) and torch.equal(momenta, velocity) and torch.equal(torch.cat(rows), records)
    problem.step = 0
    alone = Problem(2, 33, 3, 100, 5, dtype=dtype, step=0)
    amplitude, period = (x[3:4] for x in (alone.oscillation.amplitude, alone.oscillation.period))
    alone.parameters, alone.oscillation = alone.parameters[3:4], Oscillation(3, amplitude, period)
    assert torch.equal(train(alone, 30, momentum=0.5)[0][0], whole[3])


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_member_that_is_not_finite_keeps_its_last_parameters(momentum):
    problem = Problem(2, 8, 3, 20, 3, activation="relu", step=0)
    rates = torch.tensor([0.1, 1e120, 0.1], dtype=torch.float64)
    parameters, velocity, finite, records = train(problem, 20, lr=rates, momentum=momentum)
    assert finite.tolist() == [True, False, True]
    assert bool(parameters.isfinite().all()) and (velocity is None or bool(velocity.isfinite().all()))
    assert bool(records[:, [0, 2]].isfinite().all()) and bool(records[-1, 1].isnan().all())
    steps = next(n for n in range(1, 20) if not train(problem, n + 1, lr=rates, momentum=momentum)[2][1])
    before, _, still, _ = train(problem, steps, lr=rates, momentum=momentum)
    assert bool(still[1]) and torch.equal(before[1], parameters[1])
    assert not torch.equal(before[1], problem.parameters[1]) and bool(records[steps:, 1].isnan().all())
    neighbours, *_ = train(problem, 20, lr=0.1, momentum=momentum)
    assert torch.equal(neighbours[[0, 2]], parameters[[0, 2]])
    untouched, _, _, records = train(problem, 3, finite=finite)
    assert torch.equal(untouched[1], problem.parameters[1]) and bool(records[:, 1].isnan().all())


# ---- arguments


def test_operands_in_any_layout():
    problem = Problem(3, 7, 4, 26, 2, own_inputs=True, own_target=True)
    expected = ops.perceptron_hvp(*problem.arguments(), problem.v)
    problem.inputs = problem.inputs.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    problem.target = problem.target.t().contiguous().t()
    v = torch.cat([problem.v, problem.v], 1)[:, : problem.v.shape[1]]
    assert torch.equal(ops.perceptron_hvp(*problem.arguments(), v), expected)


@pytest.mark.parametrize("change, message", [
    ({"parameters": lambda x: x.half()}, "parameters: expected float32 or float64"),
    ({"parameters": lambda x: x[:, :-1].contiguous()}, "parameters: expected P ="),
    ({"parameters": lambda x: x.t()}, "parameters: expected a contiguous tensor"),
    ({"inputs": lambda x: x.float()}, "inputs: expected"),
    ({"inputs": lambda x: x[None]}, "inputs: expected shape"),
    ({"inputs": lambda x: x[:0]}, "inputs: expected shape"),
    ({"target": lambda x: x.int()}, "target: expected int64"),
    ({"target": lambda x: x[:-1]}, "target: expected shape"),
    ({"target": lambda x: x + 3}, "target: expected class indices"),
    ({"hidden": lambda x: 0}, "hidden: expected at least 1"),
    ({"oscillation": lambda x: Oscillation(3, torch.ones(5), 9)}, "clock: expected shape"),
    ({"step": lambda x: -1}, "step: expected 0 or more"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    problem = Problem(2, 5, 3, 20, 2)
    for name, function in change.items():
        setattr(problem, name, function(getattr(problem, name)))
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        ops.perceptron_gradient(*problem.arguments())


def test_bad_arguments_of_training_are_named():
    problem = Problem(2, 5, 3, 20, 2)
    rest = problem.arguments()[1:]
    finite, rates = torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    velocity = torch.zeros_like(problem.parameters)
    good = {"velocity": velocity, "finite": finite, "lr": rates, "momentum": rates, "steps": 1, "every": 1}
    for change, message in [
        ({"velocity": None}, "velocity: expected one with momentum"),
        ({"velocity": velocity.float()}, "velocity: expected a contiguous tensor like the parameters"),
        ({"finite": finite.double()}, "finite: expected"),
        ({"lr": rates[:1]}, "learning_rate: expected"),
        ({"momentum": rates.float()}, "momentum: expected"),
        ({"steps": 0}, "num_steps: expected at least 1"),
        ({"every": 0}, "record_every: expected at least 1"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            ops.perceptron_train_(problem.parameters, *rest, *(good | change).values())
    with pytest.raises(ValueError, match="v: expected a tensor like the parameters"):
        ops.perceptron_hvp(*problem.arguments(), problem.v[:1])


def test_shapes_without_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = Problem(2, 5, 3, 20, 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in problem.arguments()]
        loss, gradient = ops.perceptron_gradient(*fake)
        assert loss.shape == (2,) and loss.dtype == torch.float64
        assert gradient.shape == problem.parameters.shape
        assert ops.perceptron_hvp(*fake, mode.from_tensor(problem.v)).shape == problem.v.shape
        finite, rates = (mode.from_tensor(x) for x in (torch.ones(2, dtype=torch.bool), torch.ones(2).double()))
        assert ops.perceptron_train_(*fake, None, finite, rates, None, 10, 3).shape == (3, 2, 3)  # 18, 21, 24


SCRIPT = """
import sys
import torch
sys.path[:0] = {path!r}
from test_perceptron import ops, train, Problem
worst = 0.0
for dtype in (torch.float64, torch.float32):
    for activation in ("relu", "tanh"):
        for shape in ((2, 100, 3, 300), (2, 7, 3, 9001), (5, 9, 4, 7), (3, 21, 11, 65)):
            problem = Problem(*shape, 2, dtype=dtype, activation=activation)
            loss, gradient = ops.perceptron_gradient(*problem.arguments())
            product = ops.perceptron_hvp(*problem.arguments(), problem.v)
            for actual, expected in zip((loss, gradient, product), problem.twins()):
                error = ((actual - expected).norm() / expected.norm()).item()
                worst = max(worst, error / torch.finfo(dtype).eps)
            assert train(problem, 5)[2].all()
print(worst)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_instruction_sets(capability):
    here = os.path.dirname(os.path.abspath(__file__))
    assert float(run_python("-c", SCRIPT.format(path=[here]), DYNLOSS_CPU_CAPABILITY=capability)) < 200
