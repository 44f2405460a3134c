"""Memory stays flat; forks, workers, threads and the end of the interpreter are no obstacle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from robustness import eight_threads, memory
from torch.utils.data import DataLoader, Dataset

from dynloss_ext import EigenTracker, HessianOperator, Oscillation, dynamic_cross_entropy

OSCILLATION = Oscillation(4, 9, 10)


@pytest.mark.parametrize(("name", "scale"), [(name, 0.02) for name in memory.WORKS])
def test_memory_stays_flat(name: str, scale: float) -> None:
    assert memory.growth(name, scale)["grown_bytes"] < memory.SLACK


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setitem(memory.WORKS, "leak", (lambda count: lambda: kept.append(torch.ones(1 << 17)), 100))
    assert memory.growth("leak", 1.0)["grown_bytes"] > memory.SLACK


def loss_and_curvature(seed: int = 0) -> list[float]:
    """Through the loss, its backward pass, an operator and a tracker."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    loss = dynamic_cross_entropy(x, torch.arange(40) % 4, OSCILLATION, 3)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    values = EigenTracker(k=2).update(HessianOperator(loss, [x])).values
    return [float(loss.detach()), *values.tolist(), float(gradient.sum()), float(gradient.abs().max())]


def test_a_forked_child_computes_the_same() -> None:
    expected = loss_and_curvature()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, repr(loss_and_curvature()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        told = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    assert told == repr(expected)


class _Losses(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(loss_and_curvature(index), dtype=torch.float64)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_the_same(method: str) -> None:
    loader = DataLoader(_Losses(), batch_size=4, num_workers=2, multiprocessing_context=method, timeout=100)
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.stack([_Losses()[i] for i in range(8)]))


def test_eight_threads_compute_what_one_does() -> None:
    for seed, results in enumerate(eight_threads.at_once()):
        for ours, alone in zip(results, eight_threads.work(seed), strict=True):
            assert torch.equal(ours, alone)


EXIT = """
import gc, sys, threading, torch
from dynloss_ext import EigenTracker, HessianOperator, Oscillation, PerceptronEnsemble, dynamic_cross_entropy, eigsh
x = torch.randn(40, 4, requires_grad=True)
loss = dynamic_cross_entropy(x, torch.arange(40) % 4, Oscillation(4, 9, 10), 3)
H, tracker = HessianOperator(loss, [x]), EigenTracker(k=2)
tracker.update(H)
kept = PerceptronEnsemble(torch.randn(10, 2), torch.arange(10) % 3, Oscillation(3, torch.ones(2), 10), hidden=4, lr=0.1)
operator = kept.hessian(0)
def product(v):
    return v if product else None
product.itself = product, H, tracker
result = eigsh(product, 1, n=5)
if sys.argv[1] == "cycle":
    gc.disable()
    class Node: pass
    node = Node(); node.all = node, H, tracker, kept, operator, loss
if sys.argv[1] == "thread":
    threading.Thread(target=lambda: [eigsh(H, 1) for _ in range(100)]).start()
if sys.argv[1] == "error":
    raise SystemExit(0) from RuntimeError(H)
"""


@pytest.mark.parametrize("how", ["plain", "cycle", "thread", "error"])
def test_the_interpreter_ends_with_live_operators(how: str, tmp_path: Path) -> None:
    # Elsewhere, as -c looks for packages where it is started: the sources there would hide an installed one.
    run = subprocess.run([sys.executable, "-c", EXIT, how], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
