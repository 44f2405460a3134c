"""Products, time and error of the three largest Hessian eigenvalues along the spiral, against other solvers.

    python tests/benchmarks/compare_eigensolvers.py --states 60 --gap 25 --json FILE

Every solver sees the same states by turns. SciPy's runs on the same cached product; PyHessian, hessian-eigenthings and
curvlinops on their own, where they are installed. Errors are relative to eigenvalues of the dense Hessian.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from curvature_problems import Spiral

from dynloss_ext import EigenTracker, HessianOperator, dynamic_cross_entropy, eigsh

Answer = tuple[np.ndarray, int | None]
TOL = 1e-3


class Network(nn.Module):
    """The spiral's network as a module, for the peers that want one; shares the parameters' values."""

    def __init__(self, spiral: Spiral) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in spiral.params])

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.weights
        return torch.relu(x @ w1 + b1) @ w2 + b2


class Contenders:
    """name -> a function of the state that gives the eigenvalues and the number of products."""

    def __init__(self) -> None:
        self.tracker = EigenTracker(3, tol=TOL)
        self.start: dict[int | None, np.ndarray] = {}

    def ours_cold(self, spiral: Spiral) -> Answer:
        result = eigsh(HessianOperator(spiral.loss(), spiral.params), 3, tol=TOL)
        return result.values.numpy(), result.num_hvp

    def ours_tracked(self, spiral: Spiral) -> Answer:
        result = self.tracker.update(HessianOperator(spiral.loss(), spiral.params))
        return result.values.numpy(), result.num_hvp

    def scipy(self, spiral: Spiral, ncv: int | None, warm: bool) -> Answer:
        H = HessianOperator(spiral.loss(), spiral.params)
        products = 0

        def product(x: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            return (H @ torch.from_numpy(x.reshape(-1))).numpy()

        operator = LinearOperator(H.shape, matvec=product, dtype="float64")
        v0 = self.start.get(ncv) if warm else None
        values, vectors = scipy_eigsh(operator, k=3, which="LA", tol=TOL, ncv=ncv, v0=v0)
        if warm:
            self.start[ncv] = vectors.sum(1)
        return np.sort(values)[::-1], products

    def all(self) -> dict[str, Callable[[Spiral], Answer]]:
        def scipy(ncv: int | None, warm: bool) -> Callable[[Spiral], Answer]:
            return lambda spiral: self.scipy(spiral, ncv, warm)

        found: dict[str, Callable[[Spiral], Answer]] = {
            "EigenTracker": self.ours_tracked,
            "eigsh, cold": self.ours_cold,
            "scipy, cold": scipy(None, False),
            "scipy, warm": scipy(None, True),
            "scipy ncv=8, cold": scipy(8, False),
            "scipy ncv=8, warm": scipy(8, True),
        }
        for name, peer in (("PyHessian", pyhessian), ("curvlinops", curvlinops), ("hessian-eigenthings", eigenthings)):
            try:
                found[name] = peer()
            except ImportError:
                print(f"{name} is not installed: left out")
        return found


def criterion(spiral: Spiral) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, target: dynamic_cross_entropy(logits, target, spiral.oscillation, spiral.step)


def pyhessian() -> Callable[[Spiral], Answer]:
    from pyhessian import hessian

    def solve(spiral: Spiral) -> Answer:
        with contextlib.redirect_stdout(io.StringIO()):
            computer = hessian(Network(spiral), criterion(spiral), data=(spiral.X, spiral.y), cuda=False)
            values, _ = computer.eigenvalues(top_n=3, tol=TOL)
        return np.array(values), None

    return solve


def curvlinops() -> Callable[[Spiral], Answer]:
    from curvlinops import HessianLinearOperator

    def solve(spiral: Spiral) -> Answer:
        model = Network(spiral)
        gamma = spiral.oscillation.weights(spiral.step)
        mean = float(gamma[spiral.y].mean())  # torch divides by the sum of the weights, the paper by the count
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(weight=gamma), list(model.parameters()), [(spiral.X, spiral.y)]
        )
        bridge = operator.to_scipy()
        products = 0

        def product(x: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            return bridge @ x.reshape(-1)

        counted = LinearOperator(bridge.shape, matvec=product, dtype="float64")
        values = scipy_eigsh(counted, k=3, which="LA", tol=TOL, return_eigenvectors=False)
        return np.sort(values)[::-1] * mean, products

    return solve


def eigenthings() -> Callable[[Spiral], Answer]:
    from hessian_eigenthings import HessianOperator as PeerOperator
    from hessian_eigenthings import lanczos

    def solve(spiral: Spiral) -> Answer:
        loss = criterion(spiral)
        operator = PeerOperator(
            Network(spiral), [(spiral.X, spiral.y)], lambda model, batch: loss(model(batch[0]), batch[1])
        )
        product, products = operator.matvec, 0

        def counting(v: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return product(v)

        operator.matvec = counting
        values = lanczos(operator, k=3, which="LA", tol=TOL, max_iter=20, seed=0).eigenvalues
        return np.sort(np.asarray(values))[::-1], products

    return solve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=40)
    parser.add_argument("--gap", type=int, default=25, help="steps of training between states")
    parser.add_argument("--start", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    spiral = Spiral()
    while spiral.step < arguments.start:
        spiral.train()
    contenders = Contenders().all()
    rows: dict[str, list[tuple[float, float | None, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.states):
        for _ in range(arguments.gap):
            spiral.train()
        dense = HessianOperator(spiral.loss(), spiral.params).to_dense()
        exact = torch.linalg.eigvalsh((dense + dense.T) / 2)[-3:].flip(0).numpy()
        for name, solve in contenders.items():
            begin = time.perf_counter()
            values, products = solve(spiral)
            seconds = time.perf_counter() - begin
            rows[name].append((seconds, products, float(np.max(np.abs(values - exact) / np.abs(exact)))))
    summary: dict[str, Any] = {}
    print(f"{'solver':22}{'products':>10}{'ms (median)':>13}{'worst error':>13}")
    for name, row in rows.items():
        seconds, products, errors = zip(*row, strict=True)
        mean = None if products[0] is None else float(np.mean(products))
        summary[name] = {"products": mean, "milliseconds": 1e3 * float(np.median(seconds)), "error": max(errors)}
        shown = "-" if mean is None else f"{mean:.2f}"
        print(f"{name:22}{shown:>10}{summary[name]['milliseconds']:>13.2f}{max(errors):>13.1e}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
