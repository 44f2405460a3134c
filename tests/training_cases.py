"""A small network, trained on the dynamical loss."""

import torch
from cross_entropy_cases import labels, normal
from torch import nn

from dynloss_ext import Oscillation, reference

OSCILLATION = Oscillation(4, 9, 10, class_order=[2, 0, 3, 1], stop_step=500)


def model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def train(criterion, steps=12, network=None, wrap=lambda m: m):
    network = wrap(network or model())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    x, y = normal(20, 3), labels(4, 20)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(network(x), y)
        loss.backward()
        optimizer.step()
        criterion.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def expected_losses(steps=12, **options):
    """The same loop with the twin."""
    network, losses = model(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    x, y = normal(20, 3), labels(4, 20)
    for step in range(steps):
        optimizer.zero_grad()
        loss = reference.cross_entropy(network(x), y, OSCILLATION, step, **options)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
