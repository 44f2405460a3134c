"""What a run records: its rows, their place in a checkpoint, and TensorBoard's events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Table:
    """Named columns that grow row by row without a host synchronisation per row.

    Values may be numbers or tensors on any device. Rows are moved to the host `block` at a time, so a GPU
    loop waits once per block and 70,000 rows do not live as 70,000 little tensors.
    """

    def __init__(self, *columns: str, block: int = 512) -> None:
        self._pending: dict[str, list[Any]] = {name: [] for name in columns}
        self._blocks: dict[str, list[torch.Tensor]] = {name: [] for name in columns}  # on the host
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
        converted = {name: _to_host(column) for name, column in columns.items()}
        for name, column in converted.items():
            blocks = self._blocks[name]
            blocks.append(column)
            if len(blocks) == self._block:  # rows may come one by one
                self._blocks[name] = [torch.cat(blocks)]
        self._rows += next(iter(lengths.values()))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every column as one array, rows first."""
        self._flush()
        for name, blocks in self._blocks.items():
            self._blocks[name] = [torch.cat(blocks)] if blocks else []
        return {name: blocks[0].numpy() if blocks else np.empty(0) for name, blocks in self._blocks.items()}

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


def _to_host(column: Any) -> torch.Tensor:
    if isinstance(column, torch.Tensor):
        return column.detach().cpu()
    return torch.from_numpy(np.asarray(column))


def state_of(owner: Any, names: Iterable[str]) -> dict[str, Any]:
    """The named attributes for a checkpoint: plain values, or the state of what has one."""
    parts = {name: getattr(owner, name) for name in names}
    return {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}


def load_state(owner: Any, state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Gives the named attributes back what `state_of` took."""
    for name in names:
        part = getattr(owner, name)
        if hasattr(part, "load_state_dict"):
            part.load_state_dict(state[name])
        elif isinstance(state[name], type(part)):
            setattr(owner, name, state[name])
        else:
            raise TypeError(f"{name} of type {type(state[name]).__name__}")


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
