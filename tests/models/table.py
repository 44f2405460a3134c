"""Writes README.md beside it: every model of the zoo by every measure of curvature, and by the peers that are there.

python tests/models/table.py
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.cells import MEASURES, Reference, cell
from models.zoo import CASES, Case, make

INTRODUCTION = """# Models of strangers

Written by `python tests/models/table.py`; `pytest tests/models` checks the same cells. Each model is small, in float64,
and compared with a reference that uses no second derivative of torch's: central differences of gradients for the
Hessian, per-sample gradients for the Gauss-Newton matrix and the kernel.

- **✓**: right to 1e-6 of the largest eigenvalue (bfloat16 autocast: 0.05; Llama, whose norms are computed in float32:
  1e-3). Hessian: the matrix and the eigenvalues of `eigsh`; tracker: those of `EigenTracker`; density: the outermost
  nodes of `spectral_density`.
- **By differences** (`HessianOperator.from_gradients`): the largest error of a product with a unit vector of the axes
  and, in brackets, the noise that the operator says its products have, both relative to the largest eigenvalue. The
  error is that against the recorded Hessian where that is right, and where it is refused against differences of sixth
  order, and at most 4 times the noise; of bfloat16 and Llama against the reference, whose own differences are of
  second order. "noise" is an error above the tolerance, but not above twice that noise. Four cells are refused here,
  too, as there is no matrix to be right about. BatchNorm in train mode, in batches: the loss of all samples is no sum
  over batches. `spectral_norm` in train mode: every pass changes its buffers, the gradient holds them constant and so
  is that of no function; its differences are not symmetric. A layer under `no_grad`, or in a reentrant checkpoint:
  its parameters move the loss and have no gradient, so that rows of the matrix are missing, where 0 would be wrong.
- **refused**, with the number of the message below.
- Nothing is wrong and silent: that would be a failed test.

The peers are asked for the largest eigenvalue (PyHessian: in magnitude) of the same Hessian, by their own product, and
called as their documentation shows; right means 1e-3 for PyHessian, whose power iteration stops there, and 1e-5 for the
others. PyHessian puts the model in eval mode. Where there is an error, it is torch's or Python's own.
"""


def pyhessian(case: Case, reference: Tensor) -> float:
    import pyhessian as peer

    kinds = {"maxIter": 1000, "tol": 1e-8, "top_n": 1}
    own = peer.hessian(case.model, case.criterion, data=(case.inputs, case.target), cuda=False)
    values = torch.linalg.eigvalsh(reference)
    return relative_gap(own.eigenvalues(**kinds)[0][0], values[values.abs().argmax()])


class Mean(torch.nn.Module):
    """The criterion, as curvlinops wants it."""

    reduction = "mean"

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.of = case.criterion

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.of(outputs, target)


def curvlinops(case: Case, reference: Tensor) -> float:
    from curvlinops import HessianLinearOperator

    params = [p for p in case.model.parameters() if p.requires_grad]
    own = HessianLinearOperator(case.model, Mean(case), params, [(case.inputs, case.target)])
    dense = own @ torch.eye(len(reference), dtype=case.dtype)
    return relative_gap(torch.linalg.eigvalsh((dense + dense.T) / 2)[-1], torch.linalg.eigvalsh(reference)[-1])


def eigenthings(case: Case, reference: Tensor) -> float:
    from hessian_eigenthings import HessianOperator

    def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return case.criterion(model(batch[0]), batch[1])

    own = HessianOperator(case.model, [(case.inputs, case.target)], loss)
    dense = torch.stack([own.matvec(row) for row in torch.eye(len(reference), dtype=case.dtype)])
    return relative_gap(torch.linalg.eigvalsh((dense + dense.T) / 2)[-1], torch.linalg.eigvalsh(reference)[-1])


def relative_gap(found: Tensor | float, expected: Tensor) -> float:
    return abs(float(found) - float(expected)) / abs(float(expected))


PEERS: dict[str, tuple[str, Callable[[Case, Tensor], float], float]] = {
    "PyHessian": ("pyhessian", pyhessian, 1e-3),
    "hessian-eigenthings": ("hessian-eigenthings", eigenthings, 1e-5),
    "curvlinops": ("curvlinops-for-pytorch", curvlinops, 1e-5),
}


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def of_peer(name: str, peer: str) -> str:
    _, measure, tolerance = PEERS[peer]
    case = make(name)
    if isinstance(case.forward, torch.nn.Module):
        case.model = case.forward
    elif case.forward is not None:
        case.model.forward = case.forward  # type: ignore[method-assign]
    if "randomness" in case.refusals.get("all", ""):
        return ""  # there is no right one
    try:
        with case.context():
            error = measure(case, Reference(name).hessian())
    except Exception as refusal:
        return f"{type(refusal).__name__}"
    return "✓" if error <= max(tolerance, case.tolerance) else f"**wrong by {100 * error:.2g} %**"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    peers = [peer for peer, (distribution, *_) in PEERS.items() if version(distribution)]
    header = ["model", *MEASURES, *peers]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    messages: list[str] = []
    for name in CASES:
        cells = []
        for measure in MEASURES:
            answer = cell(name, measure)
            if answer.startswith(("right", "noise")):
                cells.append(answer.replace("right", "✓"))
                continue
            if answer not in messages:
                messages.append(answer)
            cells.append(f"refused {messages.index(answer) + 1}")
        cells += [of_peer(name, peer) for peer in peers]
        lines.append("| " + " | ".join([name, *cells]) + " |")
        print(lines[-1], flush=True)
    notes = [f"{i}. {message.removeprefix('refused: ')}" for i, message in enumerate(messages, 1)]
    versions = [f"torch {torch.__version__.partition('+')[0]}", f"Python {platform.python_version()}"]
    for distribution in ("transformers", "lightning", *(PEERS[peer][0] for peer in peers)):
        versions.append(f"{distribution} {version(distribution)}")
    parts = [
        INTRODUCTION,
        "\n".join(lines),
        "What the refusals say:\n",
        "\n".join(notes),
        f"With {', '.join(versions)}.",
    ]
    Path(__file__).with_name("README.md").write_text("\n".join(part + "\n" for part in parts))


if __name__ == "__main__":
    main()
