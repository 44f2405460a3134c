"""Small problems with known second derivatives, shared by the tests of the curvature part."""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dynloss_ext import Oscillation, dynamic_cross_entropy, eigsh

REFERENCE = Path(__file__).parent / "data/spiral_reference_5000.npz"


def mlp(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 7), (7,), (7, 3), (3,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(40) % 3


def loss_of(params, weight=None):
    hidden = torch.tanh(X.to(params[0].dtype) @ params[0] + params[1])
    return F.cross_entropy(hidden @ params[2] + params[3], Y, weight=weight)


def dense_hessian(params):
    """torch.autograd.functional.hessian of the loss as a function of the flat vector: another route."""
    sizes = [p.numel() for p in params]

    def of_flat(flat):
        return loss_of([piece.view(p.shape) for piece, p in zip(flat.split(sizes), params, strict=True)])

    return torch.autograd.functional.hessian(of_flat, torch.cat([p.detach().reshape(-1) for p in params]))


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

    def to(self, device, dtype):
        """A copy."""
        moved = copy.copy(self)
        moved.X, moved.y = self.X.to(device, dtype), self.y.to(device)
        moved.params = [p.detach().to(device, dtype, copy=True).requires_grad_() for p in self.params]
        return moved

    def logits(self, rows=slice(None)):
        w1, b1, w2, b2 = self.params
        return torch.relu(self.X[rows] @ w1 + b1) @ w2 + b2

    def loss(self, rows=slice(None)):
        return dynamic_cross_entropy(self.logits(rows), self.y[rows], self.oscillation, self.step)

    def hessian(self):
        """(P, P), by hand and quick: the Gauss-Newton matrix and what couples the two layers."""
        w1, b1, w2, _ = (p.detach() for p in self.params)
        inputs = torch.cat([self.X, torch.ones(len(self.X), 1)], dim=1)  # the bias is one more weight
        before = inputs @ torch.cat([w1, b1[None]])
        active = (before > 0).to(before)
        hidden = torch.cat([before * active, torch.ones(len(self.X), 1)], dim=1)
        p = torch.softmax(self.logits().detach(), dim=1)
        weight = self.oscillation.weights(self.step)[self.y, None] / len(self.y)
        residual = weight * (p - F.one_hot(self.y, 3))
        curvature = weight[:, :, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
        first = torch.einsum("na,nj,jc->ncaj", inputs, active, w2).flatten(2)
        second = torch.einsum("nj,cd->ncjd", hidden, torch.eye(3).to(hidden)).flatten(2)
        jacobian = torch.cat([first, second], dim=2)
        H = jacobian.flatten(0, 1).T @ (curvature @ jacobian).flatten(0, 1)
        coupling = torch.diag_embed(torch.einsum("nc,na,nj->acj", residual, inputs, active))
        coupling = coupling.permute(0, 2, 3, 1).reshape(300, 300)
        H[:300, 300:600] += coupling
        H[300:600, :300] += coupling.T
        return H

    def train(self):
        gradients = torch.autograd.grad(self.loss(), self.params)
        with torch.no_grad():
            for p, g in zip(self.params, gradients, strict=True):
                p.sub_(g)
        self.step += 1


class Known:
    """v -> Q diag(spectrum) Qᵀ v for a random orthogonal Q; counts its calls."""

    def __init__(self, spectrum, dtype=torch.float64, seed=0):
        self.spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
        n = len(self.spectrum)
        generator = torch.Generator().manual_seed(seed)
        self.Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        matrix = (self.Q * self.spectrum) @ self.Q.T
        self.matrix = ((matrix + matrix.T) / 2).to(dtype)
        self.calls = 0

    def __call__(self, v):
        self.calls += 1
        return self.matrix @ v

    def solve(self, k, **options):
        n = len(self.spectrum)
        return eigsh(self, k, n=n, dtype=self.matrix.dtype, **options)

    def expected(self, k, which="LA"):
        key = {"LA": -self.spectrum, "SA": self.spectrum, "LM": -self.spectrum.abs()}[which]
        return self.spectrum[torch.argsort(key, stable=True)[:k]].sort(descending=True).values


def check_eigenpairs(operator, result, k, which="LA", rtol=1e-8):
    expected = operator.expected(k, which)
    scale = operator.spectrum.abs().max()
    assert torch.allclose(result.values, expected, rtol=rtol, atol=rtol * float(scale) * 1e-2)
    assert result.converged.all()
    assert result.status == "converged"
    assert result.num_hvp == operator.calls
    V = result.vectors
    assert torch.allclose(V.T @ V, torch.eye(k, dtype=V.dtype), atol=1e-10)
    true_residuals = torch.linalg.norm(operator.matrix @ V - V * result.values.to(V.dtype), dim=0)
    assert torch.allclose(result.residuals, true_residuals.double(), rtol=1e-3, atol=1e-12 * float(scale))


#: Weights of central differences at 1, 2, ... steps, by the order of their error.
DIFFERENCES = {2: (1 / 2,), 6: (3 / 4, -3 / 20, 1 / 60)}


def hessian_by_differences(closure, params, step=1e-5, order=2):
    """(P, P) float64 by central differences of gradients: no second derivative of torch's takes part."""
    params = list(params)
    flat = torch.cat([p.detach().reshape(-1) for p in params])

    def gradient_at(point):
        with torch.no_grad():
            for p, values in zip(params, point.split([p.numel() for p in params]), strict=True):
                p.copy_(values.view_as(p))
        with torch.enable_grad():
            parts = torch.autograd.grad(closure(), params, allow_unused=True)
        pairs = zip(parts, params, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])

    shifts = step * torch.eye(len(flat), dtype=torch.float64)
    rows = [
        sum(
            weight * (gradient_at(flat + k * shift) - gradient_at(flat - k * shift))
            for k, weight in enumerate(DIFFERENCES[order], 1)
        )
        / step
        for shift in shifts
    ]
    gradient_at(flat)
    return torch.stack(rows)
