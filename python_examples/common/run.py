"""The folder of a run: what is in it, how it grows, and when it may be continued or replaced.

    config.json     the resolved options
    metrics.npz     one array per recorded column
    summary.json    the figures printed at the end
    figure.png      the plot (more figures may lie beside it)
    checkpoint.pt   all that `--resume` needs

Each file is written next to its final place and moved there in one step, so a reader never meets half a
file and a crash or a full disk leaves the previous one. One process at a time writes into a folder. What is wrong with
a file is told in one line that names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, TypeVar, cast, get_args, get_origin, get_type_hints
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Config = TypeVar("Config", bound="BaseConfig")
Metrics = Mapping[str, NDArray[Any]]
Main = TypeVar("Main", bound=Callable[..., Any])


# --- what is told to the user ---------------------------------------------------------------------------------


class RunError(ValueError):
    """What the user can mend, in one line that names the option or the file."""


def in_one_line(main: Main) -> Main:
    """Lets a script end with a `RunError`'s line instead of a traceback."""

    @functools.wraps(main)
    def told(*arguments: Any) -> Any:
        try:
            return main(*arguments)
        except RunError as error:
            raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None

    return cast(Main, told)


@contextmanager
def _told(
    path: Path, expected: str, remedy: str = "put a good copy in its place or take another --out"
) -> Iterator[None]:
    """Makes a `RunError` about a file of whatever a block stumbles over."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        line = " ".join(reason.split())[:200]
        raise RunError(f"{path}: expected {expected}, got {line}; {remedy}") from None


# --- options and resuming -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The options of every run. Subclasses check their own values in `__post_init__`."""

    out: Path = Path("runs/run")  # run folder: config, metrics, summary, figure, checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    seed: int = 0  # seed of everything random
    resume: bool = False  # continue the run in --out exactly where it stopped

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"out", "device", "resume"})  # without making it another run
    FAST: ClassVar[Mapping[str, Any]] = {}  # what `--fast` stands for, where there is this option

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raises a ValueError about the option `name` unless it `holds`."""
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"{flag(name)}: expected {expected}, got {'none' if value is None else value}")

    def check_data(self) -> None:
        """Raises a ValueError unless there is the data that the options ask for; presets need not have any."""

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types, and with what `--preset` and `--fast` stand for instead of their names."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("preset", "fast")}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def flag(name: str) -> str:
    """How the command line spells an option."""
    return "--" + name.replace("_", "-")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; asking for an absent CUDA is a ValueError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu or auto, as torch finds no CUDA device, got cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def open_run(config: BaseConfig) -> RunFolder:
    """The run folder of `config`, with config.json written.

    A folder that holds another run, or an unfinished one, is refused unless `resume` is set, so that no work
    is lost by a forgotten option. A finished run of the same configuration is computed anew.
    """
    folder = RunFolder(config.out).claim()
    if folder.holds_work() and not config.resume:
        other = ", ".join(map(flag, changed_options(config, folder.read_config())))
        found = f"a run with other options ({other})" if other else "an unfinished run; --resume continues it"
        if other or not folder.is_finished():
            raise RunError(
                f"--out: expected a new name or a finished run of these options, got {config.out} with {found}"
            )
    folder.write_config(config.as_dict())
    return folder


def resumed(default: Config, out: Path) -> Config:
    """`default` with the options of the run in `out`, which `--resume` continues: none has to be repeated.

    Raises:
        ValueError: no run was begun there.
    """
    if not (out / "config.json").is_file():
        raise RunError(f"--resume: expected a run in {out}, got a folder that holds no run to continue")
    saved = RunFolder(out).read_config()
    hints, values = get_type_hints(type(default)), dict[str, Any]()
    for name in {field.name for field in dataclasses.fields(default)} & saved.keys() - {"out", "resume"}:
        if not _fits(saved[name], hints[name]):
            raise RunError(
                f"{out / 'config.json'}: expected a value for {flag(name)}, got {saved[name]!r}; correct it or start a "
                "new run"
            )
        values[name] = Path(saved[name]) if name == "data" and saved[name] is not None else saved[name]
    return dataclasses.replace(default, **values)


def _fits(value: Any, kind: Any) -> bool:
    """Whether JSON's `value` stands for one of the annotated type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    kinds = get_args(kind) or (kind,)
    return (
        type(value) in kinds
        or (type(value) is int and float in kinds)
        or (type(value) is str and Path in kinds)
        or (value is None and type(None) in kinds)
    )


def refuse_changes(config: BaseConfig) -> None:
    """A resumed run keeps every option that its trajectory depends on, else a ValueError."""
    saved = RunFolder(config.out).read_config()
    for name in changed_options(config, saved):
        raise ValueError(
            f"{flag(name)}: expected {saved.get(name)}, as in the run in {config.out} that --resume continues, "
            f"got {config.as_dict()[name]}; leave the option out or start a new run"
        )


def changed_options(config: BaseConfig, saved: Mapping[str, Any]) -> list[str]:
    """Names of the options that differ from a saved configuration in a way that makes it another run."""
    given = config.as_dict()
    return [name for name in given if name not in config.MAY_CHANGE and given[name] != saved.get(name)]


# --- files ----------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and move it there once the block has ended without an error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would hide results from a group
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Lock:
    """The right to write into a folder: of one process, until it ends or drops the last `RunFolder` that claimed it.

    An flock on a file in it, open for writing, as NFS wants it. The file goes with the claim; that of a killed process
    stays, without a lock. Where nobody can write there is none.
    """

    held: ClassVar[WeakValueDictionary[tuple[int, int], _Lock]] = WeakValueDictionary()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None
        try:
            self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise

    def __del__(self) -> None:
        if self.handle is not None:
            if self._in_place():
                self.path.unlink()
            os.close(self.handle)

    @classmethod
    def of(cls, folder: Path) -> _Lock:
        place = folder.stat()
        key = place.st_dev, place.st_ino
        lock = cls.held.get(key)
        while lock is None:
            with _told(folder, "a folder that can be written to", "take another --out"):
                lock = cls((folder / ".lock").absolute())
            if not lock._take():
                raise RunError(
                    f"--out: expected a folder in which no other process works, got {folder}; wait for its end or take "
                    "another name"
                )
            if not lock._in_place():  # of a process that has just removed it
                lock = None
        cls.held[key] = lock
        return lock

    def _take(self) -> bool:
        if self.handle is None:
            return True
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.handle)
            self.handle = None
            return False
        except OSError:
            pass  # a file system without such locks
        return True

    def _in_place(self) -> bool:
        """Whether the file is still the one that others find."""
        if self.handle is None:
            return True
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.handle))
        except OSError:
            return False

    @classmethod
    def drop_in_child(cls) -> None:
        """A forked child would keep the lock of a process that has ended."""
        for lock in list(cls.held.values()):
            if lock.handle is not None:
                os.close(lock.handle)
            lock.handle = None
        cls.held.clear()


os.register_at_fork(after_in_child=_Lock.drop_in_child)


class RunFolder:
    """Reads and writes the files of one run; `path` is created when missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: _Lock | None = None
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--out: expected a folder or a new name, got {self.path}, which is a file")
        with _told(self.path, "a folder that can be made", "take another --out"):
            self.path.mkdir(parents=True, exist_ok=True)

    def claim(self) -> RunFolder:
        """Keeps other processes from writing here while this object lives; removes what a killed one had half done."""
        self._lock = _Lock.of(self.path)
        for suffix in ("json", "npz", "png", "pt"):
            for left in self.path.glob(f".*.{suffix}.????????"):  # as `atomic_write` names them
                with contextlib.suppress(OSError):
                    left.unlink()
        return self

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._write_json("config.json", config)

    def write_summary(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a reader gets: plain types, None for NaN and infinity."""
        return self._write_json("summary.json", summary)

    def write_metrics(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        content = io.BytesIO()
        np.savez(content, **dict(arrays))  # type: ignore[arg-type]  # numpy types **arrays as its flags
        self._write("metrics.npz", content.getvalue())

    def write_figure(self, figure: Figure, name: str = "figure.png", dpi: int = 150) -> None:
        content = io.BytesIO()
        figure.savefig(content, format=Path(name).suffix[1:], dpi=dpi)
        self._write(name, content.getvalue())

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """A file for `torch.load` with its checksum behind."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        self._write("checkpoint.pt", content.getvalue() + checksum(content.getvalue()))

    def read_config(self) -> dict[str, Any]:
        return self._read_json("config.json")

    def read_summary(self) -> dict[str, Any]:
        return self._read_json("summary.json")

    def read_metrics(self) -> dict[str, NDArray[Any]]:
        path = self / "metrics.npz"
        with _told(path, "the metrics of a run"):
            return load_arrays(path)

    def read_checkpoint(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The saved state, empty before the first; only tensors and plain containers are unpickled, never code."""
        if not self.has_checkpoint():
            return {}
        with _told(self / "checkpoint.pt", "the checkpoint of a run"):
            content = io.BytesIO(_checked((self / "checkpoint.pt").read_bytes()))
            check_unpacked(content)
            content.seek(0)
            state = torch.load(content, map_location=device, weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"a {type(state).__name__}")
            return state

    def restore(self, load: Callable[[dict[str, Any]], None], device: torch.device | str = "cpu") -> None:
        """Hands `load` the checkpoint, if there is one."""
        if self.has_checkpoint():
            state = self.read_checkpoint(device)
            with _told(self / "checkpoint.pt", "the state of this run"):
                load(state)

    def has_checkpoint(self) -> bool:
        return (self / "checkpoint.pt").exists()

    def holds_work(self) -> bool:
        """Whether a run was begun here, or the runs that are folders in this one."""
        begun = (self / "config.json").exists()
        return begun and (self.has_checkpoint() or any(self.path.glob("*/checkpoint.pt")))

    def is_finished(self) -> bool:
        return (self / "summary.json").exists() and bool(self.read_summary().get("finished"))

    def _write_json(self, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = _plain(content)
        text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
        self._write(name, text.encode())
        return plain

    def _read_json(self, name: str) -> dict[str, Any]:
        with _told(self / name, "a JSON object"):
            content = json.loads((self / name).read_text())
            if not isinstance(content, dict):
                raise TypeError(f"a {type(content).__name__}")
            return content

    def _write(self, name: str, content: bytes) -> None:
        remedy = "nothing was changed: make room or take another --out; --resume continues after the last checkpoint"
        with _told(self / name, "a place to write to", remedy), atomic_write(self / name) as file:
            file.write(content)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file; whatever is wrong with it is some exception."""
    check_unpacked(path)
    with np.load(path, allow_pickle=False) as parts:
        arrays = dict(parts)
    if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise TypeError(f"{other[0]}: no array")  # without NumPy's first bytes a part comes as it is
    return arrays


def check_unpacked(file: Path | BinaryIO) -> None:
    """ValueError for a zip file that would unpack to more than itself and 64 MiB: what runs write is not packed."""
    with zipfile.ZipFile(file) as parts:
        unpacked = sum(part.file_size for part in parts.infolist())
        size = file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
    if unpacked > size + (64 << 20):
        raise ValueError(f"{unpacked} bytes in a file of {size}")


def checksum(content: bytes) -> bytes:
    """What says that a file is as it was written."""
    return b"sha256:" + hashlib.sha256(content).hexdigest().encode()


def _checked(content: bytes) -> bytes:
    """What was saved, without its checksum. Files from before there was one have those of the zip format."""
    if content[-22:-18] == b"PK\x05\x06":  # the end of a zip file
        check_unpacked(io.BytesIO(content))
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            if part := parts.testzip():
                raise ValueError(f"bytes in {part} that differ from those saved")
        return content
    size = len(content) - len(checksum(b""))
    if size <= 0 or content[size:] != checksum(content[:size]):
        raise ValueError("bytes that differ from those saved")
    return content[:size]


def _plain(value: Any) -> Any:
    """`value` in JSON's types; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value) if isinstance(value, os.PathLike) else value
