"""The list of faults fits the sources; .ci/long compiles them."""

from __future__ import annotations

from pathlib import Path

from robustness import mutate


def test_every_fault_is_in_its_file_once() -> None:
    assert [fault for fault in mutate.FAULTS if not mutate.fits(fault)] == []
    assert len({(fault.file, fault.text, fault.by) for fault in mutate.FAULTS}) == len(mutate.FAULTS) > 30


def test_the_tests_that_have_to_notice_are_there() -> None:
    names = {name for fault in mutate.FAULTS for name in fault.tests.split()}
    assert all((Path(__file__).parents[1] / f"test_{name}.py").is_file() for name in names)
