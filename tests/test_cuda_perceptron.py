"""The perceptron kernels on a GPU against the CPU's; the same kernels run in the emulator of tests/cpp without one."""

import pytest
import torch
from test_perceptron import ACTIVATIONS, Problem, assert_same, ops, train

from dynloss_ext import EigenTracker, Oscillation, PerceptronEnsemble

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(problem):
    problem.parameters, problem.inputs, problem.target, problem.v = (
        x.cuda() for x in (problem.parameters, problem.inputs, problem.target, problem.v)
    )
    return problem


SHAPES = [(2, 100, 3, 300), (1, 1, 2, 1), (9, 6, 11, 8), (20, 33, 10, 77), (3, 700, 3, 900), (784, 30, 10, 50)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_gradient_and_product(shape, activation, dtype):
    own = shape[0] % 2 == 1
    options = {"dtype": dtype, "activation": activation, "own_inputs": own, "own_target": own}
    expected = Problem(*shape, 3, **options).twins()
    problem = on_cuda(Problem(*shape, 3, **options))
    loss, gradient = ops.perceptron_gradient(*problem.arguments())
    product = ops.perceptron_hvp(*problem.arguments(), problem.v)
    for actual, twin in zip((loss, gradient, product), expected, strict=True):
        assert_same(actual.cpu(), twin, dtype)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_training(shape, momentum):
    problem = Problem(*shape, 4, step=3)
    expected = train(problem, 20, lr=0.1, momentum=momentum, record_every=3)
    actual = train(on_cuda(problem), 20, lr=0.1, momentum=momentum, record_every=3)
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-8, atol=1e-10)


def test_an_ensemble_is_that_of_the_cpu():
    problem = Problem(2, 20, 3, 60, 1)
    made = {
        device: PerceptronEnsemble(
            problem.inputs,
            problem.target,
            Oscillation(3, torch.linspace(1, 70, 5), 40),
            hidden=20,
            lr=[0.3, 0.3, 1e200, 0.3, 0.3],
            momentum=0.5,
            device=device,
        )
        for device in ("cpu", "cuda")
    }
    records = {device: ensemble.train(30, record_every=2) for device, ensemble in made.items()}
    torch.testing.assert_close(records["cuda"].loss, records["cpu"].loss, rtol=1e-8, atol=0, equal_nan=True)
    assert made["cuda"].finite.tolist() == made["cpu"].finite.tolist() == [True, True, False, True, True]
    values = {device: ensemble.eigenvalues(2, tol=1e-6).values for device, ensemble in made.items()}
    torch.testing.assert_close(values["cuda"], values["cpu"], rtol=1e-6, atol=1e-9, equal_nan=True)
    update = EigenTracker(2, tol=1e-6).update(made["cuda"].hessian(0))
    torch.testing.assert_close(update.values, values["cpu"][0], rtol=1e-6, atol=1e-9)
    whole = PerceptronEnsemble(
        problem.inputs, problem.target, Oscillation(3, 70, 40), hidden=20, lr=0.3, seeds=range(300), device="cuda"
    )
    parts = PerceptronEnsemble(
        problem.inputs, problem.target, Oscillation(3, 70, 40), hidden=20, lr=0.3, seeds=range(300), device="cuda"
    )
    whole.train(30)
    for steps in (1, 9, 20):
        parts.train(steps)
    assert torch.equal(whole.parameters["w1"], parts.parameters["w1"])  # to the bit, however the steps are split
