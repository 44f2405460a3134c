"""Every reader of files, on files that are damaged, forged or hostile.

    cd tests && python -m robustness.readers --cases 1000000 --out robustness/results/readers.json

Each input is read right or refused by the documented error, whose message says what was expected and what there is;
nothing else: no other exception, no crash, no hang, no memory beyond reason, and no code of the input runs. The file
is written after each round, and one of the same command is gone on with; remove it after a mend.
"""

from __future__ import annotations

import argparse
import bz2
import functools
import gzip
import io
import json
import lzma
import pickle
import random
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.append(str(Path(__file__).parents[2] / "python_examples"))
from robustness.forgeries import bombs, hostile, laughs, npz, odd_array, oddity, other_json
from robustness.fuzzing import Target, damaged, fuzz, shared_out
from robustness.record import publish

import phase_diagram
import spiral_mlp
from common import data, records, run, spiral, sweep
from dynloss_ext import DynamicCrossEntropyLoss, Oscillation

# ---- CIFAR-10

_NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def _table(seed: int) -> Any:
    table = np.random.default_rng(seed).integers(0, 256, (1, data.RECORD_BYTES), np.uint8)
    table[:, 0] = seed % 10
    return table


def _write_binary(folder: Path) -> list[Path]:
    for seed, name in enumerate(_NAMES):
        (folder / f"{name}.bin").write_bytes(_table(seed).tobytes())
    return [folder / f"{name}.bin" for name in _NAMES]


def _batch(table: Any) -> dict[Any, Any]:
    return {b"data": np.ascontiguousarray(table[:, 1:]), b"labels": table[:, 0].tolist(), b"batch_label": b"x"}


def _write_python(folder: Path) -> list[Path]:
    for seed, name in enumerate(_NAMES):
        (folder / name).write_bytes(pickle.dumps(_batch(_table(seed)), protocol=2 + seed % 3))
    return [folder / name for name in _NAMES]


def _other_batch(content: bytes, rng: random.Random, canary: Path) -> bytes:
    if rng.random() < 0.2:
        return bombs(rng)
    batch = _batch(_table(1))
    key = rng.choice([b"data", b"labels", b"other", b"\xff", 7, None])
    label = rng.choice([-1, 10, 255, 256, 2**70, 1.5, None, "1", b"1", True, [1], {}])
    batch[key] = rng.choice(
        [hostile(canary, rng), [label], label, odd_array(rng), laughs(rng.choice([3, 24, 40])), oddity(rng), [1, 2]]
    )
    if rng.random() < 0.05:
        batch = rng.choice([[batch], None, 7, hostile(canary, rng)])
    try:
        return pickle.dumps(batch, protocol=rng.randrange(6))
    except (TypeError, AttributeError, ValueError, pickle.PicklingError):
        return b"."


_PACKERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "tar": (bytes, bytes),
    "tar.gz": (lambda x: gzip.compress(x, 1), gzip.decompress),
    "tar.bz2": (bz2.compress, bz2.decompress),
    "tar.xz": (lambda x: lzma.compress(x, preset=0), lzma.decompress),
}


@functools.cache
def _large_archive() -> bytes:
    """Of a file that is larger than what could ever be CIFAR-10; 400 kB."""
    sink, member = io.BytesIO(), tarfile.TarInfo("x/test_batch.bin")
    member.size = 400 << 20
    with gzip.GzipFile(fileobj=sink, mode="w", compresslevel=1) as stream:
        stream.write(member.tobuf())
        for _ in range(400):
            stream.write(bytes(1 << 20))
    return sink.getvalue()


def _archive(kind: str) -> Target:
    packed, unpacked = _PACKERS[kind]

    def prepare(folder: Path) -> list[Path]:
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for seed, name in enumerate(_NAMES):
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
                member.size = data.RECORD_BYTES
                tar.addfile(member, io.BytesIO(_table(seed).tobytes()))
        (folder / f"cifar.{kind}").write_bytes(packed(sink.getvalue()))
        return [folder / f"cifar.{kind}"]

    def forge(content: bytes, rng: random.Random, canary: Path) -> bytes:
        inner = unpacked(content)
        if kind == "tar.gz" and rng.random() < 0.02:
            return _large_archive()
        return packed(damaged(inner, rng))

    return Target(
        f"CIFAR-10, {kind}",
        prepare,
        lambda folder: data.load_cifar10(folder / f"cifar.{kind}"),
        (ValueError, FileNotFoundError),
        forge,
    )


# ---- runs and sweeps


def _state() -> dict[str, Any]:
    table = records.Table("loss", "accuracy")
    for row in range(5):
        table.append(loss=1.0 / (row + 1), accuracy=0.5)
    return {"step": 5, "seconds": 1.5, "rows": table.state_dict(), "model": {"w": torch.ones(3, 2), "b": torch.ones(2)}}


class _Owner:
    """What a checkpoint is restored into."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.rows = records.Table("loss", "accuracy")
        self.model = torch.nn.Module()
        self.model.w, self.model.b = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(2))

    def contents(self) -> list[Any]:
        arrays = self.rows.arrays()
        tensors = {**self.model.state_dict(), **{name: torch.from_numpy(array) for name, array in arrays.items()}}
        return [self.step, self.seconds, *tensors.values()]


def _restore(folder: Path) -> list[Any]:
    owner = _Owner()
    run.RunFolder(folder).restore(lambda state: records.load_state(owner, state, ("step", "seconds", "rows", "model")))
    return owner.contents()


def _same_contents(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def _write_checkpoint(folder: Path) -> list[Path]:
    run.RunFolder(folder).write_checkpoint(_state())
    return [folder / "checkpoint.pt"]


def _other_checkpoint(content: bytes, rng: random.Random, canary: Path) -> bytes:
    """Whole by its checksum, or of before there was one."""
    size = len(content) - len(run.checksum(b""))
    state: Any = _state()
    match rng.randrange(6):
        case 0:
            inner = damaged(content[:size], rng)
        case 1:
            state[rng.choice(["step", "rows", "model", "x"])] = hostile(canary, rng)
            inner = _saved(state, rng)
        case 2:
            key = rng.choice(["step", "seconds", "rows", "model"])
            state[key] = rng.choice(
                [None, -1, "5", [], {}, {"loss": 3}, torch.zeros(2), {"w": torch.zeros(9)}, float("nan")]
            )
            inner = _saved(state, rng)
        case 3 | 4:
            inner = _other_parts(content[:size], rng)
        case _:
            inner = rng.choice([bombs(rng), b"x", pickle.dumps(laughs(30)), _saved(rng.choice([[1], laughs(20)]), rng)])
    return inner if rng.random() < 0.3 else inner + run.checksum(inner)


def _other_parts(content: bytes, rng: random.Random) -> bytes:
    """With parts that are damaged, or compressed, where one may be a bomb."""
    sink, deflate, bomb = io.BytesIO(), rng.random() < 0.5, rng.random() < 0.1
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist():
            part = old.read(name)
            if name.endswith("data/0") and bomb and deflate:
                part = bytes(400 << 20)
            elif part and (name.endswith(".pkl") or rng.random() < 0.1):
                part = damaged(part, rng)
            new.writestr(name, part)
    return sink.getvalue()


def _saved(state: Any, rng: random.Random) -> bytes:
    sink = io.BytesIO()
    torch.save(state, sink, _use_new_zipfile_serialization=rng.random() < 0.7)
    return sink.getvalue()


_METRICS = {"step": np.arange(3), "loss": np.ones(3), "weights": np.ones((3, 2))}


def _write_metrics(folder: Path) -> list[Path]:
    run.RunFolder(folder).write_metrics(_METRICS)
    return [folder / "metrics.npz"]


def _write_config(folder: Path) -> list[Path]:
    run.RunFolder(folder).write_config(spiral_mlp.SpiralConfig(out=folder).as_dict())
    run.RunFolder(folder).write_summary({"finished": True, "loss": 0.5})
    return [folder / "config.json", folder / "summary.json"]


def _read_config(folder: Path) -> Any:
    config = run.resumed(spiral_mlp.SpiralConfig(), folder)
    run.changed_options(config, run.RunFolder(folder).read_config())
    return run.RunFolder(folder).is_finished()


_SWEEP = {"experiment": "spiral", "steps": 5, "grid": {"seeds": 2}}
_MEMBERS = [{"amplitude": 1.0, "period": 5, "lr": 1.0, "width": 4, "seed": seed} for seed in range(4)]


def _chunk() -> sweep.Chunk:
    return sweep.chunks_of(_SWEEP, _MEMBERS, 4, ("width",))[0]


def _rows(members: Sequence[sweep.Member]) -> list[sweep.Row]:
    return [
        {"final_accuracy": 0.5, "validation_accuracy": None, "diverged": bool(member["seed"] % 2)} for member in members
    ]


def _write_sweep(folder: Path) -> list[Path]:
    sweep.SweepFolder(folder, _SWEEP, 4).compute(_chunk(), _rows)
    return [folder / "sweep.json"]


def _read_sweep(folder: Path) -> Any:
    made = sweep.SweepFolder(folder, _SWEEP, None)
    chunks = sweep.chunks_of(_SWEEP, _MEMBERS, made.chunk_members, ("width",))
    return made.collect(chunks).to_pylist() if len(chunks) == 1 else len(made.missing(chunks))


def _write_chunk(folder: Path) -> list[Path]:
    _write_sweep(folder)
    return [sweep.SweepFolder(folder, _SWEEP, 4).file(_chunk())]


def _read_chunk(folder: Path) -> Any:
    return sweep.SweepFolder(folder, _SWEEP, 4).collect([_chunk()]).to_pylist()


def _other_table(content: bytes, rng: random.Random, canary: Path) -> bytes:
    """A whole table with one column exchanged, left out or renamed."""
    rows = pq.read_table(pa.BufferReader(content)).to_pydict()
    name, count = rng.choice(list(rows)), rng.choice([4, 4, 4, 0, 3])
    rows = {key: values[:count] for key, values in rows.items()}
    how = rng.randrange(5)
    if how == 0:
        del rows[name]
    elif how == 1:
        rows["other"] = rows.pop(name)
    elif how == 2:
        rows[name] = [rng.choice(["x", "\u0000", None]) for _ in range(count)]
    elif how == 3:
        rows[name] = [rng.choice([[1], None, []]) for _ in range(count)]
    else:
        rows[name] = [rng.choice([0.0, -1.0, float("nan"), 7.5]) for _ in range(count)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), sink, compression=rng.choice(["zstd", "none", "gzip"]))
    return sink.getvalue().to_pybytes()


def _write_against(folder: Path) -> list[Path]:
    pq.write_table(
        pa.Table.from_pylist([{**m, **r} for m, r in zip(_MEMBERS, _rows(_MEMBERS), strict=True)]), folder / "t"
    )
    return [folder / "t"]


def _read_against(folder: Path) -> Any:
    config = phase_diagram.DiagramConfig(against=folder / "t", amplitudes=("1",), periods=("5",), seeds=4)
    return phase_diagram.other_columns(config, _MEMBERS)


_INITIAL = {
    "X": np.zeros((4, 2)),
    "y": np.array([0, 1, 2, 0]),
    "w1": np.zeros((2, 5)),
    "b1": np.zeros(5),
    "w2": np.zeros((5, 3)),
    "b2": np.zeros(3),
}


def _write_initial(folder: Path) -> list[Path]:
    np.savez(folder / "initial.npz", **_INITIAL)
    return [folder / "initial.npz"]


def _criterion() -> DynamicCrossEntropyLoss:
    oscillation = Oscillation(4, torch.tensor([2.0, 5.0, 9.0]), torch.tensor([3, 10, 20]))
    return DynamicCrossEntropyLoss(oscillation, weight=torch.tensor([0.5, 2.0, 1.0, 1.25]))


def _write_extra_state(folder: Path) -> list[Path]:
    (folder / "state").write_bytes(_criterion().get_extra_state().numpy().tobytes())
    return [folder / "state"]


def _read_extra_state(folder: Path) -> Any:
    raw = (folder / "state").read_bytes()
    _criterion().set_extra_state(torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else None)
    return None


def _other_extra_state(content: bytes, rng: random.Random, canary: Path) -> bytes:
    text, _, tensors = content.partition(b"\0")
    return other_json(text, rng, canary) + b"\0" + tensors


ALL = [
    Target("CIFAR-10, binary version", _write_binary, data.load_cifar10, (ValueError, FileNotFoundError)),
    Target("CIFAR-10, python version", _write_python, data.load_cifar10, (ValueError, FileNotFoundError), _other_batch),
    *map(_archive, _PACKERS),
    Target("checkpoint", _write_checkpoint, _restore, (run.RunError,), _other_checkpoint, _same_contents),
    Target(
        "metrics",
        _write_metrics,
        lambda folder: run.RunFolder(folder).read_metrics(),
        (run.RunError,),
        lambda content, rng, canary: npz(_METRICS, rng, canary),
    ),
    Target("configuration and summary", _write_config, _read_config, (ValueError,), other_json),
    Target("sweep.json", _write_sweep, _read_sweep, (run.RunError,), other_json),
    Target("chunk of a sweep", _write_chunk, _read_chunk, (run.RunError,), _other_table, lambda a, b: a == b),
    Target("table of another sweep", _write_against, _read_against, (ValueError,), _other_table),
    Target(
        "initial values",
        _write_initial,
        lambda folder: spiral.load_initial_values(folder / "initial.npz"),
        (ValueError,),
        lambda content, rng, canary: npz(_INITIAL, rng, canary),
    ),
    Target("extra state of a loss", _write_extra_state, _read_extra_state, (ValueError,), _other_extra_state),
]


_ROUND = 20_000  # inputs: a process reads its share, and makes bombs once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python -m robustness.readers --cases {options.cases}" + (
        f" --only {options.only}" if options.only else ""
    )
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    if known.get("command") != command:
        known = {}
    faults, read = known.get("faults", []), Counter[str](known.get("by_reader", {}))
    targets = [target for target in ALL if options.only in target.name]
    began = time.monotonic()
    for first in range(known.get("inputs", 0), options.cases, _ROUND):
        for target, numbers in shared_out(targets, min(_ROUND, options.cases - first)):
            found = fuzz(target, range(first + numbers.start, first + numbers.stop))
            for fault in found:
                print(fault, flush=True)
            faults += map(str, found)
            read[target.name] += len(numbers)
        spent = time.monotonic() - began
        publish(
            options.out,
            command,
            seconds=round(known.get("seconds", 0) + spent),
            inputs=sum(read.values()),
            faults=faults,
            by_reader=dict(read),
        )
        if spent > options.seconds:
            break
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
