"""Checks the machine code of the CUDA kernels: `python tools/check_sass.py KERNEL.o [--cuobjdump PATH]`.

Rows must be loaded (to shared memory, asynchronously) and stored 16 bytes at a time, and no kernel may keep variables
in local memory (a spilled register, an array indexed at run time): both cost bandwidth and neither shows in a test.
Nor does a missing fence between the arrival of a block and the barrier that lets its threads read what others have
written. For sm_90, which the kernels were measured on, the waits for copies and the instructions of the loops over rows
are bounded, too. cuobjdump is taken from $PATH, else from the triton package that comes with torch.
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
#: Groups of copies that may be on their way after some wait: the next tile, two next rows, three parts of a row.
IN_FLIGHT = {"forward_warp": 1, "derivative_warp": 1, "forward_held": 2, "forward_block": 3, "derivative_block": 3}
WAIT = re.compile(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)")
#: Most instructions of a loop for each of its exponentials, of which an element has one: of plain kernels, of those for
#: label smoothing, and for the rest, in loops over rows. What runs seldom is counted as well. nvcc 13.0 makes 2 to 8 %
#: fewer.
INSTRUCTIONS = {
    "forward_warp": (34, 76, 160),
    "derivative_warp": (128, 128, 200),
    "forward_held": (50, 86, 0),
    "forward_block": (34, 47, 0),
    "derivative_block": (73, 73, 0),
}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")


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


def loops(code: str) -> dict[tuple[int, ...], int]:
    """Instructions of the smallest loop around the same exponentials, which are given by their addresses."""
    instructions = [(int(address, 16), text) for address, text in INSTRUCTION.findall(code)]
    exponentials = [address for address, text in instructions if "MUFU.EX2" in text]
    found: dict[tuple[int, ...], int] = {}
    for end, text in instructions:
        if (branch := BRANCH.search(text)) is None or (begin := int(branch[1], 16)) >= end:
            continue
        inside = tuple(address for address in exponentials if begin <= address <= end)
        size = sum(begin <= address <= end for address, _ in instructions)
        found[inside] = min(size, found.get(inside, size))
    innermost = [key for key in found if key and not any(set(other) < set(key) for other in found if len(other) > 1)]
    return {key: found[key] for key in innermost if len(key) > 1}


def slow_loops(name: str, code: str) -> list[str]:
    """Waits and loops of a kernel over rows for sm_90."""
    kernel = next(kernel for kernel in ROW_KERNELS if kernel in name)
    result = []
    waits = [int(groups, 16) for groups in WAIT.findall(code)]
    if max(waits, default=0) < IN_FLIGHT[kernel]:
        result.append(f"no wait that lets {IN_FLIGHT[kernel]} groups of copies be on their way")
    if f"{kernel}Id" in name:  # exponentials of float64 are computed otherwise
        return result
    plain, smooth, rest = INSTRUCTIONS[kernel]
    each = smooth if "Lb1E" in name else plain
    if not (found := loops(code)):
        result.append("no loop with exponentials")
    for exponentials, size in found.items():
        if size > (most := each * len(exponentials) + rest):
            result.append(f"a loop of {size} instructions for {len(exponentials)} exponentials, {most} at most")
    return result


def faults(name: str, code: str, architecture: str) -> list[str]:
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
        if architecture == "sm_90":
            result += slow_loops(name, code)
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
        for fault in faults(name, code, architecture):
            failed += 1
            print(f"{architecture} {name}: {fault}")
    print(f"{count} kernels for {', '.join(sorted(architectures))}: {failed} faults")
    if failed or count == 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
