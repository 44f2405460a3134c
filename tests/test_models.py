"""The example networks: parameter counts of the papers, shapes, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.models import mlp, myrtle5, num_parameters, wide_resnet


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 113_226),
        ({"bias": False}, 112_960),
        ({"batchnorm": True}, 113_226 + 4 * 2 * 64),
        ({"width": 16}, 7_578),
    ],
)
def test_myrtle5_parameter_count(options: dict[str, int], expected: int) -> None:
    assert num_parameters(myrtle5(**options)) == expected


def test_myrtle5_matches_its_description() -> None:
    model = myrtle5(width=8, seed=1).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    x = images
    for layer, pool in enumerate((1, 2, 2, 8), start=1):
        x = torch.conv2d(x, parameters[f"conv{layer}.weight"], parameters[f"conv{layer}.bias"], padding=1).relu()
        x = torch.nn.functional.avg_pool2d(x, pool)
    assert x.shape == (2, 8, 1, 1)
    expected = x.flatten(1) @ parameters["linear.weight"].T + parameters["linear.bias"]
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    ("depth", "widen", "expected"),
    [(28, 10, 36_479_194), (16, 4, 2_748_890), (40, 4, 8_949_210), (10, 1, 77_850)],
)
def test_wide_resnet_parameter_count(depth: int, widen: int, expected: int) -> None:
    with torch.device("meta"):
        assert num_parameters(wide_resnet(depth=depth, widen=widen)) == expected


def test_wide_resnet_downsamples_twice() -> None:
    model = wide_resnet(depth=10, widen=1)
    shapes = []
    for name in ("group1_block0", "group2_block0", "group3_block0"):
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("depth", [9, 27, 4])
def test_wide_resnet_refuses_an_impossible_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=f"--depth: expected 6 n . 4 .*got {depth}"):
        wide_resnet(depth=depth)


def test_mlp_shape_and_count() -> None:
    model = mlp(2, (100,), 3)
    assert num_parameters(model) == 603
    assert model(torch.randn(5, 2)).shape == (5, 3)


def test_weights_are_he_normal_and_a_function_of_the_seed() -> None:
    model = myrtle5()
    conv = model.get_submodule("conv3").weight
    assert conv.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert conv.mean().item() == pytest.approx(0.0, abs=2e-3)
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    torch.manual_seed(7)
    again = myrtle5()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(conv, myrtle5(seed=1).get_submodule("conv3").weight)
