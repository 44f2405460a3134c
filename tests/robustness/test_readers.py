"""Two thousand damaged, forged and hostile files: each is read right or refused, and nothing else happens."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from pathlib import Path

import pytest
from robustness import fuzzing, readers

from common import data, run, spiral, sweep
from dynloss_ext import DynamicCrossEntropyLoss, Oscillation


@pytest.mark.parametrize(
    ("target", "numbers"), list(fuzzing.shared_out(readers.ALL, 2000)), ids=lambda x: getattr(x, "name", "")
)
def test_reads_right_or_refuses(target: fuzzing.Target, numbers: range) -> None:
    assert fuzzing.fuzz(target, numbers) == []


def _write(folder: Path) -> list[Path]:
    (folder / "file").write_text("good")
    return [folder / "file"]


def _bad(how: str) -> fuzzing.Target:
    def read(folder: Path) -> str:
        text = (folder / "file").read_bytes()
        if text == b"good":
            return "good"
        match how:
            case "other exception":
                raise KeyError(text)
            case "unclear":
                raise ValueError("bad")
            case "crash":
                os.abort()
            case "memory":
                return bytes(300 << 20).decode()[:4]
            case "code":
                os.system(":")
            case "hang":
                time.sleep(60)
        return "other"

    return fuzzing.Target(how, _write, read, (ValueError,), right=lambda a, b: a == b)


@pytest.mark.parametrize("how", ["other exception", "unclear", "crash", "memory", "code", "hang", "wrong"])
def test_what_a_reader_must_not_do_is_seen(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "hang":
        monkeypatch.setattr(fuzzing, "SECONDS", 0.5)
    faults = fuzzing.fuzz(_bad(how), range(2))
    words = {"other exception": "KeyError", "crash": "ended", "memory": "MiB", "code": "ran", "hang": "took more"}
    assert words.get(how, how) in " ".join(fault.what for fault in faults)


def test_damage_is_damage_and_the_same_each_time() -> None:
    for content in (b"", b"x", bytes(range(256))):
        made = [fuzzing.damaged(content, random.Random(seed)) for seed in range(100)]
        assert content not in made
        assert made == [fuzzing.damaged(content, random.Random(seed)) for seed in range(100)]


# ---- what was found


@pytest.mark.filterwarnings("ignore:.*not the official")
def test_an_archive_that_unpacks_to_more_than_cifar10_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "bomb.tar.gz").write_bytes(readers._large_archive())
    with pytest.raises(ValueError, match=r"expected files of at most 104857600 bytes in .*, got x/test_batch.bin"):
        data.load_cifar10(tmp_path / "bomb.tar.gz")


@pytest.mark.parametrize("members", [0, -1, True, 2.0, None])
def test_a_sweep_of_no_members_a_chunk_is_refused(tmp_path: Path, members: object) -> None:
    text = "null" if members is None else str(members).lower()
    (tmp_path / "sweep.json").write_text(f'{{"chunk_members": {text}}}')
    with pytest.raises(run.RunError, match=r"sweep.json: expected the options of a sweep"):
        sweep.SweepFolder(tmp_path, {}, None)


def test_the_loss_of_a_function_before_step_zero_is_that_of_its_weights() -> None:
    """Found by `op_cases.py`: Γ was 1 there."""
    oscillation = Oscillation.from_function(lambda step: [2.0 - step, 1.0], 2)
    criterion = DynamicCrossEntropyLoss(oscillation)
    logits, target = readers.torch.zeros(1, 2, dtype=readers.torch.float64), readers.torch.tensor([0])
    assert oscillation.weights(-3).tolist() == [5, 1]
    assert float(criterion(logits, target, -3)) == pytest.approx(5 * float(readers.np.log(2)))


def test_any_flipped_byte_of_a_chunk_is_noticed(tmp_path: Path) -> None:
    """In the footer, too, of which Parquet has no checksum; and the file is one for any reader."""
    (file,) = readers._write_chunk(tmp_path)
    good, expected = file.read_bytes(), readers._read_chunk(tmp_path)
    assert readers.pq.read_table(file).to_pylist() == expected
    for at in range(len(good)):
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            raise AssertionError(at, readers._read_chunk(tmp_path))
        except run.RunError as error:
            assert "damaged" in str(error)


def test_a_chunk_whose_checksum_is_damaged_beside_its_footer_is_noticed() -> None:
    """Found by `readers.py`: what did not begin like a checksum was read as a file without one."""
    (target,) = (target for target in readers.ALL if target.name == "chunk of a sweep")
    assert [fuzzing.fuzz(target, range(number, number + 1)) for number in (415621, 915159)] == [[], []]


def test_an_archive_that_asks_for_memory_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by `guided.py`: the header of an LZMA stream names 4 GiB."""
    monkeypatch.setattr(fuzzing, "ADDRESSES", 1 << 30)
    (target,) = (target for target in readers.ALL if target.name == "CIFAR-10, tar")

    def forge(good: bytes, rng: random.Random, canary: Path) -> bytes:
        return b"\x5d" + b"\xff" * 12 + bytes(100)

    assert fuzzing.fuzz(dataclasses.replace(target, forge=forge), range(10)) == []


def test_initial_values_of_no_points_are_refused(tmp_path: Path) -> None:
    empty = readers._INITIAL | {"X": readers.np.zeros((0, 2)), "y": readers.np.zeros(0, int)}
    readers.np.savez(tmp_path / "none.npz", **empty)
    with pytest.raises(ValueError, match=r"--init: expected points in .*none.npz, got none"):
        spiral.load_initial_values(tmp_path / "none.npz")


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    """Found by `readers.py`: NumPy gives the bytes of a part whose first ones are not its own."""
    with readers.zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        for name in readers._INITIAL:
            archive.writestr(f"{name}.npy", b"no array")
    with pytest.raises(ValueError, match=r"--init: expected an \.npz file of plain arrays"):
        spiral.load_initial_values(tmp_path / "other.npz")
