"""What is wrong on purpose: code, bombs, and other values than a reader expects; the same for the same draws."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Calls:
    """Unpickled, this is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(canary: Path, rng: random.Random) -> Any:
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    return rng.choice(
        [
            _Calls(os.system, command),
            _Calls(exec, code),
            _Calls(eval, code),
            _Calls(open, str(canary), "w"),
            _Calls(Path.touch, canary),
            _Calls(getattr, "x", "join"),
            _Calls(np.load, str(canary)),
            _Calls(np.ndarray, (1 << 40,)),
            _Calls(np.ndarray, (200_000_000,), "O"),
            _Calls(np.dtype, "V2000000000"),
            _Calls(bytearray, 1 << 20),  # larger ones are made by torch.load itself, before it refuses them
            _Calls(torch.zeros, 1 << 31),
            _Calls(np.frombuffer, b"12345678", "O"),
        ]
    )


def laughs(depth: int) -> list[Any]:
    """A list of two of the same list, and so on: small as a pickle, 2^depth as an array."""
    x: list[Any] = [1]
    for _ in range(depth):
        x = [x, x]
    return x


def bombs(rng: random.Random) -> bytes:
    """Pickles that ask for more than they hold."""
    huge = rng.choice([1 << 27, 1 << 31, (1 << 32) - 1])
    return rng.choice(
        [
            b"\x80\x02}r" + struct.pack("<I", huge) + b".",  # LONG_BINPUT
            b"\x80\x05\x96" + struct.pack("<Q", huge << 8) + b"x.",  # BYTEARRAY8
            b"\x80\x05\x96" + struct.pack("<Q", huge >> 1) + b"x.",
            b"\x80\x04\x8e" + struct.pack("<Q", huge) + b"x.",  # BINBYTES8
            b"\x80\x04\x95" + struct.pack("<Q", huge) + b"x.",  # FRAME
            b"\x80\x02\x8b" + struct.pack("<I", huge >> 1) + b"x.",  # LONG4
            b"(" * 100_000 + b"t" * 100_000 + b".",
            b"\x80\x02]" + b"]a" * 10 + b"(" * 1000 + b".",
            b"I" + b"9" * 5000 + b"\n.",
            b"",
        ]
    )


def oddity(rng: random.Random, depth: int = 0) -> Any:
    """Any value of JSON's types."""
    scalars = [None, True, False, 0, -1, 1, 2**70, -0.5, 1e308, float("nan"), float("inf"), "", "cpu", "\u0000", "../x"]
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(scalars)
    if rng.random() < 0.5:
        return [oddity(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(oddity(rng, 9)): oddity(rng, depth + 1) for _ in range(rng.randrange(4))}


_NO_OBJECTS = [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff\xfe{}", b"[]", b"null", b'"x"', b""]


def other_json(content: bytes, rng: random.Random, canary: Path) -> bytes:
    """Another value at a random place, or something else altogether."""
    if rng.random() < 0.1:
        return rng.choice(_NO_OBJECTS)
    value = json.loads(content)
    place = value
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        place[key] = oddity(rng)
        if rng.random() < 0.2 and isinstance(place, dict):
            del place[key]
        return json.dumps(value).encode()


def odd_array(rng: random.Random) -> Any:
    shape = rng.choice([(), (0,), (1,), (3,), (2, 3), (0, 3), (1, 1, 1)])
    kind = rng.choice(["f8", "f4", "f2", "i8", "u1", "u8", "c16", "U3", "S2", "?", "M8[s]", "V4", "O", ">f8", "i4,f8"])
    return np.zeros(shape, kind)


@functools.cache
def _large_npz(name: str) -> bytes:
    """480 MB of zeros in 500 kB."""
    sink = io.BytesIO()
    np.savez_compressed(sink, **{name: np.zeros(60_000_000)})
    return sink.getvalue()


def npz(arrays: dict[str, Any], rng: random.Random, canary: Path) -> bytes:
    """The arrays with one exchanged; or one that is a bomb, or code."""
    arrays, name = dict(arrays), rng.choice(list(arrays))
    sink, compress = io.BytesIO(), rng.random() < 0.3
    how = rng.randrange(10)
    if how == 0:
        del arrays[name]
    elif how == 1:
        arrays[name] = np.array([_Calls(open, str(canary), "w")], object)
    elif how == 2 and rng.random() < 0.05:
        return _large_npz(name)
    elif how == 3:  # a header that promises what is not there
        raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
        text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({rng.choice([1 << 28, 1 << 40])},)}}"
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr(f"{name}.npy", raw + text.ljust(117).encode() + b"\n")
        return sink.getvalue()
    elif how == 4:
        np.save(sink, np.zeros(3))
        return sink.getvalue()
    else:
        arrays[name] = odd_array(rng)
    (np.savez_compressed if compress else np.savez)(sink, **arrays)
    return sink.getvalue()
