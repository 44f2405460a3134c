"""Checks the machine code of the CUDA kernels: `python tools/check_sass.py KERNEL.o [--cuobjdump PATH]`.

Rows must be loaded (to shared memory, asynchronously) and stored 16 bytes at a time, and no kernel may keep variables
in local memory (a spilled register, an array indexed at run time): both cost bandwidth and neither shows in a test.
Nor does a missing fence between the arrival of a block and the barrier that lets its threads read what others have
written. cuobjdump is taken from $PATH, else from the triton package that comes with torch.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

#: Kernels that touch rows; their names are followed by template arguments.
ROW_KERNELS = ("forward_warp", "forward_held", "forward_block", "derivative_warp", "derivative_block")
#: To shared memory, without a register in between.
WIDE_LOAD = re.compile(r"\bLDGSTS(?:\.\w+)*\.128\b")
WIDE_STORE = re.compile(r"\bSTG?(?:\.\w+)*\.128\b")
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
STRONG_STORE = re.compile(r"\bSTG?(?:\.\w+)*\.STRONG\b")
#: From the arrival of a block to the barrier after it.
ARRIVAL = re.compile(r"\bATOMG?\.(?:\w+\.)*ADD\b.*?\bBAR\.SYNC\b", re.DOTALL)
FENCE = re.compile(r"\bMEMBAR\.(?:\w+\.)*GPU\b")


def find_cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None and (triton := find_spec("triton")) is not None and triton.origin is not None:
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None or not Path(found).is_file():
        sys.exit("cuobjdump was found neither on PATH nor in the triton package: give --cuobjdump")
    return found


def functions(cuobjdump: str, binary: Path) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, code) of each kernel."""
    text = subprocess.run([cuobjdump, "--dump-sass", str(binary)], check=True, stdout=subprocess.PIPE, text=True).stdout
    architecture, found_in, name, code = "", "", "", []
    for line in text.splitlines():
        if match := re.match(r"\s*(?:code for|arch =)\s*(sm_\w+)", line):
            architecture = match[1]
        if match := re.match(r"\s*Function : (\S+)", line):
            if name:
                yield found_in, name, "\n".join(code)
            found_in, name, code = architecture, match[1], []
        else:
            code.append(line)
    if name:
        yield found_in, name, "\n".join(code)


def faults(name: str, code: str) -> list[str]:
    result = []
    local = len(LOCAL_MEMORY.findall(code))
    if local:
        result.append(f"{local} accesses to local memory")
    if any(kernel in name for kernel in ROW_KERNELS):
        if not WIDE_LOAD.search(code):
            result.append("no asynchronous 16-byte load")
        if not WIDE_STORE.search(code):
            result.append("no 16-byte store")
        if STRONG_STORE.search(code):
            result.append("a store that other blocks are to see at once")
        arrivals = ARRIVAL.findall(code)
        if "forward" in name and not arrivals:
            result.append("no arrival at the last block")
        if not all(FENCE.search(part) for part in arrivals):
            result.append("no fence between the arrival of a block and its barrier")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("binary", type=Path)
    parser.add_argument("--cuobjdump", default=None)
    arguments = parser.parse_args()
    count, failed, architectures = 0, 0, set()
    for architecture, name, code in functions(arguments.cuobjdump or find_cuobjdump(), arguments.binary):
        count += 1
        architectures.add(architecture)
        for fault in faults(name, code):
            failed += 1
            print(f"{architecture} {name}: {fault}")
    print(f"{count} kernels for {', '.join(sorted(architectures))}: {failed} faults")
    if failed or count == 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
