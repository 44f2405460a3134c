"""The package's own loss and driver on the reference trajectory of the paper's spiral experiment."""

from pathlib import Path

import numpy as np
import torch

from dynloss_ext import HessianOperator, Oscillation, dynamic_cross_entropy, eigsh

REFERENCE = Path(__file__).parent / "data/spiral_reference_5000.npz"


class Spiral:
    """The reference's network and data; `train` takes one step of gradient descent at learning rate 1."""

    def __init__(self):
        reference = np.load(REFERENCE)
        self.X = torch.tensor(reference["X"])
        self.y = torch.tensor(reference["y"]).long()
        self.params = [torch.tensor(reference[name]).requires_grad_() for name in ("w1", "b1", "w2", "b2")]
        self.oscillation = Oscillation(3, float(reference["amplitude"]), int(reference["period"]), closed=True)
        self.eig_step, self.eig_top5 = reference["eig_step"], reference["eig_top5"]
        self.step = 0

    def loss(self):
        w1, b1, w2, b2 = self.params
        logits = torch.relu(self.X @ w1 + b1) @ w2 + b2
        return dynamic_cross_entropy(logits, self.y, self.oscillation, self.step)

    def train(self):
        gradients = torch.autograd.grad(self.loss(), self.params)
        with torch.no_grad():
            for p, g in zip(self.params, gradients, strict=True):
                p.sub_(g)
        self.step += 1


def dense(op):
    return op @ torch.eye(op.shape[0], dtype=op.dtype)


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
    matrix = dense(H)
    values = torch.linalg.eigvalsh(matrix)
    assert torch.allclose(matrix, matrix.T, atol=1e-13)
    assert torch.allclose(eigsh(H, 3, tol=1e-6).values, values[-3:].flip(0), rtol=1e-9)
    assert torch.allclose(eigsh(H, 3, which="SA", tol=1e-6).values, values[:3].flip(0), rtol=1e-7)
