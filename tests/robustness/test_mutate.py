"""The list of faults fits the sources; .ci/long compiles them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from robustness import mutate


def test_every_fault_is_in_its_file_once() -> None:
    assert [fault for fault in mutate.FAULTS if not mutate.fits(fault)] == []
    assert len({(fault.file, fault.text, fault.by) for fault in mutate.FAULTS}) == len(mutate.FAULTS) > 30


def test_the_tests_that_have_to_notice_are_there() -> None:
    names = {name for fault in mutate.FAULTS for name in fault.tests.split()}
    assert all((Path(__file__).parents[1] / f"test_{name}.py").is_file() for name in names)


def test_it_goes_on_with_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(tree: Path, fault: mutate.Fault) -> dict[str, Any]:
        tried.append(fault)
        return {"file": fault.file, "fault": fault.name[1], "caught": fault != mutate.FAULTS[1], "by": ""}

    tried: list[mutate.Fault] = []
    monkeypatch.setattr(mutate, "outcome", outcome)
    for step in ("_copy", "_build"):
        monkeypatch.setattr(mutate, step, lambda tree: None)
    out = tmp_path / "mutate.json"
    for only in (mutate.FAULTS[0].file, ""):
        monkeypatch.setattr("sys.argv", ["x", "--out", str(out), "--only", only])
        with pytest.raises(SystemExit):
            mutate.main()
    assert sorted(tried) == sorted(mutate.FAULTS)  # each once
    report = json.loads(out.read_text())
    assert report["tried"] == len(mutate.FAULTS) and len(report["survived"]) == 1
