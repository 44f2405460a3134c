"""Trainings and sweeps that are killed at random moments, and go on: equal to the undisturbed ones bit for bit.

    cd tests && python -m robustness.killed --trainings 200 --sweeps 50 --out robustness/results/killed.json

Each is a process forked from a warm one, killed by SIGKILL at a random moment of its life, once or several times in a
row, and then resumed to the end. What had ended before it was killed is not counted, and another one is begun.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.append(str(Path(__file__).parents[2] / "python_examples"))
from robustness.record import publish

import phase_diagram
import spiral_mlp
from common.run import RunFolder

for late in ("scipy.stats", "torch._dynamo"):  # what the scripts import late would take most of a child's life
    importlib.import_module(late)

SECONDS = 120.0  # for one process: nothing here takes as long
TRAINING = [
    *("--steps", "3000", "--width", "10", "--points", "20", "--period", "150", "--stop-step", "2500"),
    *("--eig-every", "250", "--checkpoint-every", "500"),
]
AUTOGRAD = [
    *("--steps", "1200", "--width", "6", "--points", "10", "--period", "90", "--eig-every", "300"),
    *("--checkpoint-every", "500", "--engine", "autograd", "--ntk", "--density-every", "600"),
]
SWEEP = [
    *("--steps", "300", "--points", "10", "--amplitudes", "1", "5", "--periods", "10", "30", "--seeds", "3"),
    *("--chunk-members", "2", "--measure", "all"),
]


@dataclass(frozen=True)
class Work:
    """A script with its options, what it leaves, and whether it has to be told to resume."""

    main: Callable[[Sequence[str]], Any]
    options: Sequence[str]
    result: Callable[[Path], dict[str, Any]]
    resumes: bool

    def run(self, folder: Path, after: float | None = None) -> bool:
        """In a process of its own, killed after so many seconds; whether that was before it ended.

        Raises:
            RuntimeError: it ended by itself, and not well.
        """
        child = os.fork()
        if child == 0:
            self._in_child(folder)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError((folder.parent / "stderr").read_text()[-2000:])
        return code == -signal.SIGKILL

    def _in_child(self, folder: Path) -> None:
        code = 1
        try:
            torch.set_num_threads(1)  # GNU's OpenMP has no threads in a fork of a process that has used them, and waits
            # Drawing would take most of the time.
            spiral_mlp.trajectory = lambda *arguments, **options: None
            RunFolder.write_figure = lambda run, figure, name="figure.png", dpi=0: run._write(name, b"drawn")
            signal.alarm(round(SECONDS))
            for stream, name in ((1, os.devnull), (2, folder.parent / "stderr")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            resume = ["--resume"] if self.resumes and (folder / "config.json").exists() else []
            self.main([*self.options, "--out", str(folder), *resume])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _of_training(folder: Path) -> dict[str, Any]:
    """All that a run leaves but its times."""
    run = RunFolder(folder)
    metrics = {name: values for name, values in run.read_metrics().items() if "seconds" not in name}
    summary = {name: value for name, value in run.read_summary().items() if "seconds" not in name}
    return {"metrics": metrics, "summary": summary, "state": _plain(run.read_checkpoint())}


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {str(name): _plain(value) for name, value in state.items() if "seconds" not in str(name)}
    if isinstance(state, (list, tuple)):
        return [_plain(value) for value in state]
    return state.numpy() if isinstance(state, torch.Tensor) else state


def _of_sweep(folder: Path) -> dict[str, Any]:
    return {"table": pq.read_table(folder / "table.parquet").to_pylist(), "summary": RunFolder(folder).read_summary()}


WORKS = {
    "training": Work(spiral_mlp.main, TRAINING, _of_training, True),
    "training by autograd": Work(spiral_mlp.main, AUTOGRAD, _of_training, True),
    "sweep": Work(phase_diagram.main, SWEEP, _of_sweep, False),
}


def difference(ours: Any, theirs: Any, place: str = "") -> str:
    """The first place in which they differ by a bit; empty where there is none."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return next(filter(None, (difference(ours[k], theirs[k], f"{place}/{k}") for k in ours)), "")
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{place}/{i}") for i, (a, b) in pairs)), "")
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    else:
        same = type(ours) is type(theirs) and repr(ours) == repr(theirs)
    return "" if same else f"{place}: {ours!r:.200} instead of {theirs!r:.200}"


def kill_and_resume(name: str, times: int, seed: int, seconds: float = 600.0) -> dict[str, Any]:
    """So often; what came out, with every difference."""
    work, rng, end = WORKS[name], random.Random(f"{name} {seed}"), time.monotonic() + seconds
    faults: list[str] = []
    kills = begun = resumed = on_disk = 0
    with tempfile.TemporaryDirectory() as scratch:
        lifetimes = []
        for whole in (Path(scratch) / "first" / "run", Path(scratch) / "second" / "run"):  # the first one warms up
            whole.parent.mkdir()
            began = time.monotonic()
            work.run(whole)
            lifetimes.append(time.monotonic() - began)
        expected, lifetime = work.result(whole), lifetimes[-1]
        while resumed < times and time.monotonic() < end:
            folder = Path(scratch) / str(begun) / "run"
            folder.parent.mkdir()
            begun += 1
            try:
                killed = [work.run(folder, rng.uniform(0, lifetime)) for _ in range(rng.choice((1, 1, 2, 3)))]
                if not killed[-1]:
                    continue
                kills += sum(killed)
                on_disk += folder.exists() and any(folder.iterdir())
                work.run(folder)
                found = difference(work.result(folder), expected)
            except (RuntimeError, OSError, ValueError) as error:
                found = f"{type(error).__name__}: {error}"
            resumed += 1
            if found:
                faults.append(f"{name} {begun}: {found}")
    return {
        "begun": begun,
        "resumed": resumed,
        "kills": kills,
        "with_files_when_resumed": on_disk,
        "seconds_each": round(lifetime, 1),
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--sweeps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3600, help="stop each kind after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = {
        "training": options.trainings // 2,
        "training by autograd": options.trainings // 2,
        "sweep": options.sweeps,
    }
    works = {name: kill_and_resume(name, times, 1, options.seconds) for name, times in counts.items()}
    command = f"python -m robustness.killed --trainings {options.trainings} --sweeps {options.sweeps}"
    publish(options.out, command, works=works)
    if any(work["faults"] for work in works.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
