"""Many runs in chunks: a folder that any number of processes fill, each chunk once, and that loses none.

    sweep.json            the configuration, and how many members a chunk has
    chunks/HASH.parquet   a finished chunk: one row a member; HASH is of its members, the configuration and the version
    chunks/HASH.lock      held (flock) by the process that computes it

A chunk appears in one step, once all of it is written, so that a killed process leaves none or a whole one. Whoever
starts again computes what is missing. A file that cannot be read counts as missing, and is said so.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.run import RunError, atomic_write, checksum

Member = Mapping[str, Any]  # what one run differs by from the others, in JSON's types
Row = dict[str, Any]

VERSION = 1  # of what the columns of a chunk mean; another does not count as finished

_POLL = 1.0  # seconds between two looks at chunks that others compute


def read_values(name: str, words: Sequence[str]) -> list[float]:
    """The numbers of a list such as `1 10 70`, of ranges `1:100:12` (12 numbers from 1 to 100) and `log:1:1000:12`.

    Raises:
        ValueError: a word is none of these. In order, each number once.
    """
    numbers: set[float] = set()
    for word in words:
        try:
            logarithmic = word.startswith("log:")
            parts = word.removeprefix("log:").split(":")
            if len(parts) == 1 and not logarithmic:
                found = np.array([float(word)])
            else:
                low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
                if len(parts) != 3 or count < 2 or not low < high:
                    raise ValueError
                found = (np.geomspace if logarithmic else np.linspace)(low, high, count)
            if not np.all(np.isfinite(found)):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(
                f"{name}: expected numbers, or ranges LOW:HIGH:COUNT or log:LOW:HIGH:COUNT with LOW < HIGH and COUNT "
                f">= 2, got {word}"
            ) from None
        numbers.update(float(f"{x:.6g}") for x in found)
    return sorted(numbers)


@dataclass(frozen=True)
class Chunk:
    """Members that are computed together, and the name of their file."""

    name: str
    members: tuple[Member, ...]


def chunks_of(
    configuration: Mapping[str, Any], members: Sequence[Member], size: int, alike: Sequence[str]
) -> list[Chunk]:
    """Chunks of at most `size` members, of which each has the same values of the `alike` keys."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member[key] for key in alike), []).append(member)
    parts = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    return [Chunk(_name({"version": VERSION, **configuration, "members": part}), tuple(part)) for part in parts]


def _name(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


# A Parquet file has checksums of its pages, and none of its footer, which says what is where. That of all of it lies
# between the two, where readers of such files see nothing.


def _as_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    footer = _start_of_footer(content)
    return content[:footer] + checksum(content) + content[footer:]


def _without_checksum(content: bytes) -> bytes:
    """ValueError where it is wrong, or there is none."""
    footer, length = _start_of_footer(content), len(checksum(b""))
    rest = content[: max(0, footer - length)] + content[max(0, footer) :]
    if content[max(0, footer - length) : max(0, footer)] != checksum(rest):
        raise ValueError("bytes that differ from those saved")
    return rest


def _start_of_footer(content: bytes) -> int:
    """Its length comes before the last four bytes."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


class SweepFolder:
    """The folder of a sweep; several processes may work in it at once.

    Args:
        path: made when missing.
        configuration: all that results depend on, in JSON's types. A folder with another one is refused.
        chunk_members: members of a chunk, where the folder does not say; None where it has to.

    Raises:
        RunError: the folder cannot be used, or holds another sweep.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any], chunk_members: int | None) -> None:
        self.path = path
        try:
            (path / "chunks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out: expected a folder that can be made, got {path}: {error.strerror}") from None
        saved = self._saved()
        if saved is None:
            if chunk_members is None:
                raise RunError(f"--out: expected a folder with a sweep, got {path}, which holds none")
            self._write(path / "sweep.json", json.dumps({"chunk_members": chunk_members, **configuration}, indent=2))
            saved = self._saved() or {}
        self.chunk_members = int(saved.pop("chunk_members"))
        other = sorted(key for key in {*saved, *configuration} if saved.get(key) != configuration.get(key))
        if other:
            given = ", ".join(f"{key} = {configuration.get(key)} instead of {saved.get(key)}" for key in other)
            raise RunError(f"--out: expected a new name or the options of the sweep in {path}, got {given}")
        if chunk_members not in (None, self.chunk_members):
            raise RunError(f"--chunk-members: expected {self.chunk_members}, as in {path}, got {chunk_members}")

    def file(self, chunk: Chunk) -> Path:
        return self.path / "chunks" / f"{chunk.name}.parquet"

    def read(self, chunk: Chunk) -> pa.Table | None:
        """The rows of a finished chunk; None where there is none, or none that can be read."""
        try:
            content = pa.BufferReader(_without_checksum(self.file(chunk).read_bytes()))
            table = pq.read_table(content, page_checksum_verification=True)
            return table if table.num_rows == len(chunk.members) else None
        except (OSError, ValueError, pa.ArrowException):
            return None

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Those that are not finished."""
        return [chunk for chunk in chunks if self.read(chunk) is None]

    def compute(self, chunk: Chunk, work: Callable[[Sequence[Member]], list[Row]]) -> bool:
        """Computes and writes a chunk, unless it is there; False while another process has it in hand.

        Raises:
            RunError: it cannot be written.
        """
        with self._lock(chunk) as mine:
            if not mine:
                return False
            if self.read(chunk) is None:
                rows = work(chunk.members)
                table = pa.Table.from_pylist(
                    [{**member, **row} for member, row in zip(chunk.members, rows, strict=True)]
                )
                self._write(self.file(chunk), _as_parquet(table))
            return True

    def collect(self, chunks: Sequence[Chunk]) -> pa.Table:
        """The rows of all chunks as one table, written to table.parquet.

        Raises:
            RunError: chunks are missing; says how many members.
        """
        tables = [self.read(chunk) for chunk in chunks]
        lost = [chunk for chunk, table in zip(chunks, tables, strict=True) if table is None]
        if lost:
            unreadable = [self.file(chunk).name for chunk in lost if self.file(chunk).exists()]
            damaged = f", {len(unreadable)} of them damaged ({', '.join(unreadable[:3])})" if unreadable else ""
            raise RunError(
                f"{self.path}: expected {len(chunks)} chunks, got {len(chunks) - len(lost)}: {len(lost)} are missing"
                f"{damaged}, with {sum(len(c.members) for c in lost)} members; run the sweep again to compute them"
            )
        table = pa.concat_tables(tables, promote_options="permissive")  # a column of nothing has no type yet
        self._write(self.path / "table.parquet", _as_parquet(table))
        return table

    def _saved(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / "sweep.json").read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            content = None
        members = content.get("chunk_members") if isinstance(content, dict) else None
        if not isinstance(content, dict) or type(members) is not int or members < 1:
            raise RunError(f"{self.path / 'sweep.json'}: expected the options of a sweep, got something else")
        return content

    def _write(self, path: Path, content: str | bytes) -> None:
        try:
            with atomic_write(path) as file:
                file.write(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise RunError(
                f"{path}: expected a place to write to, got {error.strerror}; finished chunks are kept: make room and "
                "run the sweep again"
            ) from None

    @contextmanager
    def _lock(self, chunk: Chunk) -> Iterator[bool]:
        """The right to compute a chunk, which ends with the process."""
        path = self.file(chunk).with_suffix(".lock")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunError(f"{path}: expected a place to write to, got {error.strerror}") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass  # a file system without such locks
            yield True
            # Who waits for this lock looks at the finished chunk first.
            with contextlib.suppress(OSError):
                path.unlink()
        finally:
            os.close(handle)


# ---- who computes


Work = Callable[[Sequence[Member]], list[Row]]
Progress = Callable[[Chunk], None]


def run_here(folder: SweepFolder, chunks: Sequence[Chunk], work: Work, done: Progress) -> None:
    """Computes the missing chunks in this process, and waits for those that others have in hand."""
    waiting = list(chunks)
    while waiting:
        still = []
        for chunk in waiting:
            if folder.compute(chunk, work):
                done(chunk)
            else:
                still.append(chunk)
        if len(still) == len(waiting):
            time.sleep(_POLL)
        waiting = still


def _task(path: Path, configuration: Mapping[str, Any], chunk: Chunk, work: Work, threads: int) -> bool:
    """What a worker of Dask does."""
    import torch

    torch.set_num_threads(threads)
    return SweepFolder(path, configuration, None).compute(chunk, work)


def run_on_dask(
    folder: SweepFolder,
    configuration: Mapping[str, Any],
    chunks: Sequence[Chunk],
    work: Work,
    done: Progress,
    *,
    workers: int | None = None,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
) -> None:
    """Computes the missing chunks on Dask workers, which see the same folder.

    Args:
        workers: starts so many processes on this machine, which talk over 127.0.0.1.
        address: or that of the scheduler of a cluster.
        resources: what a worker must have, such as {"GPU": 1}.

    Raises:
        RunError: no such cluster, or it was lost; finished chunks are kept.
    """
    try:
        import distributed
    except ImportError:
        raise RunError(
            "--workers, --cluster: expected the package distributed, got none: pip install distributed"
        ) from None
    threads = max(1, (os.cpu_count() or 1) // workers) if workers else 1
    waiting = {chunk.name: chunk for chunk in chunks}
    with contextlib.ExitStack() as stack:
        try:
            if workers:
                address = stack.enter_context(
                    distributed.LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address=None,
                        resources=dict(resources or {}),
                        memory_limit=0,
                    )
                )
            client = stack.enter_context(distributed.Client(address, timeout=20))
        except (OSError, TimeoutError, ValueError) as error:
            raise RunError(
                f"--cluster: expected a scheduler at {address}, got {type(error).__name__}: {error}"
            ) from None
        try:
            while waiting:
                futures = {
                    client.submit(
                        _task, folder.path, configuration, chunk, work, threads, pure=False, resources=resources
                    ): chunk
                    for chunk in waiting.values()
                }
                before = len(waiting)
                for future in distributed.as_completed(list(futures)):
                    if future.result():
                        chunk = futures[future]
                        del waiting[chunk.name]
                        done(chunk)
                if len(waiting) == before:
                    time.sleep(_POLL)
        except (
            distributed.CancelledError,
            distributed.KilledWorker,
            distributed.comm.CommClosedError,
            OSError,
        ) as error:
            raise RunError(
                f"{folder.path}: expected a cluster that stays, got {type(error).__name__}: {len(waiting)} chunks are "
                "missing; run the sweep again to compute them"
            ) from None
