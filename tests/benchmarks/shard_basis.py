"""Eigenvalues of a transformer that `fully_shard` cuts over processes: time, memory and messages.

    python tests/benchmarks/shard_basis.py --processes 4 --max-hvp 40 --json FILE

Processes share this machine and talk by gloo on 127.0.0.1. The eigenvalues of the whole model, by recorded products of
one process, stand beside theirs, and one product with the same vector.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import machine, write_json
from torch import nn
from torch.nn.functional import cross_entropy

from dynloss_ext import HessianOperator, eigsh

VOCABULARY, WIDTH, LAYERS, TOKENS, SEQUENCES = 1000, 320, 4, 16, 4
K, BASIS, TOLERANCE = 1, 8, 0.05


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 8, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).flatten(0, 1)


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The model, tokens of shape (sequences, tokens) and the next ones."""
    torch.manual_seed(0)
    model = Transformer().double()
    tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1))
    return model, tokens[:, :-1], tokens[:, 1:]


def direction(size: int) -> torch.Tensor:
    """A random unit vector, the same in all processes."""
    v = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return v / v.norm()


def alone(product: torch.Tensor) -> dict[str, Any]:
    """Of the whole model: its eigenvalue, and how far from its product the given one is, relative to its length."""
    model, x, y = problem()
    H = HessianOperator(lambda: cross_entropy(model(x), y.flatten()), model.parameters())
    start = time.perf_counter()
    result = eigsh(H, K, tol=TOLERANCE)
    seconds = time.perf_counter() - start
    exact = H @ direction(H.shape[0])
    return {
        "values": result.values.tolist(),
        "status": result.status,
        "seconds": seconds,
        "product_length": float(exact.norm()),
        "product_error": float((product - exact).norm()),
    }


def work(rank: int, processes: int, port: int, max_hvp: int, file: Path, answers: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=120),
    )
    model, x, y = problem()
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = slice(rank * SEQUENCES // processes, (rank + 1) * SEQUENCES // processes)
    gradients, messages, original = 0, [], dist.all_reduce

    def closure() -> torch.Tensor:
        nonlocal gradients
        gradients += 1
        return cross_entropy(model(x[rows]), y[rows].flatten())

    def counting(numbers: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        messages.append(numbers.nbytes)
        return original(numbers, *args, **kwargs)

    dist.all_reduce = counting
    start = time.perf_counter()
    H = HessianOperator.from_gradients(closure, model.parameters())
    made, made_gradients, made_messages = time.perf_counter() - start, gradients, len(messages)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del messages[:]
    start = time.perf_counter()
    result = eigsh(H, K, tol=TOLERANCE, max_basis=BASIS, max_hvp=max_hvp)
    seconds = time.perf_counter() - start
    entries, used, sent = result.vectors.shape[0], gradients, len(messages)
    peak_searched = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    product = H @ direction(H.shape[0])
    if rank == 0:
        torch.save(product, file)
    answers.put(
        {
            "rank": rank,
            "entries": entries,
            "basis_bytes": 2 * BASIS * entries * result.vectors.element_size(),
            "peak_bytes_when_made": peak,
            "peak_bytes": peak_searched,
            "seconds_to_make": made,
            "gradients_to_make": made_gradients,
            "messages_to_make": made_messages,
            "num_hvp": result.num_hvp,
            "gradients_per_product": (used - made_gradients) / result.num_hvp,
            "seconds_per_product": seconds / result.num_hvp,
            "messages_per_product": sent / result.num_hvp,
            "largest_message_bytes": max(messages[:sent]),
            "values": result.values.tolist(),
            "residuals": result.residuals.tolist(),
            "noise": H.noise,
            "status": result.status,
        }
    )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--max-hvp", type=int, default=40)
    parser.add_argument("--json", type=Path, help="to write to; else the figures are printed")
    options = parser.parse_args()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.Queue()
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "product.pt"
    arguments = (options.processes, port, options.max_hvp, file, answers)
    processes = [
        context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(options.processes)
    ]
    for process in processes:
        process.start()
    try:
        found = sorted((answers.get(timeout=900) for _ in processes), key=lambda answer: answer["rank"])
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    for answer in found:
        assert answer["values"] == found[0]["values"]
    torch.set_num_threads(1)
    report = {
        "started": started,
        "machine": machine() | {"cores": os.cpu_count()},
        "parameters": sum(answer["entries"] for answer in found),
        "whole": alone(torch.load(file)),
        "processes": found,
    }
    if options.json:
        write_json(options.json, report)
    else:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
