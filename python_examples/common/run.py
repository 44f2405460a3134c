"""The folder of a run: what is in it, how it grows, and when it may be continued or replaced.

    config.json     the resolved options
    metrics.npz     one array per recorded column
    summary.json    the figures printed at the end
    figure.png      the plot (more figures may lie beside it)
    checkpoint.pt   all that `--resume` needs

Each file is written next to its final place and moved there in one step, so a reader never meets half a
file and a crash leaves the previous one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Config = TypeVar("Config", bound="BaseConfig")
Metrics = Mapping[str, NDArray[Any]]


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
    folder = RunFolder(config.out)
    if folder.holds_work() and not config.resume:
        other = ", ".join(map(flag, changed_options(config, folder.read_config())))
        found = f"a run with other options ({other})" if other else "an unfinished run; --resume continues it"
        if other or not folder.is_finished():
            raise ValueError(
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
        raise ValueError(f"--resume: expected a run in {out}, got a folder that holds no run to continue")
    saved = RunFolder(out).read_config()
    known = {field.name for field in dataclasses.fields(default)} - {"out", "resume"}
    values = {name: value for name, value in saved.items() if name in known}
    if values.get("data") is not None:
        values["data"] = Path(values["data"])
    return dataclasses.replace(default, **values)


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


class GracefulStop:
    """Turns the first Ctrl-C or SIGTERM inside the block into `requested`; a second Ctrl-C interrupts.

    A KeyboardInterrupt could strike half-way through a parameter update; a flag that the loop reads between
    two steps leaves a state that `--resume` continues exactly.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


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


class RunFolder:
    """Reads and writes the files of one run; `path` is created when missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out: expected a folder or a new name, got {self.path}, which is a file")
        self.path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._write_json("config.json", config)

    def write_summary(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a reader gets: plain types, None for NaN and infinity."""
        return self._write_json("summary.json", summary)

    def write_metrics(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        with atomic_write(self / "metrics.npz") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]  # numpy types **arrays as its flags

    def write_figure(self, figure: Figure, name: str = "figure.png", dpi: int = 150) -> None:
        with atomic_write(self / name) as file:
            figure.savefig(file, format=Path(name).suffix[1:], dpi=dpi)

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        with atomic_write(self / "checkpoint.pt") as file:
            torch.save(dict(state), file)

    def read_config(self) -> dict[str, Any]:
        return self._read_json("config.json")

    def read_summary(self) -> dict[str, Any]:
        return self._read_json("summary.json")

    def read_metrics(self) -> dict[str, NDArray[Any]]:
        with np.load(self / "metrics.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    def read_checkpoint(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The saved state, empty before the first; only tensors and plain containers are unpickled, never code."""
        if not self.has_checkpoint():
            return {}
        state: dict[str, Any] = torch.load(self / "checkpoint.pt", map_location=device, weights_only=True)
        return state

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
        with atomic_write(self / name) as file:
            file.write(text.encode())
        return plain

    def _read_json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self / name).read_text())
        return content


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


# --- rows -----------------------------------------------------------------------------------------------------


class Table:
    """Named columns that grow row by row without a host synchronisation per row.

    Values may be numbers or tensors on any device. Rows are moved to the host `block` at a time, so a GPU
    loop waits once per block and 70,000 rows do not live as 70,000 little tensors.
    """

    def __init__(self, *columns: str, block: int = 512) -> None:
        self._pending: dict[str, list[Any]] = {name: [] for name in columns}
        self._blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in columns}
        self._block = block
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, **row: Any) -> None:
        """Add one row: a value (number or tensor) for every column."""
        self._check(row)
        for name, value in row.items():
            self._pending[name].append(value.detach() if isinstance(value, torch.Tensor) else value)
        self._rows += 1
        if len(next(iter(self._pending.values()))) >= self._block:
            self._flush()

    def extend(self, **columns: Any) -> None:
        """Add many rows: for every column an array or tensor whose first dimension counts them."""
        self._check(columns)
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns: expected one number of rows, got {lengths}")
        self._flush()
        for name, column in columns.items():
            self._blocks[name].append(_to_host(column))
        self._rows += next(iter(lengths.values()))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every column as one array, rows first."""
        self._flush()
        for name, blocks in self._blocks.items():
            self._blocks[name] = [np.concatenate(blocks)] if blocks else []
        return {name: blocks[0] if blocks else np.empty(0) for name, blocks in self._blocks.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self.arrays().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace all rows by those saved."""
        self._pending = {name: [] for name in self._pending}
        self._blocks = {name: [] for name in self._blocks}
        self._rows = 0
        if len(next(iter(state.values()))):
            self.extend(**state)

    def _check(self, given: Mapping[str, Any]) -> None:
        if given.keys() != self._pending.keys():
            raise ValueError(f"columns: expected {sorted(self._pending)}, got {sorted(given)}")

    def _flush(self) -> None:
        for name, values in self._pending.items():
            if values:
                tensors = isinstance(values[0], torch.Tensor)
                self._blocks[name].append(_to_host(torch.stack(values) if tensors else values))
                self._pending[name] = []


def _to_host(column: Any) -> NDArray[Any]:
    if isinstance(column, torch.Tensor):
        return column.detach().cpu().numpy()
    return np.asarray(column)


def state_of(owner: Any, names: Iterable[str]) -> dict[str, Any]:
    """The named attributes for a checkpoint: plain values, or the state of what has one."""
    parts = {name: getattr(owner, name) for name in names}
    return {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}


def load_state(owner: Any, state: Mapping[str, Any]) -> None:
    """Gives the attributes back what `state_of` took."""
    for name, value in state.items():
        if hasattr(getattr(owner, name), "load_state_dict"):
            getattr(owner, name).load_state_dict(value)
        else:
            setattr(owner, name, value)


class EventLog:
    """TensorBoard's events of a run in `folder`/tensorboard; a resumed run writes over what it does again."""

    def __init__(self, folder: Path, next_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard: expected the package tensorboard, got none (pip install it)") from error
        self._next_step = next_step
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=next_step or None)

    def log(self, curves: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], stop: int) -> None:
        """Adds to every curve, (steps, values), its points before step `stop` that it does not have yet."""
        for name, (steps, values) in curves.items():
            for step, value in zip(steps, values, strict=True):
                if self._next_step <= step < stop:
                    self._writer.add_scalar(name, value, int(step))
        self._next_step = stop
        self._writer.flush()
