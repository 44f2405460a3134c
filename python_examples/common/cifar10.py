"""CIFAR-10: a reader for both published formats, a subset by class, and a synthetic stand-in.

The archives are read in place: nothing is extracted, and the python version's pickles are opened by an
unpickler that knows NumPy arrays and nothing else.  Data: A. Krizhevsky, "Learning multiple layers of
features from tiny images" (2009), https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_CLASSES = 10
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32
RECORD_BYTES = 1 + IMAGE_BYTES
CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)  # of the training images, in units of 255
CHANNEL_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Version:
    """One of the two published forms of the data set."""

    folder: str
    archive: str
    md5: str
    suffix: str
    decode: Callable[[bytes, str], tuple[NDArray[Any], NDArray[Any]]]

    @property
    def train_files(self) -> tuple[str, ...]:
        return tuple(f"data_batch_{i}{self.suffix}" for i in range(1, 6))

    @property
    def test_files(self) -> tuple[str, ...]:
        return (f"test_batch{self.suffix}",)


@dataclass(frozen=True)
class Split:
    """images: (N, 3, 32, 32) uint8; labels: (N,) int64; both on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, num_classes: int, count: int | None = None) -> Split:
        """At most `count` images of the classes 0 .. num_classes - 1: the first of each class, in file order.

        `count` is spread evenly (the first classes get one more if it does not divide).  Where a class has
        fewer images than its share, all of them are taken and a warning says so.
        """
        if not 1 <= num_classes <= NUM_CLASSES:
            raise ValueError(f"classes must be 1 to {NUM_CLASSES}, got {num_classes}")
        if count is not None and count < num_classes:
            raise ValueError(f"the number of images must be at least the number of classes, {num_classes}, got {count}")
        chosen = []
        for label in range(num_classes):
            members = torch.nonzero(self.labels == label).flatten()
            if len(members) == 0:
                raise ValueError(f"the data holds no image of class {label} ({CLASS_NAMES[label]})")
            if count is not None:
                share = count // num_classes + (label < count % num_classes)
                if len(members) < share:
                    warnings.warn(
                        f"class {label} ({CLASS_NAMES[label]}) has {len(members)} images, {share} were "
                        "asked for: using all of them",
                        stacklevel=2,
                    )
                members = members[:share]
            chosen.append(members)
        order = torch.cat(chosen).sort().values
        return Split(self.images[order], self.labels[order])

    def fingerprint(self) -> str:
        """md5 of the pixels and the labels, to tell runs on different data apart."""
        digest = hashlib.md5(usedforsecurity=False)
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    train: Split
    test: Split


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and NumPy arrays; everything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":  # how protocol 2 writes bytes
            return _latin1_bytes
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _empty_array(subtype: object, shape: tuple[int, ...], dtype: object) -> NDArray[Any]:
    """What `numpy._reconstruct` does for a plain array: an empty one, whose state follows in the stream."""
    if subtype is not np.ndarray:
        raise pickle.UnpicklingError(f"refused to build an array of type {subtype!r}")
    empty: NDArray[Any] = np.ndarray(0, np.int8)
    return empty


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused to encode to {encoding!r}")
    return text.encode("latin1")


def _decode_binary(content: bytes, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(content) % RECORD_BYTES:
        raise ValueError(
            f"{name}: {len(content)} bytes are not a whole number of {RECORD_BYTES}-byte records "
            f"({len(content) % RECORD_BYTES} left over)"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
    return records[:, 1:], records[:, 0]


def _decode_python(content: bytes, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = np.asarray(fields["data"]), np.asarray(fields["labels"])
    except Exception as error:  # a hostile or damaged stream can raise nearly anything
        raise ValueError(f"{name}: not a CIFAR-10 batch: {type(error).__name__}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != IMAGE_BYTES:
        raise ValueError(f"{name}: data must be uint8 (N, {IMAGE_BYTES}), got {pixels.dtype} {pixels.shape}")
    if labels.shape != (len(pixels),) or not (labels.size == 0 or np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"{name}: labels must be {len(pixels)} integers, got {labels.dtype} {labels.shape}")
    return pixels, labels


BINARY = Version(
    "cifar-10-batches-bin",
    "cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    ".bin",
    _decode_binary,
)
PYTHON = Version(
    "cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "", _decode_python
)
VERSIONS = (BINARY, PYTHON)


def load_cifar10(path: str | Path) -> Dataset:
    """Reads CIFAR-10.

    Args:
        path: a folder that holds `cifar-10-batches-bin`, `cifar-10-batches-py` or one of the official
            archives, or one of these folders or archives itself.

    Returns:
        Both splits on the CPU, images uint8 (N, 3, 32, 32), labels int64 (N,).

    Raises:
        FileNotFoundError: nothing of the kind there, or one of its six files is missing.
        ValueError: a file that is not CIFAR-10: a broken record, a label above 9, a pickle that holds
            anything but arrays, an archive with a member outside its own folder.
    """
    root = Path(path).expanduser()
    for version in VERSIONS:
        for folder in (root / version.folder, root):
            if (folder / version.test_files[0]).is_file():
                return _assemble(version, _folder_reader(folder), str(folder))
        if (root / version.archive).is_file():
            return _load_archive(root / version.archive, version)
    if root.is_file():  # an archive under any name
        return _load_archive(root, _version_inside(root))
    names = ", ".join(name for version in VERSIONS for name in (version.folder, version.archive))
    raise FileNotFoundError(f"no CIFAR-10 data at {root}: expected one of {names} there (or that itself)")


def _version_inside(archive: Path) -> Version:
    names = {PurePosixPath(name).name for name, _ in _members(archive)}
    for version in VERSIONS:
        if version.test_files[0] in names:
            return version
    raise FileNotFoundError(f"{archive}: neither {BINARY.test_files[0]} nor {PYTHON.test_files[0]} is in this archive")


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and reader of each member in turn; refuses what an extraction would have to fear."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{archive}: member {member.name!r} points outside the archive: not loaded")
                if member.issym() or member.islnk() or member.isdev():
                    raise ValueError(f"{archive}: member {member.name!r} is a link or a device: not loaded")
                if stream := tar.extractfile(member):  # None for a folder
                    yield member.name, stream.read
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive}: not a readable tar archive: {error}") from error


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: {name} is missing")
        return (folder / name).read_bytes()

    return read


def _load_archive(archive: Path, version: Version) -> Dataset:
    md5 = file_md5(archive)
    if md5 != version.md5:
        warnings.warn(
            f"{archive}: md5 {md5} is not the official {version.md5}: not the bytes that were published",
            stacklevel=3,
        )
    wanted = {*version.train_files, *version.test_files}
    contents: dict[str, bytes] = {}
    for member, read_member in _members(archive):
        name = PurePosixPath(member).name
        if name in contents:
            raise ValueError(f"{archive}: {name} is there twice")
        if name in wanted:
            contents[name] = read_member()

    def read(name: str) -> bytes:
        if name not in contents:
            raise FileNotFoundError(f"{archive}: {name} is missing")
        return contents.pop(name)

    return _assemble(version, read, str(archive))


def _assemble(version: Version, read: Callable[[str], bytes], origin: str) -> Dataset:
    def split(names: Sequence[str]) -> Split:
        pixels, labels = [], []
        for name in names:
            batch_pixels, batch_labels = version.decode(read(name), f"{origin}: {name}")
            bad = np.flatnonzero((batch_labels < 0) | (batch_labels >= NUM_CLASSES))
            if len(bad):
                raise ValueError(f"{origin}: {name}: record {bad[0]} has label {batch_labels[bad[0]]}, expected 0 to 9")
            pixels.append(batch_pixels)
            labels.append(batch_labels)
        images = np.concatenate(pixels).reshape(-1, *IMAGE_SHAPE)
        if len(images) == 0:
            raise ValueError(f"{origin}: {', '.join(names)} hold no image")
        return Split(torch.from_numpy(images), torch.from_numpy(np.concatenate(labels).astype(np.int64)))

    return Dataset(split(version.train_files), split(version.test_files))


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def synthetic_cifar10(train_per_class: int = 500, test_per_class: int = 100, seed: int = 0) -> Dataset:
    """A small learnable stand-in: each class is a smooth colour pattern, shifted, dimmed and noisy."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.0, 1.0, (NUM_CLASSES, 3, 4, 4)).astype(np.float32)
    patterns = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), size=(40, 40), mode="bilinear", align_corners=True
    ).numpy()

    def split(per_class: int) -> Split:
        labels = rng.permutation(np.repeat(np.arange(NUM_CLASSES), per_class))
        images = np.empty((len(labels), *IMAGE_SHAPE), np.uint8)
        for row, label in enumerate(labels):
            top, left = rng.integers(0, 9, 2)
            pattern = patterns[label, :, top : top + 32, left : left + 32]
            noisy = 0.5 + rng.uniform(0.4, 1.0) * (pattern - 0.5) + 0.25 * rng.standard_normal(IMAGE_SHAPE)
            images[row] = np.clip(255 * noisy, 0, 255)
        return Split(torch.from_numpy(images), torch.from_numpy(labels))

    return Dataset(split(train_per_class), split(test_per_class))
