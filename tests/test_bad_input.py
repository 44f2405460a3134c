"""Bad arguments of the loss: an error that names the argument, the value and what is expected, before work starts."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient

OSCILLATION = Oscillation(3, 5, 10)
ENSEMBLE = Oscillation(3, torch.tensor([2.0, 3.0]), 10)
X, Y = torch.linspace(-1, 1, 12).view(4, 3), torch.tensor([0, 1, 2, 0])


def describe(value):
    return f"{tuple(value.shape)}-{value.dtype}" if isinstance(value, torch.Tensor) else repr(value)[:20]


def cases(error, name, *values):
    return [pytest.param(error, name, value, id=f"{name}={describe(value)}") for value in values]


# ---- Oscillation


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        *cases(TypeError, "num_classes", 2.0, "3", None, True),
        *cases(ValueError, "num_classes", 0, -1),
        *cases(TypeError, "amplitude", "5", None, True, [2, 3], np.ones(2), Fraction(3)),
        *cases(ValueError, "amplitude", 0.99, -1, math.nan, math.inf, 1e101, 10**400, torch.ones(2, 2), torch.empty(0)),
        *cases(ValueError, "amplitude", torch.tensor(2.0, requires_grad=True), torch.tensor(True)),
        *cases(ValueError, "amplitude", torch.tensor([2.0, 0.5]), torch.tensor(2.0 + 1j)),
        *cases(TypeError, "period", "5", None, False, [2, 3]),
        *cases(
            ValueError, "period", 0, -3, math.nan, math.inf, 1e-300, 10**400, torch.tensor([3.0, 0.0]), torch.ones(1, 1)
        ),
        *cases(ValueError, "waveform", "saw", "", None, 1, ["sine"]),
        *cases(TypeError, "closed", 1, None, "yes"),
        *cases(TypeError, "class_order", 3, "012", [0, 1, 2.0], [False, 1, 2], ["0", "1", "2"], torch.ones(3)),
        *cases(ValueError, "class_order", [0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 3], [], torch.tensor([2, 1, 3])),
        *cases(TypeError, "start_step", 1.5, "0", None, True, torch.tensor(1)),
        *cases(ValueError, "start_step", 2**53, -(2**53), 10**30),
        *cases(TypeError, "stop_step", 1.5, "9", False),
        *cases(ValueError, "stop_step", -1, 2**53),
    ],
)
def test_oscillation(error, name, value):
    arguments = {"num_classes": 3, "amplitude": 5, "period": 10} | {name: value}
    with pytest.raises(error, match=rf"{name}: expected.*got"):
        Oscillation(arguments.pop("num_classes"), arguments.pop("amplitude"), arguments.pop("period"), **arguments)


def test_oscillation_of_two_sizes():
    with pytest.raises(ValueError, match=r"period: expected one per amplitude, got \(3,\) for \(2,\)"):
        Oscillation(3, torch.tensor([2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (TypeError, None),
        (TypeError, [[1.0, 2.0]]),
        (TypeError, np.ones((2, 2))),
        (ValueError, torch.ones(3)),
        (ValueError, torch.ones(1, 1, 2, 3)),
        (ValueError, torch.ones(0, 3)),
        (ValueError, torch.ones(2, 0)),
        (ValueError, torch.ones(2, 3, dtype=torch.bool)),
        (ValueError, torch.ones(2, 3, dtype=torch.complex64)),
        (ValueError, -torch.ones(2, 3)),
        (ValueError, torch.full((2, 3), math.nan)),
        (ValueError, torch.full((2, 3), math.inf)),
        (ValueError, torch.ones(2, 3, requires_grad=True)),
    ],
    ids=describe,
)
def test_table(error, value):
    with pytest.raises(error, match=r"gamma: expected.*got"):
        Oscillation.from_table(value)


@pytest.mark.parametrize("result", ["abc", None, [1.0, 2.0], torch.ones(1, 3), -torch.ones(3), [1.0, math.nan, 1.0]])
def test_function(result):
    with pytest.raises(TypeError, match="function: expected a callable"):
        Oscillation.from_function(torch.ones(3), 3)
    oscillation = Oscillation.from_function(lambda step: result, 3)
    for use in (oscillation.weights, lambda step: dynamic_cross_entropy(X, Y, oscillation, step)):
        with pytest.raises((TypeError, ValueError), match=r"function: expected.*\(3,\) at step 7, got"):
            use(7)


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (TypeError, 1.0),
        (TypeError, True),
        (TypeError, None),
        (TypeError, "3"),
        (ValueError, 2**63),
        (ValueError, -(2**63) - 1),
        (ValueError, 10**30),
        (ValueError, torch.tensor(3)),
        (ValueError, torch.tensor([3.0])),
        (ValueError, torch.tensor([3], dtype=torch.int32)),
        (ValueError, torch.tensor([[3]])),
    ],
    ids=describe,
)
def test_step_of_weights(error, step):
    with pytest.raises(error, match=r"step: expected.*got"):
        OSCILLATION.weights(step)


# ---- the loss


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        *cases(TypeError, "logits", None, X.numpy(), [[1.0]], X.long(), X.to(torch.complex64), X > 0),
        *cases(ValueError, "logits", X[0, 0], X[:, :2], X[None], torch.randn(4, 4), X.to_sparse()),
        *cases(TypeError, "target", None, [0, 1, 2, 0], Y.float(), Y.short(), Y > 0, torch.rand(4, 2)),
        *cases(ValueError, "target", Y[:3], Y[:, None], Y[0], Y[None], torch.cat([Y, Y])),
        *cases(TypeError, "oscillation", None, 3, torch.ones(3), "triangle", Oscillation),
        *cases(TypeError, "step", 1.0, True, None, "3", torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)),
        *cases(ValueError, "step", 2**63, -(2**63) - 1, torch.tensor([1]), torch.tensor([[1]]), torch.tensor([1, 2])),
        *cases(ValueError, "step", torch.tensor(1, device="meta")),
        *cases(TypeError, "weight", [1.0, 1.0, 1.0], 1.0, torch.ones(3, dtype=torch.int64), torch.ones(3) > 0),
        *cases(TypeError, "weight", np.ones(3), torch.ones(3, dtype=torch.complex64)),
        *cases(ValueError, "weight", torch.ones(4), torch.ones(()), torch.ones(1, 3), torch.ones(0)),
        *cases(ValueError, "weight", torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(3))),
        *cases(ValueError, "reduction", "avg", None, 1, ["mean"], ""),
        *cases(ValueError, "normalization", "count", None, True, ["samples"]),
        *cases(TypeError, "ignore_index", "1", 1.0, None, True, torch.tensor(1)),
        *cases(ValueError, "ignore_index", 2**63, -(2**63) - 1),
        *cases(TypeError, "label_smoothing", "0.1", None, True, torch.tensor(0.1)),
        *cases(ValueError, "label_smoothing", -0.01, 1.01, math.nan, math.inf),
    ],
)
def test_loss(error, name, value):
    arguments = {"logits": X, "target": Y, "oscillation": OSCILLATION, "step": 3} | {name: value}
    for function in (dynamic_cross_entropy, loss_and_gradient):
        with pytest.raises(error, match=rf"{name}: expected.*got"):
            function(**arguments)
        if name in ("weight", "step"):
            with pytest.raises(error, match=rf"{name}: expected.*got"):
                function(**(arguments | {"target": X.softmax(1)}))
    if name in ("oscillation", "weight", "reduction", "normalization", "ignore_index", "label_smoothing"):
        with pytest.raises(error, match=rf"{name}: expected.*got"):
            DynamicCrossEntropyLoss(**({"oscillation": OSCILLATION} | {name: value}))


def test_devices_must_agree():
    for arguments, name in (((X.to("meta"), Y), "target"), ((X, Y.to("meta")), "target")):
        with pytest.raises(ValueError, match=f"{name}: expected device"):
            dynamic_cross_entropy(*arguments, OSCILLATION, 3)
    with pytest.raises(ValueError, match="weight: expected device cpu, that of the logits, got meta"):
        dynamic_cross_entropy(X, Y, OSCILLATION, 3, weight=torch.ones(3, device="meta"))


@pytest.mark.parametrize(
    ("logits", "target", "step", "message"),
    [
        (X, Y, 3, r"logits: expected"),
        (torch.randn(2, 4, 4), Y, 3, r"logits: expected 3 classes"),
        (torch.randn(3, 4, 3), Y, 3, r"logits: expected a first dimension of 2"),
        (torch.randn(2, 4, 3, 1), Y, 3, r"logits: expected shape \(E, N, C\)"),
        (torch.randn(2, 4, 3), Y[:3], 3, r"target: expected shape \(4,\) or \(2, 4\)"),
        (torch.randn(2, 4, 3), Y.expand(3, 4), 3, r"target: expected shape \(4,\) or \(2, 4\)"),
        (torch.randn(2, 4, 3), Y, torch.tensor([1, 2, 3]), r"step: expected shape \(\) or one step per member"),
    ],
)
def test_ensemble(logits, target, step, message):
    with pytest.raises(ValueError, match=message):
        dynamic_cross_entropy(logits, target, ENSEMBLE, step)


@pytest.mark.parametrize("shape", [(3, 3), (1, 3), (2,), (2, 4), (1, 2, 3)])
def test_weight_of_an_ensemble(shape):
    logits, weight = torch.randn(2, 4, 3), torch.ones(shape)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3,\) or a row per member of the ensemble, got"):
        dynamic_cross_entropy(logits, Y, ENSEMBLE, 3, weight=weight)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3,\) or \(2, 3\), got"):
        DynamicCrossEntropyLoss(ENSEMBLE, weight=weight)


def test_module():
    for name in ("inplace_gradient", "plain_in_eval"):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got int"):
            DynamicCrossEntropyLoss(OSCILLATION, **{name: 1})
    with pytest.raises(ValueError, match="inplace_gradient: expected reduction 'mean' or 'sum', got 'none'"):
        DynamicCrossEntropyLoss(OSCILLATION, inplace_gradient=True, reduction="none")
    criterion = DynamicCrossEntropyLoss(OSCILLATION)
    for step, error in ((1.5, TypeError), (True, TypeError), (torch.tensor(1.0), TypeError), (2**63, ValueError)):
        for call in (criterion.set_step, lambda step: criterion(X, Y, step=step)):
            with pytest.raises(error, match="step: expected"):
                call(step)
    assert criterion.current_step == 0
    for logits, target, error in ((None, Y, TypeError), (X, None, TypeError), (X, Y[:2], ValueError)):
        with pytest.raises(error, match=r"(logits|target): expected.*got"):
            criterion(logits, target)
    with pytest.raises(TypeError, match=r"logits: expected.*got"):
        DynamicCrossEntropyLoss(OSCILLATION, inplace_gradient=True)(None, Y)


@pytest.mark.parametrize("position", [0, 3, 999, 69_999])
@pytest.mark.parametrize("index", [3, -1, 2**40, -(2**40)])
def test_one_bad_target_among_many_is_named(position, index):
    logits, target = torch.zeros(70_000, 3, requires_grad=True), torch.zeros(70_000, dtype=torch.int64)
    target[position] = index
    with pytest.raises(
        IndexError, match=f"target: expected class indices from 0 to 2, got {index} at position {position}"
    ):
        dynamic_cross_entropy(logits, target, OSCILLATION, 3)


# ---- the ops themselves, which torch.ops makes reachable


def op_arguments(**changes):
    loss, weights, normalizer = torch.ops.dynloss.cross_entropy(
        X, Y, 3, None, *OSCILLATION.on(X.device), None, 1, False, -100, 0.0
    )
    arguments = {"u": torch.randn(4, 3), "v": torch.randn(4, 3), "grad_output": loss, "logits": X, "target": Y}
    arguments |= {"weights": weights, "normalizer": normalizer}
    return (*(arguments | changes).values(), -100, 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("u", torch.randn(3, 4)),
        ("v", torch.randn(3, 4)),
        ("v", torch.randn(4, 3).double()),
        ("grad_output", torch.ones(3)),
        ("grad_output", torch.tensor(1)),
        ("target", Y[:2]),
        ("weights", torch.ones(3)),
        ("weights", torch.ones(4, dtype=torch.float64)),
        ("normalizer", torch.ones(2)),
        ("normalizer", torch.ones(3, dtype=torch.float64)),
    ],
    ids=describe,
)
def test_derivative_ops_check_what_they_get(name, value):
    torch.ops.dynloss.cross_entropy_derivative(*op_arguments())
    for device in ("cpu", "meta"):
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in op_arguments(**{name: value})]
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            torch.ops.dynloss.cross_entropy_derivative(*arguments)


def test_a_single_direction_is_v():
    with pytest.raises(ValueError, match="v: expected a tensor where u is one, got None"):
        torch.ops.dynloss.cross_entropy_derivative(*op_arguments(v=None))
