"""`prepare_cifar10.py`: what it makes of any form, and its download from a loopback server."""

from __future__ import annotations

import hashlib
import http.server
import threading
from pathlib import Path

import pytest
from cifar10_files import FILES, check_equal, pack, write_binary, write_python

import prepare_cifar10
from common.data import FOLDER, load_cifar10
from prepare_cifar10 import BINARY_ARCHIVE, PYTHON_FOLDER, download_cifar10, prepare

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
