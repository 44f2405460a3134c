"""The plan of ten minutes on a GPU, as far as it can be seen without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_runs import ROOT, entries, make_runner
from gpu_stages import PLANS, Stage

import dynloss_ext


@pytest.fixture(scope="module", autouse=True)
def dry_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, subprocess.Popen[str]]]]:
    """A dry run of each plan, begun before the other tests, which go on meanwhile."""
    runs = {}
    wanted = any(item.name.startswith("test_a_dry_run") for item in request.session.items)
    for plan in PLANS if wanted else ():
        out = tmp_path_factory.mktemp(plan)
        # In a Python that finds the package under test as this one does.
        command = [
            sys.executable,
            ROOT / "tools/gpu_check.py",
            "--dry-run",
            "--plan",
            plan,
            "--out",
            out,
            "--synthetic",
        ]
        runs[plan] = (
            out,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
        )
    yield runs
    for _, process in runs.values():
        process.terminate()
        process.wait()


# ---- the plans


@pytest.mark.parametrize("plan", PLANS)
def test_fewer_processors_take_longer(plan: str) -> None:
    totals = [sum(stage.estimate(processors) for stage in PLANS[plan]) for processors in (1, 2, 4, 8)]
    if plan == "check":
        assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    assert sum(stage.estimate(16) for stage in PLANS[plan]) < gpu_check.SECONDS
    for stage in PLANS[plan]:
        assert stage.goes_on or stage.estimate(16) <= stage.limit, stage.name


def test_a_build_is_part_of_the_estimate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_pack", lambda given: None)
    arguments = gpu_check.parse(["--list", "--processors", "2"])
    assert gpu_check.chosen(arguments)[0].estimate(2) > 100 > PLANS["check"][0].estimate(2)
    gpu_check.main(["--list", "--processors", "2"])
    text = capsys.readouterr().out
    assert all(f"\n{stage.name} " in text for stage in PLANS["check"])


@pytest.mark.parametrize("plan", PLANS)
def test_every_command_can_be_filled(plan: str, tmp_path: Path) -> None:
    arguments = gpu_check.parse(["--processors", "16"])
    runner = make_runner(tmp_path / "out", tmp_path)
    runner.values = gpu_check.values(arguments, tmp_path / "pack", tmp_path, {"gpu": {"capability": "9.0"}})
    for stage in PLANS[plan]:
        for command in (stage.command, stage.goes_on, stage.dry or ()):
            words = runner.fill(stage, command, 100)
            assert not any("{" in word for word in words), stage.name
    correctness = next(stage for stage in PLANS["check"] if stage.name == "correctness")
    words = runner.fill(correctness, correctness.command, 100)
    assert words[:2] == ["env", "OMP_NUM_THREADS=2"]
    sass = next(stage for stage in PLANS["check"] if stage.name == "sass")
    module = Path(runner.fill(sass, sass.command, 100)[-1])
    assert module.parent == tmp_path / "tree/dynloss_ext"
    assert (Path(dynloss_ext.__file__).parent / module.name).exists()
    files = [f"tests/test_cuda{name}.py" for name in ("", "_curvature", "_graphs", "_launches", "_perceptron")]
    assert words[-9:] == ["-n", "8", "--dist", "worksteal", *files]


def test_a_script_without_an_option_of_the_plan_fails_the_dry_run(tmp_path: Path) -> None:
    runner = make_runner(tmp_path / "out", tmp_path / "work", dry=True)
    known = ("--cuobjdump", "{python}")
    path = "tools/check_sass.py"
    stages = [
        Stage("right", ("{python}", f"{{root}}/{path}", *known), 20, script=f"{{root}}/{path}"),
        Stage("wrong", ("{python}", f"{{root}}/{path}", *known, "--cuobj"), 20, script=f"{{root}}/{path}"),
    ]
    runner.obstacle = lambda stage: None  # type: ignore[method-assign]  # its script has no folder to be looked up in
    assert not runner.run(stages)
    found = entries(tmp_path / "out")
    assert found["right"]["result"] == "skipped" and found["right"]["dry"] == "ok"
    assert found["wrong"]["reason"].endswith("check_sass.py has no --cuobj")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "--seconds: expected a positive number, got 0"),
        (["--only", "load", "kernel"], "--only: expected some of load, smoke, .*, got kernel"),
        (["--data", "/nowhere"], "--data: expected something that exists, got /nowhere"),
        (["--processors", "0"], "--processors: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parse(options)
    assert re.search(message, capsys.readouterr().err)


# ---- dry runs


@pytest.mark.parametrize("plan", PLANS)
def test_a_dry_run_passes_and_lists_every_stage(plan: str, dry_runs: dict[str, Any]) -> None:
    out, process = dry_runs[plan]
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    report = json.loads((out / f"gpu_{plan}.json").read_text())
    assert report["dry_run"] and report["card"] is None
    assert list(report["stages"]) == [stage.name for stage in PLANS[plan]]
    assert report["stages"]["load"]["result"] == "ok"
    for stage in PLANS[plan]:
        entry = report["stages"][stage.name]
        assert not any(word.startswith("/") for word in entry.get("command", ())), entry  # folders of this machine
        assert text.count(f"\n{stage.name} ") == 2, stage.name  # in the plan, and when its turn has come
        assert entry["result"] in ("ok", "skipped"), entry
        reached = entry.get("dry") == "ok" or stage is PLANS[plan][0]
        assert reached or entry["reason"].startswith("not there"), entry
    assert {path.name for path in out.iterdir()} == {f"gpu_{plan}.json", f"gpu_{plan}.tar.gz"}
    with tarfile.open(out / f"gpu_{plan}.tar.gz") as tar:
        assert {"logs/load.log", "logs/smoke.log", "results/smoke.json"} <= set(tar.getnames())
    assert "rehearsal of the runner" in text and "estimate" in text
