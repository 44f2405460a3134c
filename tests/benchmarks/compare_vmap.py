"""Times a training step of `ModuleEnsemble` under vmap and with its members one after another, for Myrtle5s by width.

    python tests/benchmarks/compare_vmap.py --json FILE

By turns, the smallest counts: milliseconds of one thread for a step of all members on random images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_examples"))

from common.models import myrtle5
from dynloss_ext import ModuleEnsemble, Oscillation

#: Members, width and images.
CASES = ((16, 4, 20), (8, 8, 60), (4, 16, 60), (4, 32, 60))


def measure(members: int, width: int, samples: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    images, labels = torch.randn(samples, 3, 32, 32), torch.arange(samples) % 10
    modules = [myrtle5(width=width, seed=seed) for seed in range(members)]
    ensembles = {
        name: ModuleEnsemble(modules, Oscillation(10, 10.0, 100), lr=0.01, vmap=vmap)
        for name, vmap in (("vmap", True), ("one by one", False))
    }
    seconds: dict[str, list[float]] = {name: [] for name in ensembles}
    for _ in range(rounds + 1):
        for name, ensemble in ensembles.items():
            begin = time.perf_counter()
            ensemble.train(images, labels, 2, record_every=3)
            seconds[name].append((time.perf_counter() - begin) / 2)
    times = {name: 1e3 * min(of[1:]) for name, of in seconds.items()}  # the first round warms up
    return {"members": members, "width": width, "samples": samples, "milliseconds": times}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "results": []}
    for case in CASES:
        results["results"].append(measure(*case, options.rounds))
        print(results["results"][-1])
    if options.json:
        write_json(options.json, results)
    return results


if __name__ == "__main__":
    main()
