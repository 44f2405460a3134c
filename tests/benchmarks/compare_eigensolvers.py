"""Products, time and error of the three largest Hessian eigenvalues, against other solvers, in one run.

    pip install '.[bench]'
    python tests/benchmarks/compare_eigensolvers.py spiral --states 40 --json FILE
    python tests/benchmarks/compare_eigensolvers.py myrtle5 --data DIR --dtype float32 --states 1 --json FILE
    python tests/benchmarks/compare_eigensolvers.py grid --dtype float32 --gap 10 --json FILE

`spiral` follows gradient descent along the paper's spiral experiment; the reference is the dense Hessian. `myrtle5`
takes 300 CIFAR-10 images (random ones without --data) and plain SGD steps; its dense Hessian does not fit, so the
reference is SciPy's ARPACK on the same products, at a tolerance of 1e-12 in float64, and of 1e-5 in float32, where
rounding hides more. `mlp` is a fully connected network on the same images: many parameters, cheap products. SciPy's
solver runs on our cached product, the others on their own. Every solver sees the same states by turns, and times are
medians over them; "warm" ones start from what they found at the last one. --json merges the figures into FILE. `grid`
takes networks of several sizes, with cheap and dear products, and numbers of pairs (eigensolver_grid.py): smallest
times and peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, one_line, write_json
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "python_examples")]
from common.data import Batches, load_cifar10, synthetic_cifar10  # noqa: E402
from common.models import myrtle5  # noqa: E402
from common.spiral import load_initial_values  # noqa: E402
from dynloss_ext import EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy, eigsh  # noqa: E402

K = 3
TOL = 1e-3
PEERS = {"PyHessian": "pyhessian", "hessian-eigenthings": "hessian-eigenthings", "curvlinops": "curvlinops-for-pytorch"}


@dataclass
class Problem:
    """A network under the dynamical loss, and how it moves on."""

    model: nn.Module
    inputs: Tensor
    target: Tensor
    oscillation: Oscillation
    lr: float
    dense: bool
    step: int = 0
    k: int = K
    exact: bool = True  # whether there is a reference; else Ritz values are compared with the best
    params: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.params = list(self.model.parameters())

    def criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        return dynamic_cross_entropy(logits, target, self.oscillation, self.step)

    def hessian(self) -> HessianOperator:
        return HessianOperator(self.criterion(self.model(self.inputs), self.target), self.params)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            gradients = torch.autograd.grad(self.criterion(self.model(self.inputs), self.target), self.params)
            with torch.no_grad():
                for p, g in zip(self.params, gradients, strict=True):
                    p.sub_(g, alpha=self.lr)
            self.step += 1

    def reference(self) -> np.ndarray | None:
        """The eigenvalues as well as they can be had; None where that is not wanted."""
        if not self.exact:
            return None
        H = self.hessian()
        if self.dense:
            matrix = H.to_dense()
            return torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-self.k :].flip(0).cpu().numpy()
        tol = 1e-12 if H.dtype == torch.float64 else 1e-5
        return arpack(lambda x: product_of(H, x), H.shape[0], tol, None, None, self.k)[0]


@dataclass
class Answer:
    values: np.ndarray
    products: int
    miss_probability: float | None = None  # of a solver that looks for what it may have missed
    seconds: float = 0.0
    cpu_seconds: float = 0.0


Solver = Callable[[Problem], Answer]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.calls += 1
        return self.function(*args, **keywords)


def product_of(H: HessianOperator, x: np.ndarray) -> np.ndarray:
    return (H @ torch.from_numpy(x.reshape(-1)).to(H.device, H.dtype)).double().cpu().numpy()


def arpack(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    tol: float,
    ncv: int | None,
    v0: np.ndarray | None,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    import scipy.sparse.linalg

    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype="float64")
    values, vectors = scipy.sparse.linalg.eigsh(operator, k=k, which="LA", tol=tol, ncv=ncv, v0=v0)
    return np.sort(values)[::-1], vectors


def ours_cold(problem: Problem) -> Answer:
    result = eigsh(problem.hessian(), problem.k, tol=TOL)
    return Answer(result.values.numpy(), result.num_hvp, result.miss_probability)


class Tracked:
    """EigenTracker with its defaults: the first update and every twentieth are audited."""

    def __init__(self) -> None:
        self.tracker: EigenTracker | None = None

    def __call__(self, problem: Problem) -> Answer:
        self.tracker = self.tracker or EigenTracker(problem.k, tol=TOL)
        result = self.tracker.update(problem.hessian())
        return Answer(result.values.numpy(), result.num_hvp)


class Scipy:
    """With ncv Lanczos vectors, or as many more than pairs as 8 are than 3."""

    def __init__(self, ncv: int | None, warm: bool) -> None:
        importlib.import_module("scipy")
        self.ncv, self.warm, self.start = ncv, warm, None

    def __call__(self, problem: Problem) -> Answer:
        H = problem.hessian()
        product = Counted(lambda x: product_of(H, x))
        ncv = None if self.ncv is None else max(self.ncv, problem.k + 5)
        values, vectors = arpack(product, H.shape[0], TOL, ncv, self.start, problem.k)
        if self.warm:
            self.start = vectors.sum(1)
        return Answer(values, product.calls)


def pyhessian() -> Solver:
    peer = importlib.import_module("pyhessian.hessian")  # as an attribute of the package it is the class

    def solve(problem: Problem) -> Answer:
        product = Counted(peer.hessian_vector_product)
        original, peer.hessian_vector_product = peer.hessian_vector_product, product
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                data, cuda = (problem.inputs, problem.target), problem.inputs.is_cuda
                computer = peer.hessian(problem.model, problem.criterion, data=data, cuda=cuda)
                values, _ = computer.eigenvalues(top_n=problem.k, tol=TOL)
        finally:
            peer.hessian_vector_product = original
            problem.model.zero_grad(set_to_none=True)  # it leaves gradients with their graphs behind
            problem.model.train()
        return Answer(np.array(values), product.calls)

    return solve


def curvlinops() -> Solver:
    from curvlinops import HessianLinearOperator

    def solve(problem: Problem) -> Answer:
        gamma = problem.oscillation.weights(problem.step)
        mean = float(
            gamma[problem.target.cpu()].mean()
        )  # torch divides by the sum of the weights, the paper by the count
        operator = HessianLinearOperator(
            problem.model,
            nn.CrossEntropyLoss(weight=gamma.to(problem.inputs)),
            problem.params,
            [(problem.inputs, problem.target)],
            check_deterministic=False,
        )
        bridge = operator.to_scipy()
        product = Counted(lambda x: (bridge @ x.reshape(-1).astype(bridge.dtype)).astype(np.float64))
        return Answer(arpack(product, bridge.shape[0], TOL, None, None, problem.k)[0] * mean, product.calls)

    return solve


def eigenthings() -> Solver:
    from hessian_eigenthings import HessianOperator as PeerOperator
    from hessian_eigenthings import lanczos

    def solve(problem: Problem) -> Answer:
        operator = PeerOperator(
            problem.model,
            [(problem.inputs, problem.target)],
            lambda model, batch: problem.criterion(model(batch[0]), batch[1]),
        )
        product = Counted(operator.matvec)
        operator.matvec = product
        values = lanczos(
            operator, k=problem.k, which="LA", tol=TOL, max_iter=max(20, 2 * problem.k), seed=0
        ).eigenvalues
        return Answer(torch.as_tensor(values).double().cpu().sort(descending=True).values.numpy(), product.calls)

    return solve


def contenders() -> dict[str, Solver | None]:
    """None for one that is not installed."""
    makers: dict[str, Callable[[], Solver]] = {
        "EigenTracker (warm)": Tracked,
        "eigsh (cold)": lambda: ours_cold,
        "SciPy (cold)": partial(Scipy, None, False),
        "SciPy (warm)": partial(Scipy, None, True),
        "SciPy ncv=8 (cold)": partial(Scipy, 8, False),
        "SciPy ncv=8 (warm)": partial(Scipy, 8, True),
        **dict(zip(PEERS, (pyhessian, eigenthings, curvlinops), strict=True)),
    }
    found: dict[str, Solver | None] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError:
            found[name] = None
    return found


def spiral(arguments: argparse.Namespace) -> Problem:
    inputs, target, model = load_initial_values(ROOT / "tests/data/spiral_reference_5000.npz")
    options = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    target, oscillation = target.to(arguments.device), Oscillation(3, 70.0, 5000, closed=True)
    return Problem(model.to(**options), inputs.to(**options), target, oscillation, lr=1.0, dense=True)


def images(arguments: argparse.Namespace) -> Problem:
    data = synthetic_cifar10(train_per_class=200) if arguments.data is None else load_cifar10(arguments.data)
    batches = Batches(data.train.subset(10, arguments.images), None, dtype=getattr(torch, arguments.dtype))
    batch = batches.get(0)
    inputs, target = batch.images.to(arguments.device), batch.labels.to(arguments.device)
    if arguments.problem == "myrtle5":
        model: nn.Module = myrtle5(10, width=arguments.width)
    else:
        sizes = [inputs[0].numel(), arguments.width, arguments.width]
        hidden = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))
    return Problem(model.to(inputs), inputs, target, Oscillation(10, 10.0, 100), lr=0.02, dense=False)


def timed(name: str, solve: Solver, problem: Problem) -> Answer:
    begin, begin_cpu = time.perf_counter(), time.process_time()
    answer = solve(problem)
    answer.seconds, answer.cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    print(f"step {problem.step} {name}: {answer.products} products, {answer.cpu_seconds:.3g} s of CPU", file=sys.stderr)
    return answer


def measure(
    problem: Problem,
    solvers: dict[str, Solver | None],
    states: int,
    gap: int,
    warm: int,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """A figure per solver, which `save` gets after every state; one that raises is left out from there on."""
    answers: dict[str, list[Answer]] = {name: [] for name in solvers}
    failed: dict[str, str] = {}
    references: list[np.ndarray | None] = []
    for state in range(warm + states):
        problem.train(gap)
        measured = state >= warm
        if measured:
            references.append(problem.reference())
        turn = state % len(solvers)  # whoever comes first finds the caches as the reference has left them
        for name, solve in [*solvers.items()][turn:] + [*solvers.items()][:turn]:
            if solve is None or name in failed or not (measured or "(warm)" in name):
                continue
            try:
                answer = timed(name, solve, problem)
            except Exception as error:
                failed[name] = one_line(error)
                continue
            if measured:
                answers[name].append(answer)
        if measured:
            save(summarize(answers, failed, references))
    return summarize(answers, failed, references)


def summarize(
    answers: dict[str, list[Answer]], failed: dict[str, str], references: list[np.ndarray | None]
) -> dict[str, Any]:
    """Figures of the solvers from their answers at each state, and those at which each failed.

    Where a state has no reference it is the largest that a solver with full orthogonalization finds: Ritz values are
    lower bounds of the eigenvalues, pair by pair. (Without it values may be found twice, and count for others.)
    """
    found = {name: row for name, row in answers.items() if row and name not in failed}
    bounds = [
        [row[state].values for name, row in found.items() if name not in PEERS] for state in range(len(references))
    ]
    best = [
        np.max(bound, axis=0) if bound and exact is None else exact
        for exact, bound in zip(references, bounds, strict=True)
    ]
    summary: dict[str, Any] = {}
    for name in answers:
        if name not in found:
            summary[name] = {"failed": failed[name]} if name in failed else None
            continue
        row = found[name]
        seconds = [answer.seconds for answer in row]
        errors = [
            np.max(np.abs(answer.values - exact) / np.abs(exact))
            for answer, exact in zip(row, best, strict=True)
            if exact is not None
        ]
        summary[name] = {
            "products": float(np.mean([answer.products for answer in row])),
            "seconds_median": float(np.median(seconds)),
            "seconds_min": min(seconds),
            "cpu_seconds_median": float(np.median([answer.cpu_seconds for answer in row])),
            "worst_error": float(max(errors)) if errors else math.nan,
        }
        missed = [answer.miss_probability for answer in row if answer.miss_probability is not None]
        if missed:
            summary[name]["largest_miss_probability"] = max(missed)
    return summary


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """This thread's CPU time; on a device the time until it has finished."""
    if device.type == "cpu":
        begin = time.thread_time()
        work()
        return time.thread_time() - begin
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def repeat(times: int, work: Callable[[], Any]) -> None:
    for _ in range(times):
        work()


def measure_overhead(problem: Problem, states: int, gap: int) -> dict[str, float]:
    """Time of a tracker's updates beyond that of as many products on a graph as new, state by state.

    Whichever comes second finds the caches warm, so they take turns; the count for the products that come first is
    that of the state before.
    """
    device = problem.inputs.device
    tracker = EigenTracker(K, tol=TOL)
    count = tracker.update(problem.hessian()).num_hvp
    ratios, products, updates = [], [], []
    for state in range(2 * states):
        problem.train(gap)
        seconds = {}
        for kind in ("update", "products") if state % 2 else ("products", "update"):
            H = problem.hessian()
            v = torch.randn(H.shape[0], dtype=H.dtype, device=device)
            if kind == "update":
                seconds[kind] = seconds_of(partial(tracker.update, H), device)
                assert tracker.result is not None
                count = tracker.result.num_hvp
            else:
                seconds[kind] = seconds_of(partial(repeat, count, partial(H.__matmul__, v)), device)
            seconds[kind] /= count
        ratios.append(seconds["update"] / seconds["products"])
        products.append(seconds["products"])
        updates.append(seconds["update"])
    return {
        "overhead_median": float(np.median(ratios)) - 1,
        "product_seconds_median": float(np.median(products)),
        "update_seconds_per_product_median": float(np.median(updates)),
    }


def measure_graph(problem: Problem, update_seconds: float) -> dict[str, float | str]:
    """A product in a CUDA graph, or in one line why there is none, and beside it an update's time per product."""
    try:
        seconds = graphed_product_seconds(problem)
    except Exception as error:
        # The end of a capture that has failed raises another error, which does not know why.
        return {"graphed_product_seconds": one_line(error.__context__ or error)}
    return {"graphed_product_seconds": seconds, "update_over_graphed_products": update_seconds / seconds}


def graphed_product_seconds(problem: Problem, replays: int = 100) -> float:
    """Time of a product that a CUDA graph replays: without the launches, the floor for a small network."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    # A backward pass runs on the stream of the forward pass, but a parameter's last node belongs to the stream on which
    # the parameter was first used, as long as any graph with it is alive; and no other stream may wait for one that is
    # captured. So the parameters are new, too. Also after a capture that fails the stream before is the current one.
    with torch.cuda.stream(stream):
        own = copy.deepcopy(problem)
        gradients = own.hessian().gradients
        vectors = [torch.randn_like(p) for p in own.params]
        for _ in range(3):
            torch.autograd.grad(gradients, own.params, vectors, retain_graph=True)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            torch.autograd.grad(gradients, own.params, vectors, retain_graph=True)
    return seconds_of(partial(repeat, replays, graph.replay), problem.inputs.device) / replays


def versions() -> dict[str, str]:
    found = {}
    for package in ("numpy", "scipy", *PEERS.values()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def show(summary: dict[str, Any]) -> None:
    print(f"{'solver':24}{'products':>10}{'ms':>10}{'ms of CPU':>12}{'worst error':>13}")
    for name, row in summary.items():
        if row is None or "failed" in row:
            print(f"{name:24}{'not installed' if row is None else 'failed':>23}")
            continue
        wall, cpu = 1e3 * row["seconds_median"], 1e3 * row["cpu_seconds_median"]
        print(f"{name:24}{row['products']:>10.2f}{wall:>10.2f}{cpu:>12.2f}{row['worst_error']:>13.1e}")


def add_to_json(path: Path, problem: str, figures: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, known | {problem: figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=("spiral", "myrtle5", "mlp", "grid"))
    parser.add_argument("--states", type=int, help="measured states: 40, of a grid one to three")
    parser.add_argument("--gap", type=int, default=25, help="steps of training from one to the next")
    parser.add_argument("--start", type=int, default=0, help="steps of training before the first")
    parser.add_argument("--warm", type=int, default=1, help="states before, which only the warm solvers see")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**n for n in range(3, 8)], help="of a grid")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 3, 10, 30], help="of a grid")
    parser.add_argument("--products", nargs="+", choices=("cheap", "dear"), default=["cheap", "dear"], help="of a grid")
    parser.add_argument("--without", nargs="+", default=[], metavar="SOLVER", help="leave these out of a grid")
    parser.add_argument("--json", type=Path, help="a grid goes on with what it has")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_dtype(getattr(torch, arguments.dtype))  # PyHessian draws its vectors in it
    warnings.simplefilter("ignore")

    figures: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(arguments).items() if name not in ("json", "data")},
        "machine": machine(arguments.device)
        | {"cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": versions()},
        "solvers": {},
    }

    if arguments.problem == "grid":
        eigensolver_grid = importlib.import_module("eigensolver_grid")  # beside this script
        return eigensolver_grid.run(sys.modules[__name__], arguments, figures)
    arguments.states = arguments.states or 40
    problem = spiral(arguments) if arguments.problem == "spiral" else images(arguments)
    problem.train(arguments.start)
    # First: ours is not to be lost with a peer. On a copy, so that the states of the comparison stay the same.
    driver: dict[str, Any] = dict(measure_overhead(copy.deepcopy(problem), arguments.states, min(arguments.gap, 5)))
    figures |= {"parameters": sum(p.numel() for p in problem.params), "driver": driver}

    def save(summary: dict[str, Any]) -> None:
        figures["solvers"] = summary
        if arguments.json:
            add_to_json(arguments.json, arguments.problem, figures)

    save({})
    summary = measure(problem, contenders(), arguments.states, arguments.gap, arguments.warm, save)
    show(summary)
    failed = [
        name for name, row in summary.items() if name.startswith(("EigenTracker", "eigsh")) and "failed" in (row or {})
    ]
    print("driver beyond its products: {overhead_median:.1%} of them".format(**driver))
    if arguments.device == "cuda":
        # Last: a capture that fails leaves torch's random numbers and its allocator in a state that is none.
        driver |= measure_graph(problem, driver["update_seconds_per_product_median"])
        save(summary)
        if ratio := driver.get("update_over_graphed_products"):
            print(f"an update takes {ratio:.2f} times its products in a CUDA graph")
        else:
            failed.append(f"a product in a CUDA graph: {driver['graphed_product_seconds']}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
