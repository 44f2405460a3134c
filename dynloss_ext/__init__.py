"""Dynamical loss functions and the curvature they tilt: fused, differentiable, measured."""

import torch as _torch  # noqa: F401  (its libraries must be loaded before the extension)

from dynloss_ext import reference
from dynloss_ext.loss import DynamicCrossEntropyLoss, dynamic_cross_entropy, loss_and_gradient
from dynloss_ext.oscillation import Oscillation

__all__ = [
    "DynamicCrossEntropyLoss",
    "Oscillation",
    "dynamic_cross_entropy",
    "loss_and_gradient",
    "reference",
]
