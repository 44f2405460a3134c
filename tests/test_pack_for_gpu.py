"""The pack that is carried to a GPU: what goes into it, and when it is not used."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import gpu_packing
import pack_for_gpu
import pytest


def make_pack(pack: Path, **changes: Any) -> Path:
    (pack / "site").mkdir(parents=True)
    sources = {"module": gpu_packing.source_hash("module")}
    content = {**pack_for_gpu.TARGET, "commit": "abc", "tree": "0123", "sources": sources, "packages": {}} | changes
    (pack / "pack.json").write_text(json.dumps(content))
    return pack


def test_a_pack_of_other_sources_or_another_torch_is_not_used(tmp_path: Path) -> None:
    target = {"python": "3.12", "torch": "2.11"}
    assert gpu_packing.misfit(make_pack(tmp_path / "fits"), "module", target) is None
    assert "built for torch 2.11, this is 2.13" in str(
        gpu_packing.misfit(tmp_path / "fits", "module", target | {"torch": "2.13"})
    )
    other = make_pack(tmp_path / "other", sources={"module": "f00"})
    assert "built from other sources (commit abc)" in str(gpu_packing.misfit(other, "module", target))
    assert gpu_packing.misfit(other, "gpu_guard", target) == "the pack has no gpu_guard"


def test_the_hash_is_of_names_and_contents_of_sources_alone(tmp_path: Path) -> None:
    source = tmp_path / "csrc/core/a.h"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    (tmp_path / "setup.py").write_text("2")
    first = gpu_packing.source_hash("module", tmp_path), gpu_packing.tree_hash(tmp_path)
    (tmp_path / "csrc/core/a.so").write_text("built")
    (tmp_path / "README.rst").write_text("3")
    assert (gpu_packing.source_hash("module", tmp_path), gpu_packing.tree_hash(tmp_path)) == first
    source.rename(source.with_name("b.h"))
    assert gpu_packing.source_hash("module", tmp_path) != first[0] and gpu_packing.tree_hash(tmp_path) != first[1]


def test_an_unfinished_pack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--pack: expected a folder made by tools/pack_for_gpu\.py, got"):
        gpu_packing.read_pack(tmp_path)


def test_only_what_the_machine_lacks_is_unpacked(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", packages={"one": ["json"], "two": ["no_such_module", "json"]})
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("")
        with tarfile.open(pack / f"site/{name}.tar.xz", "w:xz") as tar:
            tar.add(tmp_path / f"{name}.py", f"{name}.py")
    assert gpu_packing.unpack_site(pack, tmp_path / "site") == ["two"]
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["two.py"]


def test_a_pack_of_more_than_60_mib_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(60 << 20)  # no byte of it is written
    assert pack_for_gpu.check_size(tmp_path) == 60 << 20
    (tmp_path / "another").write_bytes(b"1")
    with pytest.raises(SystemExit, match=r"expected at most 60 MiB, got 60\.0: leave a package out"):
        pack_for_gpu.check_size(tmp_path)


def test_a_binary_for_a_newer_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needing(*versions: str) -> None:
        lines = "\\n".join(f"    0x00 0x00 02 {version}" for version in versions)
        objdump = tmp_path / "objdump"
        objdump.write_text(
            f"#!/bin/sh\nprintf 'Version definitions:\\n GLIBC_2.99\\nVersion References:\\n{lines}\\n'\n"
        )
        objdump.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    needing("GLIBC_2.9", "GLIBC_2.35", "GLIBCXX_3.4.30", "CXXABI_1.3.13")
    assert pack_for_gpu.check_symbols(tmp_path / "x.so") == {"GLIBC": "2.35", "GLIBCXX": "3.4.30", "CXXABI": "1.3.13"}
    for symbol in ("GLIBC_2.36", "GLIBCXX_3.4.31", "CXXABI_1.3.14"):
        needing("GLIBC_2.4", symbol)
        with pytest.raises(SystemExit, match=rf"x\.so: expected at most \w+_[\d.]+, needs {symbol}"):
            pack_for_gpu.check_symbols(tmp_path / "x.so")
