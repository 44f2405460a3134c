"""The networks of the experiments, He-normal initialised, and several of them side by side as one.

Each builder takes a seed, so that a network is a pure function of its arguments whatever was drawn before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def he_normal_(model: nn.Module, seed: int) -> nn.Module:
    """Draws every weight of a convolution or linear layer from N(0, 2 / fan_in); biases are zero.

    He et al., arXiv 1502.01852.  Drawn on the CPU in float64: the same values for every dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = module.weight
                fan_in = weight[0].numel()
                draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(draw * (2.0 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def mlp(num_inputs: int, hidden: tuple[int, ...], num_classes: int, *, bias: bool = True, seed: int = 0) -> nn.Module:
    """(N, ...) with num_inputs values each -> logits (N, num_classes); ReLU between the layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(num_inputs, width, bias=bias), nn.ReLU()]
        num_inputs = width
    layers.append(nn.Linear(num_inputs, num_classes, bias=bias))
    return he_normal_(nn.Sequential(*layers), seed)


def myrtle5(
    num_classes: int = 10, *, width: int = 64, bias: bool = True, batchnorm: bool = False, seed: int = 0
) -> nn.Module:
    """Myrtle5 (Shankar et al., arXiv 2003.02237): images (N, 3, 32, 32) -> logits (N, num_classes).

    Four 3x3 convolutions of constant width, average pooling after the second (2), third (2) and fourth (8),
    one linear layer.  At width 64 and ten classes: 113,226 parameters, 112,960 without biases.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for index, pool in enumerate((1, 2, 2, 8), start=1):
        layers[f"conv{index}"] = nn.Conv2d(inputs, width, 3, padding=1, bias=bias)
        if batchnorm:
            layers[f"norm{index}"] = nn.BatchNorm2d(width)
        layers[f"relu{index}"] = nn.ReLU()
        if pool > 1:
            layers[f"pool{index}"] = nn.AvgPool2d(pool)
        inputs = width
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(width, num_classes, bias=bias)
    return he_normal_(nn.Sequential(layers), seed)


class _PreactivationBlock(nn.Module):
    """norm-relu-conv twice, added to the input; the shortcut is a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same_shape = inputs == outputs and stride == 1
        self.shortcut = None if same_shape else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        active = torch.relu(self.norm1(images))
        residual: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return residual + (images if self.shortcut is None else self.shortcut(active))


def wide_resnet(num_classes: int = 10, *, depth: int = 28, widen: int = 10, seed: int = 0) -> nn.Module:
    """Wide residual network WRN-depth-widen (Zagoruyko & Komodakis, arXiv 1605.07146), without dropout.

    Images (N, 3, 32, 32) -> logits (N, num_classes).  WRN-28-10 has 36,479,194 parameters.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"--depth: expected 6 n + 4 with n >= 1 (10, 16, 22, 28, ...), got {depth}")
    if widen < 1:
        raise ValueError(f"--widen: expected at least 1, got {widen}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=nn.Conv2d(3, 16, 3, padding=1, bias=False))
    inputs = 16
    for group, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
        for block in range((depth - 4) // 6):
            layers[f"group{group}_block{block}"] = _PreactivationBlock(
                inputs, widen * width, stride if block == 0 else 1
            )
            inputs = widen * width
    layers["norm"] = nn.BatchNorm2d(inputs)
    layers["relu"] = nn.ReLU()
    layers["pool"] = nn.AvgPool2d(8)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(inputs, num_classes)
    return he_normal_(nn.Sequential(layers), seed)


class Ensemble(nn.Module):
    """E networks as one with grouped convolutions: images (E, N, 3, 32, 32) -> logits (E, N, C).

    Each member computes what it computes alone, to rounding, and the gradient of a sum over the members is each
    one's own; so are BatchNorm's statistics.  Images (N, 3, 32, 32) are shown to every member.

    Args:
        members: of one shape, each a Sequential of convolutions, BatchNorm, ReLU and pooling down to one pixel, then
            flattened, then linear.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.size = len(members)
        first = members[0]
        if not isinstance(first, nn.Sequential):
            raise TypeError(f"members: expected Sequential networks such as Myrtle5, got {type(first).__name__}")
        layers = OrderedDict(
            (name, _side_by_side([member.get_submodule(name) for member in members]))
            for name, _ in first.named_children()
        )
        self.layers = nn.Sequential(layers)

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(self.size, *images.shape[-4:])
        pixels: Tensor = self.layers(images.transpose(0, 1).flatten(1, 2))
        return pixels.view(len(pixels), self.size, -1).transpose(0, 1)


def _side_by_side(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer that does on E times the channels what each of `layers` does on its own."""
    first, count = layers[0], len(layers)
    joint: nn.Module
    if isinstance(first, nn.Conv2d):
        channels = count * first.in_channels, count * first.out_channels
        size, stride, padding = first.kernel_size, first.stride, first.padding
        bias = first.bias is not None
        joint = nn.Conv2d(*channels, size, stride, padding, groups=count * first.groups, bias=bias)  # type: ignore[arg-type]
    elif isinstance(first, nn.Linear):  # on one pixel
        channels = count * first.in_features, count * first.out_features
        joint = nn.Conv2d(*channels, 1, groups=count, bias=first.bias is not None)
    elif isinstance(first, nn.BatchNorm2d):
        joint = nn.BatchNorm2d(count * first.num_features, first.eps, first.momentum)
    elif isinstance(first, nn.Flatten):
        return nn.Identity()
    elif isinstance(first, (nn.ReLU, nn.AvgPool2d)):
        return first
    else:
        raise TypeError(
            f"members: expected convolutions, BatchNorm, ReLU, pooling, linear layers, got {type(first).__name__}"
        )
    joint.to(next(first.parameters()).dtype)
    states = [layer.state_dict() for layer in layers]
    for name, value in joint.state_dict().items():
        if value.dim():  # not BatchNorm's number of batches
            value.copy_(torch.cat([state[name] for state in states]).view_as(value))
    return joint
