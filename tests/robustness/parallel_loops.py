"""Every parallel loop of the CPU code, by four threads: as by one.

python tests/robustness/parallel_loops.py [race]

For ThreadSanitizer, with gomp_threads.cpp; with `race` only what it has to find.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import torch

from dynloss_ext import HessianOperator, Oscillation, PerceptronEnsemble, dynamic_cross_entropy, eigsh, trace

THREADS = 4


def losses() -> Iterator[torch.Tensor]:
    """Values and derivatives of large batches, in several layouts; of single networks and of many at once."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((4096, 40), (40_000, 3), (8, 2000), (16, 12, 40, 40)):
            x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            y = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
            for target in (y, torch.rand(shape, generator=generator).to(dtype)):
                loss = dynamic_cross_entropy(x, target, Oscillation(shape[1], 9, 10), 3)
                (g,) = torch.autograd.grad(loss, x, create_graph=True)
                yield from (loss, g, *torch.autograd.grad(g, x, torch.ones_like(x)))


def ensembles() -> Iterator[torch.Tensor]:
    """Steps and eigenvalues of members that threads share out."""
    generator = torch.Generator().manual_seed(0)
    for dtype, inputs, classes in ((torch.float32, 2, 3), (torch.float64, 2, 3), (torch.float64, 5, 4)):
        x = torch.randn(60, inputs, generator=generator).to(dtype)
        many = PerceptronEnsemble(
            x, torch.arange(60) % classes, Oscillation(classes, 9, 10).expand(16), hidden=9, lr=0.1, seeds=range(16)
        )
        many.train(3)
        yield from many.parameters.values()
        yield many.eigenvalues(2).values


def spectra() -> Iterator[torch.Tensor]:
    """Of a network whose vectors threads share out."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(60, 2000), torch.nn.Tanh(), torch.nn.Linear(2000, 10))
    x, y = torch.randn(8, 60), torch.arange(8)
    H = HessianOperator(dynamic_cross_entropy(model(x), y, Oscillation(10, 9, 10), 3), model.parameters())
    yield eigsh(H, 4, tol=1e-3, max_basis=10).values
    yield torch.tensor(trace(H, method="hutchinson", num_probes=2).value)


def computed(threads: int) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    return [result.detach().clone() for made in (losses(), ensembles(), spectra()) for result in made]


def main() -> None:
    if sys.argv[1:] == ["race"]:
        ctypes.CDLL(None).race_on_purpose()
        print("a race that nobody saw")
        return
    together, alone = computed(THREADS), computed(1)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)
    print(f"{THREADS} threads compute what one does, {len(alone)} times")


if __name__ == "__main__":
    main()
