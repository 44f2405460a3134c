"""Fetching the official CIFAR-10 archive: resumable, verified, and safe for several jobs at once."""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from common.cifar10 import BINARY, Version, file_md5

OFFICIAL_ADDRESS = "https://www.cs.toronto.edu/~kriz/"
_ATTEMPTS = 5
_TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 1 << 16


def download_cifar10(folder: str | Path, *, version: Version = BINARY, address: str = OFFICIAL_ADDRESS) -> Path:
    """Fetches the archive into `folder`, unless it is there already.

    The bytes go to `<archive>.part`; an interrupted download continues there, and the file takes its name
    only once its md5 is the official one.  A second process waits for the first.

    Raises:
        ValueError: the complete file has another checksum (the part file is removed).
        OSError: the address cannot be reached or keeps breaking off (the part file stays).
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / version.archive
    part = folder / (version.archive + ".part")
    with part.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.is_file():
            part.unlink(missing_ok=True)
            return archive
        _fetch(address + version.archive, part)
        md5 = file_md5(part)
        if md5 != version.md5:
            part.unlink()
            raise ValueError(f"{address}{version.archive}: md5 {md5}, expected {version.md5}; the download is removed")
        os.replace(part, archive)
    return archive


def _fetch(url: str, part: Path) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _continue(url, part)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == _ATTEMPTS:
                raise OSError(f"{url}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == _ATTEMPTS:
                raise OSError(f"{url}: broke off {_ATTEMPTS} times; run again to continue: {error}") from error


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
        progress = tqdm(
            total=total,
            initial=offset,
            unit="B",
            unit_scale=True,
            desc=part.stem,
            disable=not sys.stderr.isatty(),
        )
        with progress:
            while block := response.read(_BLOCK):
                file.write(block)
                progress.update(len(block))
        if total is not None and file.tell() != total:
            raise OSError(f"connection closed after {file.tell()} of {total} bytes")
