"""Dynamical loss functions and the curvature they tilt: fused, differentiable, measured."""

from dynloss_ext import _extension as _extension
from dynloss_ext import reference
from dynloss_ext.eigen import ConvergenceWarning, EigenResult, EigenTracker, eigsh
from dynloss_ext.ensemble import ModuleEnsemble, Perceptron, PerceptronEnsemble
from dynloss_ext.graphs import CapturedHessian, CapturedStep, DeviceRecords
from dynloss_ext.hessian import CurvatureOperator, GaussNewtonOperator, HessianOperator
from dynloss_ext.instability import (
    Crossing,
    Instability,
    PeriodChange,
    PeriodSegment,
    branch_means,
    crossings,
    detect_instabilities,
    detect_periods,
    instability_threshold,
    period_changes,
)
from dynloss_ext.loss import DynamicCrossEntropyLoss, dynamic_cross_entropy, loss_and_gradient
from dynloss_ext.ntk import ntk_eigenvalues
from dynloss_ext.oscillation import Oscillation
from dynloss_ext.spectrum import (
    DiagonalEstimate,
    Estimate,
    SpectralDensity,
    diagonal,
    spectral_density,
    trace,
)
from dynloss_ext.stability import batch_sharpness, preconditioner, stability_limit

__version__ = "0.2.0"

__all__ = [
    "CapturedHessian",
    "CapturedStep",
    "ConvergenceWarning",
    "Crossing",
    "CurvatureOperator",
    "DeviceRecords",
    "DiagonalEstimate",
    "DynamicCrossEntropyLoss",
    "EigenResult",
    "EigenTracker",
    "Estimate",
    "GaussNewtonOperator",
    "HessianOperator",
    "Instability",
    "ModuleEnsemble",
    "Oscillation",
    "Perceptron",
    "PerceptronEnsemble",
    "PeriodChange",
    "PeriodSegment",
    "SpectralDensity",
    "batch_sharpness",
    "branch_means",
    "crossings",
    "detect_instabilities",
    "detect_periods",
    "diagonal",
    "dynamic_cross_entropy",
    "eigsh",
    "instability_threshold",
    "loss_and_gradient",
    "ntk_eigenvalues",
    "period_changes",
    "preconditioner",
    "reference",
    "spectral_density",
    "stability_limit",
    "trace",
]
