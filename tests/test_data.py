"""The CIFAR-10 reader, against hand-made files."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10_files import check_equal, pack, write_binary, write_python

import prepare_cifar10
from common.data import FOLDER, Split, load_cifar10, synthetic_cifar10
from prepare_cifar10 import BINARY_ARCHIVE, PYTHON_ARCHIVE, PYTHON_FOLDER


@pytest.mark.parametrize("inside", [True, False])
def test_binary_folder(tmp_path: Path, inside: bool) -> None:
    table = write_binary(tmp_path / FOLDER)
    check_equal(load_cifar10(tmp_path if not inside else tmp_path / FOLDER), table)


@pytest.mark.parametrize("protocol", [2, 4])
def test_python_folder(tmp_path: Path, protocol: int) -> None:
    table = write_python(tmp_path / PYTHON_FOLDER, protocol)
    check_equal(load_cifar10(tmp_path), table)


def test_pickle_written_by_python_2() -> None:
    # What Python 2 wrote for {"data": uint8 (1, 3072) array, "labels": [7]}: byte strings, old module names.
    pixels = bytes(range(256)) * 12
    stream = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(pixels).to_bytes(4, "little")
        + pixels
        + b"tbU\x06labelsq\x08]q\x09K\x07au."
    )
    assert prepare_cifar10._to_binary(stream, "test_batch") == b"\x07" + pixels


@pytest.mark.parametrize(
    ("write", "folder", "name"),
    [(write_binary, FOLDER, BINARY_ARCHIVE), (write_python, PYTHON_FOLDER, PYTHON_ARCHIVE)],
)
@pytest.mark.parametrize("official_name", [True, False])
def test_archive_is_read_in_place_and_warns_of_other_bytes(tmp_path, write, folder, name, official_name) -> None:
    table = write(tmp_path / "source" / folder)
    archive = pack(tmp_path / (name if official_name else "mine.tgz"), tmp_path / "source" / folder)
    before = sorted(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="not the official one"):
        check_equal(load_cifar10(tmp_path if official_name else archive), table)
    assert sorted(tmp_path.iterdir()) == before


def test_archive_with_the_official_checksum_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_binary(tmp_path / FOLDER)
    archive = pack(tmp_path / BINARY_ARCHIVE, tmp_path / FOLDER)
    monkeypatch.setitem(prepare_cifar10.MD5, BINARY_ARCHIVE, hashlib.md5(archive.read_bytes()).hexdigest())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(load_cifar10(archive), table)


def test_any_whole_number_of_records_is_valid(tmp_path: Path) -> None:
    table = write_binary(tmp_path, (1, 0, 7, 2, 3, 5))
    check_equal(load_cifar10(tmp_path), table, num_train=13)


def test_broken_record_is_an_error(tmp_path: Path) -> None:
    write_binary(tmp_path)
    with (tmp_path / "data_batch_3.bin").open("ab") as file:
        file.write(b"\0" * 100)
    with pytest.raises(
        ValueError, match=r"records of 3073 bytes in .*, got data_batch_3.bin with 12392 bytes \(100 left over\)"
    ):
        load_cifar10(tmp_path)


def test_label_above_nine_is_an_error(tmp_path: Path) -> None:
    write_binary(tmp_path)
    content = bytearray((tmp_path / "test_batch.bin").read_bytes())
    content[2 * 3073] = 10
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected labels 0 to 9 in .*, got 10 in record 2 of test_batch\.bin"):
        load_cifar10(tmp_path)


def test_negative_label_in_a_pickle_is_an_error(tmp_path: Path) -> None:
    write_python(tmp_path)
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, -1]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match="expected labels 0 to 9, got -1 in record 1"):
        load_cifar10(tmp_path)


def test_empty_split_and_missing_file_are_errors(tmp_path: Path) -> None:
    write_binary(tmp_path / "empty", (4, 4, 4, 4, 4, 0))
    with pytest.raises(ValueError, match=r"expected images in .*, got none in test_batch.bin"):
        load_cifar10(tmp_path / "empty")
    write_binary(tmp_path / "missing")
    (tmp_path / "missing" / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4.bin is missing"):
        load_cifar10(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"--data: expected CIFAR-10 in .*, got .*nowhere"):
        load_cifar10(tmp_path / "nowhere")


class _Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a pickle was run')",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": _Hostile(), b"labels": []}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8).view(np.recarray), b"labels": [0]}, protocol=2),
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, protocol=2),
    ],
)
def test_a_pickle_that_is_not_a_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    write_python(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_1"):
        load_cifar10(tmp_path)


def archive_with(path: Path, member: tarfile.TarInfo, content: bytes = b"") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.filterwarnings("ignore:.*not the official")
@pytest.mark.parametrize("name", ["../evil.bin", "/etc/evil", "cifar-10-batches-bin/../../data_batch_1.bin"])
def test_path_traversing_archive_is_refused(tmp_path: Path, name: str) -> None:
    archive_with(tmp_path / BINARY_ARCHIVE, tarfile.TarInfo(name), b"x")
    with pytest.raises(ValueError, match=r"--data: expected paths inside .*: not loaded"):
        load_cifar10(tmp_path)


@pytest.mark.filterwarnings("ignore:.*not the official")
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_archive_with_a_link_is_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    member.type, member.linkname = kind, "/etc/passwd"
    archive_with(tmp_path / BINARY_ARCHIVE, member)
    with pytest.raises(ValueError, match=r"--data: expected files in .*, a link or a device"):
        load_cifar10(tmp_path)


@pytest.mark.filterwarnings("ignore:.*not the official")
def test_damaged_archive_is_a_clear_error(tmp_path: Path) -> None:
    write_binary(tmp_path / FOLDER)
    whole = pack(tmp_path / "whole.tgz", tmp_path / FOLDER).read_bytes()
    for content in (b"garbage", whole[: len(whole) // 2]):
        (tmp_path / "bad.tar.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"--data: expected a tar archive, got .*bad.tar.gz"):
            load_cifar10(tmp_path / "bad.tar.gz")


def test_subset_is_balanced_and_in_file_order() -> None:
    labels = torch.tensor([2, 0, 1, 0, 3, 1, 0, 2, 1])
    split = Split(torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1), labels)
    chosen = split.subset(3, 5)
    assert chosen.labels.tolist() == [2, 0, 1, 0, 1]
    assert chosen.images.flatten().tolist() == [0, 1, 2, 3, 5]
    assert split.subset(3).labels.tolist() == [2, 0, 1, 0, 1, 0, 2, 1]
    with pytest.warns(UserWarning, match=r"class 2 \(bird\) has 2 images, 3 were asked for"):
        assert len(split.subset(3, 9)) == 8
    with pytest.raises(ValueError, match="--classes: expected 1 to 10, got 11"):
        split.subset(11)
    with pytest.raises(ValueError, match="expected at least one of each of 3 classes, got 2"):
        split.subset(3, 2)
    with pytest.raises(ValueError, match=r"expected images of every class, got none of class 4 \(deer\)"):
        split.subset(5)


def test_synthetic_is_reproducible_balanced_and_learnable() -> None:
    data = synthetic_cifar10(40, 20)
    assert data.train.fingerprint() == synthetic_cifar10(40, 20).train.fingerprint()
    assert data.train.fingerprint() != synthetic_cifar10(40, 20, seed=1).train.fingerprint()
    assert data.train.labels.bincount().tolist() == [40] * 10
    train, test = data.train.images.float().flatten(1), data.test.images.float().flatten(1)
    centres = torch.stack([train[data.train.labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(test, centres).argmin(1) == data.test.labels).float().mean()
    assert 0.5 < accuracy <= 1.0  # far above chance, by the simplest classifier
