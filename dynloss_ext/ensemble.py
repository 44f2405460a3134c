"""Many networks at once: training, curvature and records of ensembles under the dynamical loss."""

from dynloss_ext._ensemble import EnsembleEigenvalues, TrainingRecords
from dynloss_ext.module_ensemble import ModuleEnsemble
from dynloss_ext.perceptron import Perceptron, PerceptronEnsemble, perceptron_values

__all__ = [
    "EnsembleEigenvalues",
    "ModuleEnsemble",
    "Perceptron",
    "PerceptronEnsemble",
    "TrainingRecords",
    "perceptron_values",
]
