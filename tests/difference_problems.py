"""Models whose Hessian is asked for by differences of gradients, and the exact one beside it."""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class Transformer(nn.Module):
    """One block of causal attention over 7 tokens, by the fused kernel where torch takes one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 7)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm(x + self.out(attended.transpose(1, 2).reshape(x.shape)))
        return self.head(x)[:, -1]


class Problem:
    """A model and its data, after some steps of training in float32."""

    def __init__(self, name, steps=50):
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if name == "transformer":
                self.model, self.inputs = Transformer(), torch.randint(7, (24, 6), generator=generator)
                classes = 7
            else:
                activation = nn.ReLU() if name == "relu" else nn.Tanh()
                self.model = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 3))
                self.inputs, classes = torch.randn(48, 3, generator=generator), 3
        self.target = torch.randint(classes, (len(self.inputs),), generator=generator)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        self.model.requires_grad_()
        optimizer.zero_grad()
        self.context = nullcontext

    def to(self, dtype):
        moved = copy.copy(self)
        moved.model = copy.deepcopy(self.model).to(dtype)
        if self.inputs.is_floating_point():
            moved.inputs = self.inputs.to(dtype)
        return moved

    def loss(self):
        outputs = self.model(self.inputs)
        return F.cross_entropy(outputs if outputs.dtype == torch.float64 else outputs.float(), self.target)

    def autocast_loss(self):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.model(self.inputs)
        return F.cross_entropy(outputs.float(), self.target)

    def dense(self):
        """(P, P) float64, by torch's own double differentiation of a function of the flat vector."""
        double = self.to(torch.float64)
        names, params = zip(*double.model.named_parameters(), strict=True)

        def of_flat(flat):
            parts = flat.split([p.numel() for p in params])
            own = {n: part.view(p.shape) for n, part, p in zip(names, parts, params, strict=True)}
            return F.cross_entropy(functional_call(double.model, own, (double.inputs,)), self.target)

        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(of_flat, torch.cat([p.detach().reshape(-1) for p in params]))


def directions(matrix, count=12):
    """Random unit vectors and the eigenvectors of both ends, as columns."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(len(matrix), count, generator=generator, dtype=torch.float64)
    ends = torch.linalg.eigh(matrix).eigenvectors[:, [0, -2, -1]]
    return torch.cat([random / random.norm(dim=0), ends], dim=1)


def error_of(H, matrix, V):
    """The largest error of a product with a unit vector."""
    return float(((H @ V.to(H.dtype)).double() - matrix @ V).norm(dim=0).max())
