"""Differences of gradients of code that inductor has compiled, and of quantised layers."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from difference_problems import Problem
from torch import nn

from dynloss_ext import ConvergenceWarning, HessianOperator, eigsh


def assert_near(H, matrix):
    """To the noise that H says its products have."""
    V = torch.linalg.eigh(matrix).eigenvectors[:, [0, -2, -1]]
    errors = ((H @ V.to(H.dtype)).double() - matrix @ V).norm(dim=0)
    assert H.noise < 1e-3 * float(torch.linalg.matrix_norm(matrix, 2))
    assert float(errors.max()) <= 2 * H.noise


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["tanh", "transformer"])
def test_inductor(name):
    problem = Problem(name)
    matrix, plain, runs = problem.dense(), problem.model, 0
    compiled = torch.compile(plain)

    def closure():
        nonlocal runs
        loss = F.cross_entropy(compiled(problem.inputs), problem.target)
        runs += "CompiledFunction" in _names(loss.grad_fn)
        return loss

    H = HessianOperator.from_gradients(closure, plain.named_parameters())
    assert_near(H, matrix)
    assert runs >= 12 + 20  # the code of inductor, not the module itself
    assert eigsh(H, 1).status == "converged"


def _names(node):
    """Of the nodes of a graph, in one string."""
    return type(node).__name__ + "".join(_names(n) for n, _ in node.next_functions if n is not None)


class WeightOnly(nn.Module):
    """A linear layer with int8 weights, and a scale for each of its rows."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale, self.bias = nn.Parameter(scale), copy.deepcopy(linear.bias)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_the_scales_of_quantised_weights():
    problem = Problem("tanh")
    model = nn.Sequential(WeightOnly(problem.model[0]), nn.Tanh(), WeightOnly(problem.model[2]))

    def loss(of):
        return F.cross_entropy(of(problem.inputs.to(of[0].bias.dtype)), problem.target)

    double = copy.deepcopy(model).double()
    matrix = HessianOperator(lambda: loss(double), double.named_parameters()).to_dense()
    assert_near(HessianOperator.from_gradients(lambda: loss(model), model.named_parameters()), matrix)


@pytest.fixture
def dynamic():
    """A layer quantised as it runs, of 3 inputs and 8 outputs."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs the kernels of fbgemm")
    quantization = pytest.importorskip("torch.ao.quantization")
    linear = nn.Sequential(Problem("tanh").model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao
        return quantization.quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)


def test_what_follows_a_dynamically_quantised_layer(dynamic):
    problem, head = Problem("tanh"), Problem("tanh").model[2]
    H = HessianOperator.from_gradients(
        lambda: F.cross_entropy(head(torch.tanh(dynamic(problem.inputs))), problem.target), head.named_parameters()
    )
    hidden, double = torch.tanh(dynamic(problem.inputs)).double(), copy.deepcopy(head).double()
    exact = HessianOperator(lambda: F.cross_entropy(double(hidden), problem.target), double.named_parameters())
    assert_near(H, exact.to_dense())


@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered")
def test_what_precedes_a_dynamically_quantised_layer_is_refused(dynamic):
    problem = Problem("tanh")
    shift = torch.zeros(3, requires_grad=True)

    def closure():
        outputs = problem.model[2](torch.tanh(dynamic(problem.inputs + shift)))
        return F.cross_entropy(outputs, problem.target)

    with pytest.raises(ValueError, match="closure: expected a loss that depends on params, got no gradient of any"):
        HessianOperator.from_gradients(closure, [shift])
    with pytest.warns(UserWarning, match=r"no gradient of the loss reaches shift \(3,\)"):
        HessianOperator.from_gradients(closure, [("shift", shift), *problem.model[2].named_parameters()])


def test_fake_quantisation_is_told_apart():
    problem = Problem("tanh")
    first, _, last = problem.model

    def closure():
        weight = torch.fake_quantize_per_tensor_affine(first.weight, 0.02, 0, -128, 127)
        return F.cross_entropy(last(torch.tanh(F.linear(problem.inputs, weight, first.bias))), problem.target)

    H = HessianOperator.from_gradients(closure, problem.model.named_parameters())
    with pytest.warns(ConvergenceWarning, match="its gradients are those of no function"):
        assert eigsh(H, 1).status == "not symmetric"
