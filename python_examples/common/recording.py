"""The run folder every example writes, complete and readable at any moment of the run.

    config.json     the resolved options
    metrics.npz     one array per recorded column
    summary.json    the figures printed at the end
    figure.png      the plot (more figures may lie beside it)
    checkpoint.pt   all that `--resume` needs

Each file is written next to its final place and moved there in one step, so a reader never meets half a
file and a crash leaves the previous one.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
            raise ValueError(f"out: {self.path} is a file, expected a folder or a new name")
        self.path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._write_json("config.json", config)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write_json("summary.json", summary)

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
        """The saved state; only tensors and plain containers are unpickled, never code."""
        state: dict[str, Any] = torch.load(self / "checkpoint.pt", map_location=device, weights_only=True)
        return state

    def has_checkpoint(self) -> bool:
        return (self / "checkpoint.pt").exists()

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"
        with atomic_write(self / name) as file:
            file.write(text.encode())

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
            raise ValueError(f"columns: lengths differ ({lengths}), expected one number of rows")
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
            raise ValueError(f"columns: got {sorted(given)}, expected {sorted(self._pending)}")

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
