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
    assert check_sass.faults("forward_warp", GOOD) == []


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
    found = check_sass.faults(kernel, GOOD.replace(old, new))
    assert (found == []) if fault is None else (len(found) == 1 and found[0].startswith(fault))
