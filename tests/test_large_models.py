"""Eigenvalues of convolutional networks against SciPy's ARPACK on the same products."""

import numpy as np
import pytest
import torch

from common.data import Batches, synthetic_cifar10
from common.models import myrtle5
from dynloss_ext import EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy, eigsh

scipy_linalg = pytest.importorskip("scipy.sparse.linalg")


@pytest.mark.parametrize(
    ("width", "count", "parameters"),
    [(4, 10, 606), pytest.param(64, 20, 113_226, marks=pytest.mark.slow)],
)
def test_myrtle5(width, count, parameters):
    images = synthetic_cifar10(train_per_class=count // 10, test_per_class=1).train
    batch = Batches(images, None, dtype=torch.float64).get(0)
    model = myrtle5(10, width=width).double()
    params = list(model.parameters())
    oscillation = Oscillation(10, 10.0, 100)

    def hessian(step):
        return HessianOperator(dynamic_cross_entropy(model(batch.images), batch.labels, oscillation, step), params)

    tracker = EigenTracker(3)
    before = hessian(30)
    tracker.update(before)
    with torch.no_grad():
        for parameter, gradient in zip(params, before.gradients, strict=True):
            parameter.sub_(gradient, alpha=0.02)
    H = hessian(31)
    assert H.shape == (parameters, parameters)
    tracked = tracker.update(H)
    values = scipy_linalg.eigsh(H.as_scipy(), k=3, which="LA", tol=1e-9, return_eigenvectors=False)
    exact = torch.from_numpy(np.sort(values)[::-1].copy())
    assert torch.allclose(tracked.values, exact, rtol=1e-4, atol=0)
    found = eigsh(H, 3, tol=1e-6)
    assert found.converged.all()
    assert torch.allclose(found.values, exact, rtol=1e-9, atol=0)
    assert float((H @ found.vectors - found.vectors * found.values).norm(dim=0).max()) < 1e-5 * float(exact[0])
