"""The CIFAR-10 reader, `prepare_cifar10.py` and the batches, against hand-made files and a loopback server."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_cifar10
from common import data as cifar10
from common.data import FOLDER, Batches, Split, load_cifar10, synthetic_cifar10
from prepare_cifar10 import BINARY_ARCHIVE, PYTHON_ARCHIVE, PYTHON_FOLDER, download_cifar10, prepare

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


# --- prepare_cifar10.py -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*not the official")
@pytest.mark.parametrize("source", ["binary folder", "python folder", "binary archive", "python archive"])
def test_prepare_makes_the_binary_folder_of_any_form(tmp_path: Path, source: str) -> None:
    write, name = (write_binary, FOLDER) if "binary" in source else (write_python, PYTHON_FOLDER)
    data = tmp_path / "data"
    data.mkdir()
    folder = (data if "folder" in source else tmp_path) / name
    table = write(folder)
    if "archive" in source:
        pack(data / "any.tar", folder)
        data = data / "any.tar"
    made = prepare(data)
    assert made == tmp_path / "data" / FOLDER
    assert sorted(path.name for path in made.iterdir()) == sorted(f"{name}.bin" for name in FILES)
    assert b"".join((made / f"{name}.bin").read_bytes() for name in FILES) == table.tobytes()
    check_equal(load_cifar10(made), table)
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert prepare(made) == prepare(made.parent) == made  # nothing left to do
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_prepare_writes_nothing_of_a_broken_source(tmp_path: Path) -> None:
    write_python(tmp_path / PYTHON_FOLDER)
    (tmp_path / PYTHON_FOLDER / "data_batch_2").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_2.bin is missing"):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PYTHON_FOLDER]


def test_prepare_as_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    table = write_binary(tmp_path / "source" / FOLDER)

    def fetch(folder: Path) -> Path:
        folder.mkdir()
        return pack(folder / BINARY_ARCHIVE, tmp_path / "source" / FOLDER)

    monkeypatch.setattr(prepare_cifar10, "download_cifar10", fetch)
    with pytest.raises(SystemExit, match=r"prepare_cifar10.py: --data: expected CIFAR-10 in"):
        prepare_cifar10.main(tmp_path / "new")
    with pytest.warns(UserWarning, match="not the official one"):
        prepare_cifar10.main(tmp_path / "new", download=True)
    assert f"ready in {tmp_path / 'new' / FOLDER}" in capsys.readouterr().out
    check_equal(load_cifar10(tmp_path / "new"), table)


# --- download -------------------------------------------------------------------------------------


class Server:
    """A loopback HTTP server of one file; each answer breaks off after `cut` bytes; `ranges` known or not."""

    def __init__(self, content: bytes, ranges: bool = True, cut: int | None = None) -> None:
        requests: list[str | None] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                requests.append(wanted)
                start = int(wanted[6:-1]) if wanted and server.ranges else 0
                if start >= len(content) and wanted:
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start : None if server.cut is None else start + server.cut])

            def log_message(self, *args: object) -> None:
                pass

        self.requests, self.ranges, self.cut = requests, ranges, cut
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}/"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()


CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_download_verifies_and_keeps_the_archive(tmp_path: Path) -> None:
    with Server(CONTENT) as server:
        path = download_cifar10(tmp_path, md5=MD5, address=server.address)
        assert path == tmp_path / BINARY_ARCHIVE
        assert path.read_bytes() == CONTENT
        download_cifar10(tmp_path, md5=MD5, address=server.address)
        assert server.requests == [None]  # the second call found the file
    assert list(tmp_path.iterdir()) == [path]


def test_download_resumes_where_it_broke_off(tmp_path: Path) -> None:
    with Server(CONTENT, cut=100_000) as server:
        assert download_cifar10(tmp_path, md5=MD5, address=server.address).read_bytes() == CONTENT
        assert server.requests == [None, "bytes=100000-", "bytes=200000-"]


def test_download_continues_the_part_file_of_a_killed_process(tmp_path: Path) -> None:
    (tmp_path / (BINARY_ARCHIVE + ".part")).write_bytes(CONTENT[:777])
    with Server(CONTENT) as server:
        assert download_cifar10(tmp_path, md5=MD5, address=server.address).read_bytes() == CONTENT
        assert server.requests == ["bytes=777-"]


def test_download_from_a_server_without_ranges_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / (BINARY_ARCHIVE + ".part")).write_bytes(b"?" * 777)
    with Server(CONTENT, ranges=False) as server:
        assert download_cifar10(tmp_path, md5=MD5, address=server.address).read_bytes() == CONTENT


def test_download_accepts_a_complete_part_file(tmp_path: Path) -> None:
    (tmp_path / (BINARY_ARCHIVE + ".part")).write_bytes(CONTENT)
    with Server(CONTENT) as server:
        assert download_cifar10(tmp_path, md5=MD5, address=server.address).read_bytes() == CONTENT


def test_download_with_the_wrong_checksum_is_removed(tmp_path: Path) -> None:
    message = f"expected md5 {MD5}, got .*; the download is removed"
    with Server(CONTENT[:-1] + b"!") as server, pytest.raises(ValueError, match=message):
        download_cifar10(tmp_path, md5=MD5, address=server.address)
    assert list(tmp_path.iterdir()) == []


def test_download_gives_up_clearly_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_cifar10, "_ATTEMPTS", 2)
    with (
        Server(CONTENT, cut=1000) as server,
        pytest.raises(OSError, match="broke off 2 times; run again to continue"),
    ):
        download_cifar10(tmp_path, md5=MD5, address=server.address)
    assert (tmp_path / (BINARY_ARCHIVE + ".part")).stat().st_size == 2000


# --- batches --------------------------------------------------------------------------------------


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
