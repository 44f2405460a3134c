"""Networks of one architecture trained side by side as one network: small ones fill a device only so."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
            raise TypeError(f"members: got {type(first).__name__}, expected Sequential networks such as Myrtle5")
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
        raise TypeError(f"members: got a layer {type(first).__name__}, which cannot be put side by side")
    joint.to(next(first.parameters()).dtype)
    states = [layer.state_dict() for layer in layers]
    for name, value in joint.state_dict().items():
        if value.dim():  # not BatchNorm's number of batches
            value.copy_(torch.cat([state[name] for state in states]).view_as(value))
    return joint
