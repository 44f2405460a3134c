"""The batches: their order, shards and augmentation."""

from __future__ import annotations

import pytest
import torch

from common import data as cifar10
from common.data import Batches, Split, synthetic_cifar10


def numbered(count: int) -> Split:
    """Image i holds the value i everywhere."""
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 3, 32, 32)
    return Split(images.contiguous(), torch.arange(count) % 10)


def test_an_epoch_visits_every_image_once_in_a_new_order() -> None:
    batches = Batches(numbered(23), 5, seed=3, dtype=torch.float64)
    assert batches.per_epoch == 5
    assert [batches.size(step) for step in range(6)] == [5, 5, 5, 5, 3, 5]
    scale = 255 * cifar10.CHANNEL_STD[0]
    orders = []
    for epoch in range(2):
        pixels = torch.cat([batches.get(5 * epoch + i).images[:, 0, 0, 0] for i in range(5)])
        orders.append((pixels * scale + 255 * cifar10.CHANNEL_MEAN[0]).round().int().tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(23))
    assert orders[0] != orders[1] != list(range(23))


def test_a_batch_depends_on_seed_and_step_only() -> None:
    def make(seed: int) -> Batches:
        return Batches(numbered(23), 5, seed=seed, augment=True)

    straight, jumping = make(3), make(3)
    forward = [straight.get(step) for step in range(12)]
    for step in (11, 0, 7, 3):
        batch = jumping.get(step)
        assert torch.equal(batch.images, forward[step].images)
        assert torch.equal(batch.labels, forward[step].labels)
    assert not torch.equal(make(4).get(0).labels, forward[0].labels)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_shards_are_the_parts_of_the_global_batch(num_shards: int) -> None:
    batches = Batches(numbered(23), 10, seed=1, augment=True)
    for step in range(3):
        whole = batches.get(step)
        parts = [batches.get(step, shard, num_shards) for shard in range(num_shards)]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        sizes = [len(part.labels) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(10, {}), (10, {"augment": True}), (10, {"shuffle": False}), (10, {"seed": [1, 2], "augment": True}), (None, {}),
     (None, {"augment": True}), (23, {})],
    ids=str,
)  # fmt: skip
def test_a_batch_is_the_same_for_a_step_that_lies_on_the_device(batch_size, options) -> None:
    plain, batches = (Batches(numbered(23), batch_size, **options) for _ in range(2))
    step = torch.zeros((), dtype=torch.int64)
    for number in (0, 1, 2, 3, 8, 2):
        step.fill_(number)
        batches.begin(number)
        for shard in range(3):
            expected, actual = plain.get(number, shard, 3), batches.get_at(step, plain.size(number), shard, 3)
            assert torch.equal(actual.images, expected.images)
            assert torch.equal(actual.labels, expected.labels)


def test_the_order_of_every_epoch_lies_in_the_same_place() -> None:
    batches = Batches(numbered(23), 5, augment=True)
    places = set()
    for step in range(0, 20, 5):
        batches.begin(step)
        places.add(tuple(tensor.data_ptr() for tensor in (batches._order, batches._flip, batches._move)))
    assert len(places) == 1  # which a graph has noted


def test_full_batch_is_the_whole_split_in_file_order() -> None:
    split = synthetic_cifar10(2, 1).train
    batches = Batches(split, dtype=torch.float64)
    assert batches.per_epoch == 1
    for step in (0, 9):
        assert torch.equal(batches.get(step).labels, split.labels)
    mean = torch.tensor(cifar10.CHANNEL_MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(cifar10.CHANNEL_STD, dtype=torch.float64).view(3, 1, 1)
    expected = (split.images.double() / 255 - mean) / std
    torch.testing.assert_close(batches.get(0).images, expected, rtol=0, atol=1e-12)


def test_augmentation_is_a_crop_of_the_reflected_image_per_sample() -> None:
    split = synthetic_cifar10(20, 1).train
    plain = Batches(split, dtype=torch.float64).get(0).images
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4), mode="reflect")
    batches = Batches(split, 200, seed=5, augment=True, dtype=torch.float64)
    batch = batches.get(0)
    seen = set()
    for row, source in enumerate(batches._order.tolist()):
        down, right = (int(move) for move in batches._move[row])
        crop = padded[source, :, 4 + down : 36 + down, 4 + right : 36 + right]
        flip = bool(batches._flip[row])
        assert torch.equal(batch.images[row], crop.flip(2) if flip else crop)
        seen.add((down, right, flip))
    assert len(seen) > 50  # each image its own
    assert {move for move, _, _ in seen} == set(range(-4, 5))


def test_channels_last_changes_the_layout_only() -> None:
    split = synthetic_cifar10(4, 1).train
    a = Batches(split, 8, augment=True).get(0).images
    b = Batches(split, 8, augment=True, channels_last=True).get(0).images
    assert b.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(a, b)
