"""The package's own loss and driver on the reference trajectory of the paper's spiral experiment."""

import numpy as np
import pytest
import torch
from curvature_problems import Spiral

from dynloss_ext import HessianOperator, eigsh


@pytest.mark.slow
def test_eigenvalues_of_the_reference():
    """Row i of the reference is taken after update i with the weights of step i + 1."""
    spiral = Spiral()
    for row in range(0, 4901, 25):
        while spiral.step < row + 1:
            spiral.train()
        if row % 700 == 0 or row == 4300:
            index = int(np.searchsorted(spiral.eig_step, row))
            assert spiral.eig_step[index] == row
            H = HessianOperator(spiral.loss(), spiral.params)
            expected = torch.tensor(spiral.eig_top5[index])
            exact = eigsh(H, 5, tol=1e-6)
            assert exact.converged.all()
            assert torch.allclose(exact.values, expected, rtol=1e-8, atol=0)
            rough = eigsh(H, 3)
            assert torch.allclose(rough.values, expected[:3], rtol=1e-4, atol=0)


def test_product_through_the_op_is_the_dense_one():
    spiral = Spiral()
    for _ in range(20):
        spiral.train()
    H = HessianOperator(spiral.loss(), spiral.params)
    matrix = H.to_dense()
    values = torch.linalg.eigvalsh(matrix)
    assert torch.allclose(matrix, matrix.T, atol=1e-13)
    assert torch.allclose(eigsh(H, 3, tol=1e-6).values, values[-3:].flip(0), rtol=1e-9)
    assert torch.allclose(eigsh(H, 3, which="SA", tol=1e-6).values, values[:3].flip(0), rtol=1e-7)
