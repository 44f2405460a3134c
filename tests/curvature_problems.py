"""Small problems with known second derivatives, shared by the tests of the curvature part."""

import torch
import torch.nn.functional as F


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
