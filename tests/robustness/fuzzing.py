"""Damaged inputs, and a child process in which they are read: whatever a reader does to it, the parent goes on."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 20.0  # for one input; a reader that takes longer hangs
MEMORY = 256 << 20  # bytes that one input may cost
ADDRESSES = 4 << 30  # bytes of address space beyond what the process begins with
_CRASHES = 3  # of one target, until it is given up

_STARTERS = {
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "shutil.rmtree",
}


@dataclass(frozen=True)
class Target:
    """A reader and what it reads.

    Attributes:
        prepare: writes good files into an empty folder, and names those that may be damaged.
        read: returns what the reader makes of the folder.
        refusals: what it may raise, with "expected" and what there is in the message.
        forge: makes another content that is whole but wrong, of (a good content, random numbers, the canary: a path at
            which code from the input would make a file); None where there is only damage.
        right: whether a result may come of damage, for formats with a checksum: None where any may.
    """

    name: str
    prepare: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...]
    forge: Callable[[bytes, random.Random, Path], bytes] | None = None
    right: Callable[[Any, Any], bool] | None = None


@dataclass(frozen=True)
class Fault:
    """What a reader did that it must not."""

    target: str
    number: int
    what: str


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to four random edits of bytes; never the same content."""
    data = bytearray(content)
    while bytes(data) == content:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _edit(data, rng)
    return bytes(data)


def _edit(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    length = rng.choice((1, 2, 4, 8, rng.randrange(1, 300)))
    match rng.randrange(8):
        case 0 if data:
            data[at] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[at] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            data += rng.randbytes(length)
        case 4:
            del data[at : at + length]
        case 5:
            data[at:at] = data[at : at + length] or b"\0"
        case 6:
            value = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**15, 255, 2**63 - 1))
            kind = rng.choice(["<bB", "<hH", "<iI", "<qQ", ">iI", ">qQ"])
            size = struct.calcsize(kind[:2])
            data[at : at + size] = (value % 256**size).to_bytes(size, "little" if kind[0] == "<" else "big")
        case _:
            data[at : at + length] = bytes(len(data[at : at + length]))


def _place(data: bytearray, rng: random.Random) -> int:
    """Often near an end, where formats keep what they say of themselves."""
    if not data:
        return 0
    near = min(len(data), rng.choice((16, 128, 1024)))
    return rng.choice((rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)))


class _TooLong(BaseException):
    pass


def fuzz(target: Target, numbers: range) -> list[Fault]:
    """Reads so many damaged inputs, the same for the same numbers, in processes of their own."""
    faults: list[Fault] = []
    crashes = 0
    while numbers and crashes < _CRASHES:
        found, last = _in_child(target, numbers)
        faults += found
        if last is None:
            break
        number, status = last
        crashes += 1
        faults.append(Fault(target.name, number, f"ended the process: status {status}"))
        numbers = range(number + 1, numbers.stop)
    return faults


def _in_child(target: Target, numbers: range) -> tuple[list[Fault], tuple[int, int] | None]:
    """The faults, and where and how the process ended before its time."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    log = folder / "log"
    log.touch()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            _work(target, numbers, folder, log)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    try:
        _, status = os.waitpid(child, 0)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    finally:
        shutil.rmtree(folder)
    faults = [Fault(target.name, number, what) for number, what in lines if what not in ("begun", "end")]
    begun = [number for number, what in lines if what == "begun"]
    ended = bool(lines) and lines[-1][1] == "end"
    return faults, None if ended else (begun[-1] if begun else numbers.start, status)


def _work(target: Target, numbers: range, folder: Path, log: Path) -> None:
    reading = Reading(target, folder)
    with log.open("w") as out:

        def note(number: int, what: str) -> None:
            out.write(json.dumps([number, what]) + "\n")

        for number in numbers:
            rng = random.Random(f"{target.name} {number}")
            file = rng.choice(reading.files)
            good, forged = reading.good[file], target.forge is not None and rng.random() < 0.5
            content = target.forge(good, rng, reading.canary) if forged and target.forge else damaged(good, rng)
            if number % 50 == 0 or forged:  # a crash is found again from here
                note(number, "begun")
                out.flush()
            for what in reading.faults(file, content, forged):
                note(number, what)
        note(numbers.stop, "end")


class Reading:
    """What a target makes of its files, in this process, whose memory and warnings are limited from here on.

    Attributes:
        files: that may have another content.
        good: what they have.
        canary: see `Target`.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self._place, self.canary = target, folder / "input", folder / "canary"
        self._place.mkdir()
        self.files = target.prepare(self._place)
        self.good = {file: file.read_bytes() for file in self.files}
        self._expected = target.read(self._place)
        self._started: list[str] = []
        self._armed = False
        sys.addaudithook(self._hook)
        faulthandler.disable()  # pytest's would tell of crashes that the parent counts
        _limit_memory()
        signal.signal(signal.SIGALRM, _raise_too_long)
        warnings.simplefilter("ignore")

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._armed and event in _STARTERS:
            self._started.append(event)

    def faults(self, file: Path, content: bytes, forged: bool) -> list[str]:
        """What the reader does that it must not, with this content in the file; forged: any result may be right."""
        target, found = self._target, list[str]()
        file.write_bytes(content)
        before = _reset_peak()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self._armed = True
        try:
            result = target.read(self._place)
        except target.refusals as error:
            if not re.search("expected.*(got|missing|are not in)", str(error), re.DOTALL):
                found.append(f"unclear: {type(error).__name__}: {error}")
        except _TooLong:
            found.append(f"took more than {SECONDS} s")
        except BaseException as error:
            found.append(_told(error))
        else:
            if target.right is not None and not forged and not target.right(result, self._expected):
                found.append("read what is wrong")
            del result
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        grown = _memory("VmHWM") - before
        if grown > MEMORY:
            found.append(f"took {grown >> 20} MiB for {len(content)} bytes")
        if self._started or self.canary.exists():
            found.append(f"ran code: {self._started or 'canary'}")
            self._started.clear()
            self.canary.unlink(missing_ok=True)
        file.write_bytes(self.good[file])
        return found


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    return f"{type(error).__name__}: {str(error)[:200]} at {Path(last.filename).name}:{last.lineno}"


def _reset_peak() -> int:
    """From here on the peak of resident memory is counted anew; returns where it begins."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """Bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(name))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _raise_too_long(number: int, frame: object) -> None:
    raise _TooLong


def shared_out(targets: Sequence[Target], total: int) -> Iterator[tuple[Target, range]]:
    """So many inputs over the targets, as evenly as it goes."""
    for i, target in enumerate(targets):
        yield target, range(total * i // len(targets), total * (i + 1) // len(targets))
