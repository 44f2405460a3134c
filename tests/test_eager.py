"""The direct calls of plain eager mode: the same bits as through torch.ops, and nothing that is not plain."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dynloss_ext import _C, Oscillation, dynamic_cross_entropy, loss, loss_and_gradient

OSCILLATIONS = {
    "waveform": Oscillation(4, 70, 10, class_order=[2, 0, 3, 1], start_step=2, stop_step=60),
    "table": Oscillation.from_table(torch.arange(12.0).reshape(3, 4)),
    "ensemble": Oscillation(4, torch.tensor([3.0, 70.0]), torch.tensor([10.0, 7.5])),
}


def problem(kind, dtype=torch.float32):
    torch.manual_seed(0)
    shape = (2, 9, 4) if kind == "ensemble" else (9, 4)
    target = torch.randint(4, shape[:-1])
    target[..., 3] = -100
    return torch.randn(shape).to(dtype), target


@pytest.mark.parametrize("kind", OSCILLATIONS)
@pytest.mark.parametrize("step", [0, 7, torch.tensor(7)], ids=["0", "7", "tensor"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 0.0, 3.0])], ids=["plain", "weighted"])
def test_same_bits_as_through_torch_ops(kind, step, weight):
    logits, target = problem(kind)
    for reduction, normalization, smoothing in itertools.product(
        ("none", "mean", "sum"), ("samples", "weights"), (0.0, 0.1)
    ):
        options = (reduction, normalization, -100, smoothing)
        arguments = loss._arguments(logits, target, OSCILLATIONS[kind], step, weight, *options)
        value = _C.cross_entropy(logits, target, OSCILLATIONS[kind]._plain, step, weight, *options)
        assert torch.equal(value, torch.ops.dynloss.cross_entropy(*arguments)[0])
        pair = _C.cross_entropy_with_gradient(logits, target, OSCILLATIONS[kind]._plain, step, weight, *options)
        both = torch.ops.dynloss.cross_entropy_with_gradient(*arguments, True)
        for found, expected in zip(pair, both, strict=False):
            assert torch.equal(found, expected)


def test_records_the_graph():
    logits, target = problem("waveform", torch.float64)
    logits.requires_grad_()
    value = _C.cross_entropy(logits, target, OSCILLATIONS["waveform"]._plain, 7, None, "mean", "samples", -100, 0.0)
    assert value.grad_fn.name() == "DynamicCrossEntropyBackward"
    pair = loss_and_gradient(logits, target, OSCILLATIONS["waveform"], 7)
    assert not any(result.requires_grad for result in pair)
    assert torch.equal(torch.autograd.grad(value, logits)[0], pair[1])


class Subclass(torch.Tensor):
    pass


def test_leaves_alone_what_is_not_plain():
    logits, target = problem("waveform")
    plain = [logits, target, OSCILLATIONS["waveform"]._plain, 7, None, "mean", "samples", -100, 0.0]
    function = Oscillation.from_function(lambda step: torch.ones(4), 4)
    others = {
        0: [logits.as_subclass(Subclass), logits.tolist(), None, logits[0, 0], logits[:, :3]],
        1: [target.as_subclass(Subclass), target.tolist()],
        2: [None, "waveform", function._plain, Oscillation(3, 2, 5)._plain],
        3: [7.0, True, "7", 2**63, -(2**63) - 1, 2**100, None],
        4: [[1.0] * 4, 1.0, True, torch.ones(4).as_subclass(Subclass)],
        5: ["max", "", None, 1, ["mean"]],
        6: ["classes", None, False],
        7: [1.0, True, 2**63, None],
        8: [-0.1, 1.1, float("nan"), True, 0, "0", None],
    }
    for call in (_C.cross_entropy, _C.cross_entropy_with_gradient):
        assert call(*plain) is not NotImplemented
        assert call(*plain[:-1]) is NotImplemented
        for position, values in others.items():
            for value in values:
                arguments = [*plain[:position], value, *plain[position + 1 :]]
                assert call(*arguments) is NotImplemented, (position, value)


def test_modes_and_subclasses_see_the_op():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    logits, target = problem("waveform")
    with Watch():
        inside = dynamic_cross_entropy(logits, target, OSCILLATIONS["waveform"], 7)
    assert any("dynloss" in name for name in seen)
    outside = dynamic_cross_entropy(logits, target, OSCILLATIONS["waveform"], 7)
    assert torch.equal(inside, outside)
    result = dynamic_cross_entropy(logits.as_subclass(Subclass), target, OSCILLATIONS["waveform"], 7)
    assert isinstance(result, Subclass)
    assert torch.equal(result.as_subclass(torch.Tensor), outside)


def test_errors_come_through():
    logits, target = problem("waveform")
    target[2] = 9
    for call in (_C.cross_entropy, _C.cross_entropy_with_gradient):
        with pytest.raises(IndexError, match="got 9 at position 2"):
            call(logits, target, OSCILLATIONS["waveform"]._plain, 7, None, "mean", "samples", -100, 0.0)
        with pytest.raises(TypeError, match=r"^target: "):
            call(logits, target.double(), OSCILLATIONS["waveform"]._plain, 7, None, "mean", "samples", -100, 0.0)
