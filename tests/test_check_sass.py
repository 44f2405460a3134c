"""tools/check_sass.py on listings written down by hand."""

from __future__ import annotations

import check_sass
import pytest

GOOD = """
        LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64] ;
        STG.E.128 desc[UR6][R8.64], R4 ;
        MEMBAR.SC.GPU ;
        ATOMG.E.ADD.STRONG.GPU PT, R8, desc[UR6][R8.64], R15 ;
        MEMBAR.SC.GPU ;
        BAR.SYNC.DEFER_BLOCKING 0x0 ;
        STG.E.64 desc[UR6][R8.64], R4 ;
"""


def test_a_good_kernel_has_no_faults():
    assert check_sass.faults("forward_warp", GOOD, "sm_80") == []


@pytest.mark.parametrize(
    ("kernel", "old", "new", "fault"),
    [
        ("forward_warp", "LDGSTS.E.BYPASS.128", "LDG.E.128", "no asynchronous 16-byte load"),
        ("derivative_warp", "STG.E.128", "STG.E.64", "no 16-byte store"),
        ("forward_warp", "STG.E.128", "STG.E.128.STRONG.SYS", "a store that other blocks are to see at once"),
        ("forward_block", "PT, R8, desc[UR6][R8.64], R15 ;\n        MEMBAR.SC.GPU", "", "no fence"),
        ("forward_block", "ATOMG.E.ADD.STRONG.GPU", "NOP", "no arrival"),
        ("rescale_gradient", "NOP", "NOP", None),
        ("rescale_gradient", "LDGSTS.E.BYPASS.128 [R4]", "LDL.128 R4", "1 accesses to local memory"),
    ],
)
def test_each_fault_is_named(kernel, old, new, fault):
    found = check_sass.faults(kernel, GOOD.replace(old, new), "sm_80")
    assert (found == []) if fault is None else (len(found) == 1 and found[0].startswith(fault))


def listing(body: int, exponentials: int, wait: int = 1) -> str:
    """A loop of `body` instructions, some of them exponentials, in another one."""
    lines = ["NOP", f"DEPBAR.LE SB0, {wait:#x}", *["FADD R1, R2, R3"] * (body - exponentials - 1)]
    lines += [*["MUFU.EX2 R0, R1"] * exponentials, "@P0 BRA 0x20", "NOP", "@!P1 BRA 0x0", "EXIT"]
    code = "".join(f"        /*{16 * i:04x}*/  {text} ;  /* 0x0 */\n" for i, text in enumerate(lines))
    return GOOD + code


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("forward_blockIfLb0E", (34 * 4, 4, 3), None),
        ("forward_blockIfLb0E", (34 * 4 + 1, 4, 3), "a loop of 137 instructions for 4 exponentials, 136 at most"),
        ("forward_blockIfLb1E", (34 * 4 + 1, 4, 3), None),
        ("forward_blockIfLb0E", (34 * 4, 4, 2), "no wait that lets 3 groups"),
        ("forward_warpIfLi16ELi1ELi0ELb0E", (34 * 4 + 160, 4, 1), None),
        ("forward_warpIfLi16ELi1ELi0ELb0E", (34 * 4 + 161, 4, 1), "a loop of 297 instructions"),
        ("forward_warpIfLi16ELi1ELi0ELb0E", (40, 0, 1), "no loop with exponentials"),
        ("forward_warpIdLi16ELi1ELi0ELb0E", (40, 0, 1), None),
        ("forward_warpIdLi16ELi1ELi0ELb0E", (40, 0, 0), "no wait that lets 1 groups"),
    ],
)
def test_loops_and_waits_are_bounded_where_they_were_measured(name, arguments, fault):
    code = listing(*arguments)
    assert check_sass.faults(name, code, "sm_80") == []
    found = check_sass.faults(name, code, "sm_90")
    assert (found == []) if fault is None else (len(found) == 1 and found[0].startswith(fault))
