"""Dynamical loss functions and the curvature they tilt: fused, differentiable, measured."""

from dynloss_ext import _extension as _extension
from dynloss_ext import reference
from dynloss_ext.loss import DynamicCrossEntropyLoss, dynamic_cross_entropy, loss_and_gradient
from dynloss_ext.oscillation import Oscillation

__version__ = "0.1.0"

__all__ = [
    "DynamicCrossEntropyLoss",
    "Oscillation",
    "dynamic_cross_entropy",
    "loss_and_gradient",
    "reference",
]
