"""Eight threads at once, each with its own calls of the loss, operators and trackers: as one after the other.

python tests/robustness/eight_threads.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from dynloss_ext import EigenTracker, HessianOperator, Oscillation, PerceptronEnsemble, dynamic_cross_entropy

THREADS = 8


def work(seed: int, rounds: int = 5) -> list[torch.Tensor]:
    """All that a thread computes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(30) % 3
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 8), (8,), (8, 3), (3,))]
    params = [w.requires_grad_() for w in weights]
    oscillation, tracker, results = Oscillation(3, 9, 10), EigenTracker(k=2, seed=seed), []
    many = PerceptronEnsemble(x, y, oscillation.expand(4), hidden=5, lr=0.1, seeds=range(seed, seed + 4))
    for step in range(rounds):
        w1, b1, w2, b2 = params
        loss = dynamic_cross_entropy(torch.tanh(x @ w1 + b1) @ w2 + b2, y, SHARED, step)
        H = HessianOperator(loss, params)
        results += [loss.detach(), tracker.update(H).values, *H.gradients]
        with torch.no_grad():
            for p, gradient in zip(params, H.gradients, strict=True):
                p -= 0.1 * gradient
        many.train(3)
        results += [many.eigenvalues(1).values]
    return [result.clone() for result in results]


SHARED = Oscillation(3, 9, 10)  # by all threads


def at_once() -> list[list[torch.Tensor]]:
    """What each thread computes; they begin together."""
    barrier = Barrier(THREADS)

    def begin(seed: int) -> list[torch.Tensor]:
        barrier.wait(60)
        return work(seed)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def main() -> None:
    torch.set_num_threads(1)
    together = at_once()
    for seed, results in enumerate(together):
        for ours, alone in zip(results, work(seed), strict=True):
            assert torch.equal(ours, alone), seed
    print(f"{THREADS} threads compute what one does")


if __name__ == "__main__":
    main()
