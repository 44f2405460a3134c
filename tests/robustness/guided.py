"""The readers of `readers.py` on inputs that a fuzzer looks for: those that take a new way through the Python code.

    cd tests && python -m robustness.guided --runs 20000 --out robustness/results/guided.json

Needs `pip install atheris` (Python 3.11 and 3.12). What counts as a fault is as in `readers.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import atheris

sys.path.append(str(Path(__file__).parents[2] / "python_examples"))
with atheris.instrument_imports(
    include=["common", "prepare_cifar10", "phase_diagram", "spiral_mlp", "dynloss_ext.loss", "dynloss_ext.oscillation"]
):
    from robustness import readers
from robustness.fuzzing import Reading, Target
from robustness.record import publish


def _fuzz(target: Target, folder: Path, runs: int, seconds: int) -> None:
    """Never returns. A line a fault, and one a hundred inputs, into folder/log."""
    reading = Reading(target, folder)
    corpus, log = folder / "corpus", (folder / "log").open("w")
    corpus.mkdir()
    for i, file in enumerate(reading.files):
        (corpus / file.name).write_bytes(bytes([i]) + reading.good[file])
    done = 0

    def read(data: bytes) -> None:
        nonlocal done
        done += 1
        if data:
            file = reading.files[data[0] % len(reading.files)]
            for what in reading.faults(file, data[1:], forged=data[1:] == reading.good[file]):
                log.write(json.dumps([data.hex(), what]) + "\n")
        if done % 100 == 0 or done == runs:
            log.write(json.dumps([done]) + "\n")
            log.flush()

    longest = 2 * max(map(len, reading.good.values()))
    options = [f"-runs={runs}", f"-max_total_time={seconds}", f"-max_len={longest}", "-seed=1", "-rss_limit_mb=0"]
    atheris.Setup(["guided", str(corpus), *options, "-verbosity=0", f"-artifact_prefix={folder}/"], read)
    atheris.Fuzz()


def fuzz(target: Target, runs: int, seconds: int) -> tuple[int, list[str]]:
    """How many inputs were read, and what was wrong with some."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                _fuzz(target, folder, runs, seconds)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        lines: list[Any] = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    finally:
        shutil.rmtree(folder)
    faults = [f"{target.name}: {line[1]}: {line[0][:400]}" for line in lines if len(line) == 2]
    if os.waitstatus_to_exitcode(status) != 0:
        faults.append(f"{target.name}: ended the process: status {status}")
    return max([line[0] for line in lines if len(line) == 1], default=0), faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20_000, help="inputs for each reader")
    parser.add_argument("--seconds", type=int, default=120, help="stop each after so long")
    parser.add_argument("--only", default="", help="readers whose name holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    readers.torch.set_num_threads(1)
    faults: list[str] = []
    read: dict[str, int] = {}
    began = time.monotonic()
    for target in readers.ALL:
        if options.only in target.name:
            read[target.name], found = fuzz(target, options.runs, options.seconds)
            print(target.name, read[target.name], found, flush=True)
            faults += found
    publish(
        options.out,
        f"python -m robustness.guided --runs {options.runs}",
        seconds=round(time.monotonic() - began),
        inputs=sum(read.values()),
        faults=faults,
        by_reader=read,
    )
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
