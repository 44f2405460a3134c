"""Makes the folder `cifar-10-batches-bin` that the other scripts read fastest, from CIFAR-10 in any published form.

    python python_examples/prepare_cifar10.py --data DATA --download
    python python_examples/prepare_cifar10.py --data DATA

DATA is a folder that holds the binary version, the python version or one of the official archives, or one of these
itself. Archives are read in place, and the python version's pickles are opened by an unpickler that knows NumPy
arrays and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import io
import lzma
import os
import pickle
import re
import sys
import tarfile
import urllib.error
import urllib.request
import warnings
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from common.data import FOLDER, IMAGE_BYTES, NUM_CLASSES, TEST_FILE, TRAIN_FILES, decode
from common.run import atomic_write

OFFICIAL_ADDRESS = "https://www.cs.toronto.edu/~kriz/"
BINARY_ARCHIVE, PYTHON_ARCHIVE = "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
MD5 = {BINARY_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530", PYTHON_ARCHIVE: "c58f30108f718f92721af3b95e74349a"}
PYTHON_FOLDER = "cifar-10-batches-py"
_FILES = {name: name.removesuffix(".bin") for name in (*TRAIN_FILES, TEST_FILE)}  # binary version: python version
_ATTEMPTS = 5
_TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 1 << 16
_LARGEST = 100 << 20  # bytes of a file in an archive: three times what CIFAR-10 has; an archive may unpack to anything


def main(data: Path, download: bool = False) -> None:
    """Prepares CIFAR-10 for the scripts.

    Args:
        data: folder with CIFAR-10, or the archive itself
        download: fetch the archive into --data first, if there is no CIFAR-10
    """
    try:
        print(f"CIFAR-10 is ready in {prepare(data, download=download)}")
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_cifar10.py: {error}")


def prepare(path: Path, *, download: bool = False) -> Path:
    """Writes the folder of the binary version into `path`, or beside it if that is an archive, and returns it.

    Raises:
        FileNotFoundError: no CIFAR-10 at `path`.
        ValueError: a broken record, a label above 9, a pickle that holds anything but arrays, an archive with a
            member outside its own folder.
    """
    root = path.expanduser()
    try:
        files = read_records(root)
    except FileNotFoundError:
        if not download:
            raise
        files = read_records(download_cifar10(root))
    decode(files, str(root))
    folder = (root.parent if root.is_file() else root) / FOLDER
    for ready in (root, folder):
        if all((ready / name).is_file() for name in _FILES):
            return ready
    folder.mkdir(exist_ok=True)
    for name in _FILES:  # the last is the one by which the folder is recognised
        with atomic_write(folder / name) as file:
            file.write(files[name])
    return folder


def read_records(root: Path) -> dict[str, bytes]:
    """The files of the binary version, converted from whatever form of CIFAR-10 is at `root`, by their names."""
    names = (FOLDER, PYTHON_FOLDER, BINARY_ARCHIVE, PYTHON_ARCHIVE)
    for place in (root, *(root / name for name in names)):
        if place.is_file():
            files = _read_archive(place)
        else:
            found = [place / name for names in _FILES.items() for name in names if (place / name).is_file()]
            files = {file.name: file.read_bytes() for file in found}
        if TEST_FILE in files:
            return files
        if _FILES[TEST_FILE] in files:
            return {
                name: _to_binary(files[source], f"{place}: {source}")
                for name, source in _FILES.items()
                if source in files
            }
    raise FileNotFoundError(f"--data: expected CIFAR-10 in {', '.join(names)} or in --data itself, got {root}")


def _read_archive(archive: Path) -> dict[str, bytes]:
    """The data files of an archive under any name; refuses what an extraction would have to fear."""
    if (md5 := _md5(archive)) not in MD5.values():
        warnings.warn(f"{archive}: md5 {md5} is not the official one: not the bytes that were published", stacklevel=2)
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"--data: expected paths inside {archive}, got {member.name}: not loaded")
                if not (member.isfile() or member.isdir()):
                    raise ValueError(f"--data: expected files in {archive}, got {member.name}, a link or a device")
                if path.name in files:
                    raise ValueError(f"--data: expected each file once in {archive}, got {path.name} twice")
                if member.size > _LARGEST:
                    got = f"{member.name} with {member.size}"
                    raise ValueError(f"--data: expected files of at most {_LARGEST} bytes in {archive}, got {got}")
                if path.name in _FILES or path.name in _FILES.values():
                    stream = tar.extractfile(member)
                    files[path.name] = stream.read() if stream else b""
    # LZMA's header may ask for 4 GiB before anything else is looked at.
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, MemoryError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"--data: expected a tar archive, got {archive}: {why}") from error
    return files


# --- the python version -----------------------------------------------------------------------------------------


class _ArrayUnpickler(pickle._Unpickler):
    """Builds dicts, lists, strings, numbers and NumPy arrays of integers; everything else is refused.

    The unpickler in Python, as that in C makes room for any place that a stream says it needs in its memo; without the
    opcode that makes room for any bytearray.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _PLAIN_ARRAY if name == "ndarray" else _integer_dtype
        if module == "_codecs" and name == "encode":  # how protocol 2 writes bytes
            return _latin1_bytes
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


_PLAIN_ARRAY = "numpy.ndarray"  # stands for the class: nothing in a stream may call it


def _integer_dtype(name: str | bytes, *copies: object) -> np.dtype[Any]:
    text = name.decode("latin1") if isinstance(name, bytes) else name
    if not re.fullmatch("[biu][1248]", text):
        raise pickle.UnpicklingError(f"refused to build a dtype {text!r}")
    return np.dtype(text, copy=True)


def _empty_array(subtype: object, shape: tuple[int, ...], dtype: object) -> NDArray[Any]:
    """What `numpy._reconstruct` does for a plain array: an empty one, whose state follows in the stream."""
    if subtype is not _PLAIN_ARRAY:
        raise pickle.UnpicklingError(f"refused to build an array of type {subtype!r}")
    empty: NDArray[Any] = np.ndarray(0, np.int8)
    return empty


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused to encode to {encoding!r}")
    return text.encode("latin1")


def _flat_array(values: object) -> NDArray[Any]:
    """Of an array, or a list of ints: a list of lists could be small in the stream and stand for anything."""
    if isinstance(values, list) and all(type(value) is int for value in values):
        return np.asarray(values)
    if not isinstance(values, np.ndarray):
        raise TypeError(f"a {type(values).__name__} for an array or a list of ints")
    return values


def _to_binary(content: bytes, name: str) -> bytes:
    """The records of one of the python version's pickles."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = _flat_array(fields["data"]), _flat_array(fields["labels"])
    except Exception as error:  # a hostile or damaged stream can raise nearly anything
        raise ValueError(f"--data: expected a CIFAR-10 batch, got {name}: {type(error).__name__}: {error}") from error
    fits = pixels.dtype == np.uint8 and pixels.shape == (labels.size, IMAGE_BYTES) and labels.ndim == 1
    if not fits or (labels.size and not np.issubdtype(labels.dtype, np.integer)):
        got = f"{pixels.dtype} {pixels.shape} and {labels.dtype} {labels.shape} in {name}"
        raise ValueError(f"--data: expected pixels uint8 (N, {IMAGE_BYTES}) and N integer labels, got {got}")
    if bad := np.flatnonzero((labels < 0) | (labels >= NUM_CLASSES)).tolist():
        raise ValueError(f"--data: expected labels 0 to 9, got {labels[bad[0]]} in record {bad[0]} of {name}")
    return np.column_stack([labels.astype(np.uint8), pixels]).tobytes()


# --- download ---------------------------------------------------------------------------------------------------


def download_cifar10(folder: Path, *, md5: str = MD5[BINARY_ARCHIVE], address: str = OFFICIAL_ADDRESS) -> Path:
    """Fetches the archive of the binary version into `folder`, unless it is there already.

    The bytes go to `<archive>.part`; an interrupted download continues there, and the file takes its name
    only once its md5 is the official one.  A second process waits for the first.

    Raises:
        ValueError: the complete file has another checksum (the part file is removed).
        OSError: the address cannot be reached or keeps breaking off (the part file stays).
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive, part = folder / BINARY_ARCHIVE, folder / f"{BINARY_ARCHIVE}.part"
    with part.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.is_file():
            part.unlink(missing_ok=True)
            return archive
        _fetch(address + BINARY_ARCHIVE, part)
        if (got := _md5(part)) != md5:
            part.unlink()
            raise ValueError(f"{address}{BINARY_ARCHIVE}: expected md5 {md5}, got {got}; the download is removed")
        os.replace(part, archive)
    return archive


def _fetch(url: str, part: Path) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _continue(url, part)
        except (OSError, http.client.HTTPException) as error:
            missing = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if missing or attempt == _ATTEMPTS:
                raise OSError(f"{url}: broke off {attempt} times; run again to continue: {error}") from error


def _continue(url: str, part: Path) -> None:
    """Appends what is missing; starts afresh where the server does not know ranges."""
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what we have: complete, or longer than the file
            return
        raise
    with response, part.open("r+b") as file:
        start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        offset = int(start[1]) if response.status == 206 and start else 0
        file.seek(offset)
        file.truncate()
        remaining = response.headers.get("Content-Length")
        total = offset + int(remaining) if remaining is not None else None
        quiet = not sys.stderr.isatty()
        with tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=quiet) as progress:
            while block := response.read(_BLOCK):
                file.write(block)
                progress.update(len(block))
        if total is not None and file.tell() != total:
            raise OSError(f"connection closed after {file.tell()} of {total} bytes")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    tyro.cli(main)
