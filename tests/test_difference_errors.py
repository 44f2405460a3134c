"""Errors of Hessian products by differences of gradients, and the steps that they depend on."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from difference_problems import Problem, directions, error_of
from torch import nn

from dynloss_ext import ConvergenceWarning, HessianOperator, eigsh


@pytest.mark.parametrize("order, bound", [(4, 1e-11), (2, 1e-8)])
@pytest.mark.parametrize("name", ["tanh", "relu", "transformer"])
def test_products_are_exact_to_many_digits_in_float64(name, order, bound):
    problem = Problem(name).to(torch.float64)
    matrix = problem.dense()
    H = HessianOperator.from_gradients(problem.loss, problem.model.named_parameters(), order=order)
    assert error_of(H, matrix, directions(matrix)) <= bound * float(torch.linalg.matrix_norm(matrix, 2))


KINDS = {
    "float64": (torch.float64, "loss", 1e-10),
    "float32": (torch.float32, "loss", 1e-2),
    "bfloat16 autocast": (torch.float32, "autocast_loss", 0.25),
    "bfloat16": (torch.bfloat16, "loss", 0.25),
}


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tanh", "relu", "transformer"])
def test_the_estimate_bounds_the_error(name, kind, order):
    """Within a factor of 4, as it is of one direction: over seeds and processors 2.7 was seen. And it is at most 10
    times what it bounds."""
    dtype, loss, usable = KINDS[kind]
    problem = Problem(name).to(dtype)
    matrix = Problem(name).dense() if dtype != torch.bfloat16 else problem.dense()
    H = HessianOperator.from_gradients(getattr(problem, loss), problem.model.named_parameters(), order=order)
    assert H.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = error_of(H, matrix, directions(matrix))
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    print(f"{name}, {kind}, order {order}: error {error / largest:.1e}, noise {H.noise / largest:.1e}")
    assert error <= 4 * H.noise
    assert H.noise <= 10 * error
    assert H.noise <= usable * largest * (4 if name == "relu" else 1)  # a kink in the midst of eight units


def test_gradients_that_jump_give_products_within_their_noise():
    """In bfloat16 a few parameters all jump, or none: at the first spacing of seed 0 not between the inner points."""
    for seed in (0, 1, 30):
        torch.manual_seed(seed)
        layer, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))

        def loss(layer=layer, x=x, y=y):
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(layer(x), y)

        H = HessianOperator.from_gradients(loss, layer.parameters())
        matrix = HessianOperator(F.cross_entropy(layer(x), y), layer.parameters()).to_dense().double()
        assert error_of(H, matrix, directions(matrix)) <= 4 * H.noise <= 2 * matrix.norm()


def test_a_direction_that_bends_more_tells_by_itself():
    x = torch.full((2000,), 0.1, dtype=torch.float64, requires_grad=True)
    H = HessianOperator.from_gradients(lambda: (x**2).sum() / 2 + torch.cosh(10 * x[0]) / 100, [x])
    before, diagonal = H.noise, torch.ones(2000, dtype=torch.float64)
    diagonal[0] += math.cosh(1.0)
    sharp, other = torch.zeros(2, 2000, dtype=torch.float64)
    sharp[0] = other[1] = 1.0
    assert (H @ other - diagonal * other).norm() <= 2 * before
    error = (H @ sharp - diagonal * sharp).norm()
    assert 100 * before < error <= 2 * H.noise


@pytest.mark.parametrize("order", [2, 4])
def test_a_product_takes_as_many_gradients_as_its_order(order):
    problem, calls = Problem("tanh"), 0

    def closure():
        nonlocal calls
        calls += 1
        return problem.loss()

    H = HessianOperator.from_gradients(closure, problem.model.parameters(), order=order)
    assert calls <= 34
    calls = 0
    v = torch.randn(H.shape[0])
    product = H @ v
    assert calls == order
    assert torch.equal(H @ (1024 * v), 1024 * product)  # the step is that of a unit vector
    again = HessianOperator.from_gradients(closure, problem.model.parameters(), order=order, step=H.step)
    assert calls == 2 * order + 13
    assert H.step / 2 < again.step < 2 * H.step


@pytest.mark.parametrize("order, bound", [(4, 3e-5), (2, 3e-4)])
def test_the_step_goes_with_a_training(order, bound):
    """λ rises from 1.3 to 1.7 and falls to 0.7, along which the loss bends ever sooner: kept as it was, the first step
    errs by up to 5e-3. The error is up to 7 times the noise where the third derivative is small by chance, with steps
    that are looked for anew, too."""
    torch.manual_seed(0)
    y = torch.arange(3).repeat(20)
    x = torch.randn(60, 8) + 2 * torch.eye(3, 8)[y]
    model = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    calls, step, optimizer = 0, None, torch.optim.SGD(model.parameters(), lr=1.2)

    def closure():
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(x), y)

    for _ in range(60):
        H = HessianOperator.from_gradients(closure, model.parameters(), order=order, step=step)
        step = H.step
        double = copy.deepcopy(model).double()
        exact = HessianOperator(F.cross_entropy(double(x.double()), y), double.parameters())
        result = eigsh(exact, 1)
        product = H @ result.vectors[:, 0].float()
        assert (product.double() - exact @ result.vectors[:, 0]).norm() <= 8 * H.noise
        assert H.noise <= bound * result.values[0]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert calls <= 60 * (13 + order) + 50


@pytest.mark.parametrize("factor", [1e-2, 1e2, 1e4])
@pytest.mark.parametrize(
    "name, kind, order, bound",
    [
        ("transformer", "float64", 4, 1e-9),
        ("relu", "float64", 4, 1e-9),
        ("relu", "float64", 2, 1e-8),
        ("transformer", "float32", 4, 1e-2),
        ("tanh", "float32", 2, 1e-2),
        ("transformer", "bfloat16 autocast", 4, 0.3),
    ],
)
def test_a_step_that_is_far_from_the_best(name, kind, order, bound, factor):
    """Kinks between the steps look like noise that a longer step would mend."""
    dtype, loss, _ = KINDS[kind]
    problem = Problem(name).to(dtype)
    matrix = Problem(name).dense()
    V, size = directions(matrix), float(torch.linalg.matrix_norm(matrix, 2))
    params = list(problem.model.parameters())
    step = factor * HessianOperator.from_gradients(getattr(problem, loss), params, order=order).step
    for _ in range(3):
        H = HessianOperator.from_gradients(getattr(problem, loss), params, order=order, step=step)
        step = H.step
    assert error_of(H, matrix, V) <= 4 * H.noise
    assert H.noise <= bound * size


def test_eigenvalues_within_their_bounds():
    problem = Problem("transformer").to(torch.float64)
    expected = torch.linalg.eigvalsh(problem.dense()).flip(0)
    H = HessianOperator.from_gradients(problem.loss, problem.model.parameters())
    result = eigsh(H, 3, tol=1e-6)
    assert result.status == "converged"
    assert ((result.values - expected[:3]).abs() <= result.residuals).all()
    assert (result.residuals >= H.noise).all()
    smallest = eigsh(H, 1, which="SA", tol=1e-6)
    assert abs(smallest.values - expected[-1]) <= smallest.residuals


@pytest.mark.parametrize("kind, step", [("float64", 1e-7), ("float32", 1e-4), ("bfloat16 autocast", None)])
def test_stops_at_the_noise_floor(kind, step):
    dtype, loss, _ = KINDS[kind]
    problem = Problem("tanh").to(dtype)
    expected = torch.linalg.eigvalsh(Problem("tanh").dense()).flip(0)
    # At the best step the noise of float64 and float32 is below ε^(2/3), which counts as converged.
    H = HessianOperator.from_gradients(
        getattr(problem, loss), problem.model.parameters(), order=2 if step else 4, step=step
    )
    with pytest.warns(ConvergenceWarning, match="noise floor"):
        result = eigsh(H, 2, tol=0)
    assert result.status == "noise floor"
    assert result.num_hvp <= 60
    assert (result.residuals >= H.noise).all()
    assert (result.residuals <= 2 * H.noise).all()
    assert ((result.values - expected[:2]).abs() <= result.residuals).all()


def test_a_linear_loss_and_parameters_of_zero():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    H = HessianOperator.from_gradients(lambda: 2 * x.sum(), [x])
    assert torch.equal(H.to_dense(), torch.zeros(3, 3, dtype=torch.float64))
    y = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for order, step in itertools.product((2, 4), (None, 0.1)):
        H = HessianOperator.from_gradients(lambda: (0.1 * y).sum(), [y], order=order, step=step)
        assert H.to_dense().norm() <= 4 * H.noise <= 1e-9
    quadratic = HessianOperator.from_gradients(lambda: (x**2 * torch.tensor([1.0, 2.0, 3.0])).sum(), [x])
    expected = torch.diag(torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64))
    assert torch.allclose(quadratic.to_dense(), expected, atol=1e-12)
    assert torch.equal(quadratic @ torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert (quadratic @ torch.full((3,), math.nan, dtype=torch.float64)).isnan().all()
