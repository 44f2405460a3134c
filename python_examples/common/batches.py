"""Batches of a data set on the device: order, crops and flips are a pure function of (seed, epoch).

Nothing is drawn from a running random state, so an interrupted run finds its place from the step alone, and
every process of a distributed run sees the same global batch and takes its own part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.cifar10 import CHANNEL_MEAN, CHANNEL_STD, Split

CROP_MARGIN = 4  # pixels a crop may move each way


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
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
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
        epoch, position = divmod(step, self.per_epoch)
        first, size = position * self.batch_size, self.size(step)
        rows = slice(first + shard * size // num_shards, first + (shard + 1) * size // num_shards)
        if not self.shuffle and not self.augment:
            return self.normalise(self.split.images[rows], self.split.labels[rows])
        if epoch != self._epoch:
            self._draw(epoch)
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
        self._order, self._flip, self._move = (tensor.to(self.split.images.device) for tensor in tensors)
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

    def _crop(self, index: Tensor, rows: slice) -> Tensor:
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
