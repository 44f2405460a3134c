"""CIFAR-10 on the device: a reader, subsets by class, a synthetic stand-in, and batches.

Order, crops and flips of the batches are a pure function of (seed, epoch). Nothing is drawn from a running random
state, so an interrupted run finds its place from the step alone, and every process of a distributed run sees the
same global batch and takes its own part of it.

Data: A. Krizhevsky, "Learning multiple layers of features from tiny images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import TrainingConfig

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_CLASSES = len(CLASS_NAMES)
IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32
CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)  # of the training images, in units of 255
CHANNEL_STD = (0.2470, 0.2435, 0.2616)
CROP_MARGIN = 4  # pixels a crop may move each way

FOLDER = "cifar-10-batches-bin"  # the binary version: a record is a label and 3072 pixels
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
RECORD_BYTES = 1 + IMAGE_BYTES


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
            raise ValueError(f"--classes: expected 1 to {NUM_CLASSES}, got {num_classes}")
        if count is not None and count < num_classes:
            raise ValueError(f"number of images: expected at least one of each of {num_classes} classes, got {count}")
        chosen = []
        for label in range(num_classes):
            members = torch.nonzero(self.labels == label).flatten()
            name = f"class {label} ({CLASS_NAMES[label]})"
            if len(members) == 0:
                raise ValueError(f"--data: expected images of every class, got none of {name}")
            if count is not None:
                share = count // num_classes + (label < count % num_classes)
                if len(members) < share:
                    warnings.warn(
                        f"{name} has {len(members)} images, {share} were asked for: using all of them", stacklevel=2
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


def load_data(config: TrainingConfig) -> Dataset:
    """The chosen classes and counts of the chosen data, on the CPU."""
    config.check_data()
    if config.synthetic:
        whole = synthetic_cifar10()
    else:
        assert config.data is not None  # check_data
        whole = load_cifar10(config.data, download=config.download)
    return Dataset(
        whole.train.subset(config.classes, config.train_images),
        whole.test.subset(config.classes, config.validation_images),
    )


def load_cifar10(path: str | Path, *, download: bool = False) -> Dataset:
    """Reads CIFAR-10, both splits onto the CPU.

    Args:
        path: the folder of the binary version, or one that holds it. Anything else that `prepare_cifar10.py` knows
            (the python version, the archives) is converted in memory: slower, so run that script once.
        download: fetch the data into `path` first, if it is not there.

    Raises:
        FileNotFoundError: nothing of the kind there, or one of its six files is missing.
        ValueError: a file that is not CIFAR-10.
    """
    root = Path(path).expanduser()
    for folder in (root / FOLDER, root):
        if (folder / TEST_FILE).is_file():
            files = [folder / name for name in (*TRAIN_FILES, TEST_FILE)]
            return decode({file.name: file.read_bytes() for file in files if file.is_file()}, str(folder))
    import prepare_cifar10

    try:
        return decode(prepare_cifar10.read_records(root), str(root))
    except FileNotFoundError:
        if not download:
            raise
        return load_cifar10(prepare_cifar10.prepare(root, download=True))


def decode(files: Mapping[str, bytes], origin: str) -> Dataset:
    """The two splits from the six files of the binary version: any whole number of records each."""

    def split(names: Sequence[str]) -> Split:
        tables = []
        for name in names:
            if name not in files:
                raise FileNotFoundError(f"--data: expected CIFAR-10 in {origin}, but {name} is missing")
            content = files[name]
            if len(content) % RECORD_BYTES:
                raise ValueError(
                    f"--data: expected records of {RECORD_BYTES} bytes in {origin}, got {name} with {len(content)} "
                    f"bytes ({len(content) % RECORD_BYTES} left over)"
                )
            table = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
            if bad := np.flatnonzero(table[:, 0] >= NUM_CLASSES).tolist():
                label = table[bad[0], 0]
                raise ValueError(
                    f"--data: expected labels 0 to 9 in {origin}, got {label} in record {bad[0]} of {name}"
                )
            tables.append(table)
        records = np.concatenate(tables)
        if len(records) == 0:
            raise ValueError(f"--data: expected images in {origin}, got none in {', '.join(names)}")
        images = torch.from_numpy(records[:, 1:].reshape(-1, *IMAGE_SHAPE))
        return Split(images, torch.from_numpy(records[:, 0].astype(np.int64)))

    return Dataset(split(TRAIN_FILES), split((TEST_FILE,)))


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


def copy_to_device_(place: Tensor, values: Tensor) -> None:
    """Writes values that are on the host into a tensor; the host does not wait for a device."""
    pinned = place.is_cuda and values.numel() > 0
    place.copy_(values.pin_memory() if pinned else values, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """images: (B, 3, 32, 32), normalised, in the floating type asked for; labels: (B,) int64.  Or (E, B, ...)."""

    images: Tensor
    labels: Tensor


class Batches:
    """Cuts a split into batches on its device.

    Args:
        split: the images, on the device where the batches are wanted.
        batch_size: images per global batch; the last one of an epoch may be smaller.  None: all at once, in
            file order.
        shuffle: another order in every epoch; otherwise always file order.
        seed: of the order and of the augmentation.  A sequence of E seeds: the batches of each, stacked in a first
            dimension (where nothing is drawn they are the same, and there is no such dimension).
        augment: flip left-right with probability 1/2 and move by up to 4 pixels each way, filling with the
            image's reflection (Zagoruyko & Komodakis, arXiv 1605.07146, section 3); each image on its own.
        dtype: of the normalised images.
        channels_last: their memory format.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int | None = None,
        *,
        shuffle: bool = True,
        seed: int | Sequence[int] = 0,
        augment: bool = False,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"--batch-size: expected at least 1, got {batch_size}")
        device = split.images.device
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.split = Split(split.images.contiguous(memory_format=memory_format), split.labels)
        self.batch_size = len(split) if batch_size is None else min(batch_size, len(split))
        self.shuffle = shuffle and batch_size is not None
        self.seed = seed
        self.augment = augment
        std = 255 * torch.tensor(CHANNEL_STD, dtype=torch.float64).view(3, 1, 1)
        mean = 255 * torch.tensor(CHANNEL_MEAN, dtype=torch.float64).view(3, 1, 1)
        self._scale = (1 / std).to(device, dtype)
        self._shift = (-mean / std).to(device, dtype)
        self._channel = torch.arange(3, device=device).view(1, 3, 1, 1)
        self._pixel = torch.arange(split.images.shape[-1], device=device)
        self._places = torch.arange(self.batch_size, device=device)
        self._memory_format = memory_format
        self._epoch = -1
        self._order = self._flip = self._move = torch.empty(0)

    @property
    def per_epoch(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def size(self, step: int) -> int:
        """Images in the global batch of this step."""
        start = step % self.per_epoch * self.batch_size
        return min(self.batch_size, len(self.split) - start)

    def get(self, step: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """Shard `shard` of the global batch of step `step`; shards differ by one image at most."""
        self.begin(step)
        first, rows = step % self.per_epoch * self.batch_size, self._part(self.size(step), shard, num_shards)
        return self._cut(slice(first + rows.start, first + rows.stop))

    def begin(self, step: int) -> None:
        """Draws the random choices of this step's epoch, unless it has; in place, where `get_at` looks for them."""
        epoch = step // self.per_epoch
        if epoch != self._epoch and (self.shuffle or self.augment):
            self._draw(epoch)

    def get_at(self, step: Tensor, size: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """`get` for a step that is kept on the device, of a global batch of `size` images, after `begin`.

        Nothing goes to the device or comes from there, so a CUDA graph may hold it.
        """
        rows = self._part(size, shard, num_shards)
        if self.per_epoch == 1:
            return self._cut(rows)
        first = step % self.per_epoch * self.batch_size
        return self._cut(first + self._places[rows])

    def _part(self, size: int, shard: int, num_shards: int) -> slice:
        return slice(shard * size // num_shards, (shard + 1) * size // num_shards)

    def _cut(self, rows: slice | Tensor) -> Batch:
        """The images in these places of the epoch's order."""
        if not self.shuffle and not self.augment:
            return self.normalise(self.split.images[rows], self.split.labels[rows])
        index = self._order[..., rows]
        images = self._crop(index, rows) if self.augment else self.split.images[index]
        return self.normalise(images, self.split.labels[index])

    def normalise(self, images: Tensor, labels: Tensor) -> Batch:
        """uint8 (B, 3, 32, 32) -> zero mean, unit variance per channel over the training set."""
        scaled = torch.addcmul(self._shift, images.to(self._scale.dtype), self._scale)
        return Batch(scaled.contiguous(memory_format=self._memory_format) if scaled.dim() == 4 else scaled, labels)

    def _draw(self, epoch: int) -> None:
        """The random choices of a whole epoch, drawn on the CPU: the same on every device."""
        seeds = [self.seed] if isinstance(self.seed, int) else self.seed
        draws = zip(*[self._draw_one(seed, epoch) for seed in seeds], strict=True)
        tensors = [choice[0] if isinstance(self.seed, int) else torch.stack(choice) for choice in draws]
        if self._epoch < 0:
            self._order, self._flip, self._move = (tensor.to(self.split.images.device) for tensor in tensors)
        else:
            for place, tensor in zip((self._order, self._flip, self._move), tensors, strict=True):
                copy_to_device_(place, tensor)
        self._epoch = epoch

    def _draw_one(self, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Order (N,), flips (N,) and moves (N, 2) of one seed."""
        state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        count = len(self.split)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        if not self.augment:
            return order, torch.empty(0), torch.empty(0)
        flip = torch.randint(2, (count,), generator=generator, dtype=torch.bool)
        move = torch.randint(-CROP_MARGIN, CROP_MARGIN + 1, (2, count), generator=generator)
        return order, flip, move.T

    def _crop(self, index: Tensor, rows: slice | Tensor) -> Tensor:
        """Gathers, moves and mirrors in one indexing operation, without a padded copy."""
        down, right = self._move[..., rows, :].unsqueeze(-2).unbind(-1)
        column = torch.where(self._flip[..., rows, None], self._pixel.flip(0), self._pixel)
        row, column = self._reflect(self._pixel + down), self._reflect(column + right)
        return self.split.images[
            index[..., None, None, None], self._channel, row[..., None, :, None], column[..., None, None, :]
        ]

    def _reflect(self, position: Tensor) -> Tensor:
        last = len(self._pixel) - 1
        return last - (last - position.abs()).abs()
