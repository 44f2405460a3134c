"""CIFAR-10 by hand: files of a few random records, in every form."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch

from common import data as cifar10

FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def records(seed: int, count: int = 4) -> np.ndarray:
    """count records of 1 label byte and 3072 pixels."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
    table[:, 0] = rng.integers(0, 10, count)
    return table


def write_binary(folder: Path, counts: tuple[int, ...] = (4, 4, 4, 4, 4, 3)) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    tables = [records(seed, count) for seed, count in enumerate(counts)]
    for name, table in zip(FILES, tables, strict=True):
        table.tofile(folder / f"{name}.bin")
    return np.concatenate(tables)


def write_python(folder: Path, protocol: int = 2) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    tables = [records(seed) for seed in range(6)]
    for name, table in zip(FILES, tables, strict=True):
        batch = {
            b"data": np.ascontiguousarray(table[:, 1:]),
            b"labels": table[:, 0].tolist(),
            b"batch_label": b"x",
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return np.concatenate(tables)


def pack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def check_equal(data: cifar10.Dataset, table: np.ndarray, num_train: int = 20) -> None:
    images = np.concatenate([data.train.images.numpy(), data.test.images.numpy()])
    labels = np.concatenate([data.train.labels.numpy(), data.test.labels.numpy()])
    assert len(data.train) == num_train
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    np.testing.assert_array_equal(images.reshape(len(table), -1), table[:, 1:])
    np.testing.assert_array_equal(labels, table[:, 0])
