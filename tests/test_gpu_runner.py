"""The runner of stages: its processes, what they leave, and what their logs say."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import gpu_runner
import pytest
from gpu_runner import Results, end_group, run_child, unpack
from gpu_runs import FAMILY, HEAD, ROOT, archived, ends, entries, make_runner, python, wait_for
from gpu_stages import Artefacts, Stage, read_ncu, read_pytest

# ---- children


@pytest.mark.parametrize("deaf", [False, True])
def test_the_whole_process_group_is_ended(tmp_path: Path, deaf: bool) -> None:
    code = FAMILY.format(deaf=deaf, file=tmp_path / "pid", seconds=60)
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    grandchild = int(wait_for(tmp_path / "pid"))
    begin = time.monotonic()
    end_group(child, grace=0.3 if deaf else 20)
    assert time.monotonic() - begin < 10
    assert child.returncode == -(signal.SIGKILL if deaf else signal.SIGTERM)
    assert ends(grandchild)
    assert (tmp_path / "pid.heard").exists() != deaf


def test_a_timeout_ends_the_whole_process_group(tmp_path: Path) -> None:
    code = FAMILY.format(deaf=True, file=tmp_path / "pid", seconds=60)
    _, late = run_child([sys.executable, "-c", code], tmp_path / "log", 4.0, grace=0.3)
    assert late
    assert ends(int(wait_for(tmp_path / "pid")))


def test_what_a_child_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    code = FAMILY.format(deaf=False, file=tmp_path / "pid", seconds=0)
    assert run_child([sys.executable, "-c", code], tmp_path / "log", 20) == (0, False)
    assert ends(int(wait_for(tmp_path / "pid")))


def test_a_stage_ends_at_its_limit_and_at_the_end_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "LEAST", 0.1)
    sleep = "import time; print('before', flush=True); time.sleep(60)"
    runner = make_runner(tmp_path / "out", tmp_path / "work", seconds=6)
    begin = time.monotonic()
    passed = runner.run([python("short", sleep, limit=0.5), python("long", sleep), python("last", "")])
    assert not passed
    assert time.monotonic() - begin < 7.5
    found = entries(tmp_path / "out")
    assert found["short"]["reason"] == "took more than 0.5 s" and found["short"]["limit"] == 0.5
    assert found["long"]["result"] == "skipped" and found["long"]["limit"] < 6
    assert "ended with the plan" in found["long"]["reason"]
    assert found["last"]["result"] == "skipped" and "no time left" in found["last"]["reason"]
    with tarfile.open(tmp_path / "out/gpu_check.tar.gz") as tar:
        assert tar.extractfile("logs/long.log").read() == b"before\n"  # type: ignore[union-attr]


def test_nothing_is_tried_without_the_extension(tmp_path: Path) -> None:
    runner = make_runner(tmp_path / "out", tmp_path / "work")
    assert not runner.run([python("load", "raise SystemExit(1)"), python("other", "")])
    assert entries(tmp_path / "out")["other"]["reason"] == "the extension did not load"
    late = make_runner(tmp_path / "late", tmp_path / "work", seconds=1)
    assert not late.run([python("load", ""), python("other", "")])


def test_a_stage_that_would_have_less_than_half_of_its_time_is_not_begun(tmp_path: Path) -> None:
    runner = make_runner(tmp_path / "out", tmp_path / "work", seconds=20)
    runner.run([python("long", "", fixed=60), python("short", "")])
    assert [entry["result"] for entry in entries(tmp_path / "out").values()] == ["skipped", "ok"]


# ---- results


KILLED = """
import signal, sys
sys.path[:0] = [{tools!r}, {tests!r}]
import gpu_check
from gpu_runs import FAMILY, make_runner, python
from pathlib import Path
signal.signal(signal.SIGTERM, gpu_check.stop)
folder = Path({folder!r})
quick = python("quick", "import os; print('quick')")
long = python("long", FAMILY.format(deaf=False, file=folder / "pid", seconds=60))
make_runner(folder / "out", folder / "work").run([quick, long])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_what_it_had(tmp_path: Path, number: signal.Signals) -> None:
    code = KILLED.format(tools=str(ROOT / "tools"), tests=str(ROOT / "tests"), folder=str(tmp_path))
    # Elsewhere: the sources here would hide an installed package.
    plan = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    grandchild = int(wait_for(tmp_path / "pid"))
    plan.send_signal(number)
    plan.wait(20)
    found = entries(tmp_path / "out")
    assert found["quick"]["result"] == "ok"
    assert "logs/quick.log" in archived(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.json", "gpu_check.tar.gz"}
    if number == signal.SIGTERM:
        assert found["long"]["reason"] == "the plan was stopped"
        assert "logs/long.log" in archived(tmp_path / "out")
        assert ends(grandchild)
    else:  # nobody is left to end it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(grandchild), signal.SIGKILL)


def test_a_second_run_repeats_what_is_not_ok(tmp_path: Path) -> None:
    count = tmp_path / "count"

    def stages(second_fails: bool) -> list[Stage]:
        note = f"open({str(count)!r}, 'a').write"
        return [
            python("first", f"{note}('1'); print('as it was')"),
            python("second", f"{note}('2'); raise SystemExit({3 if second_fails else 0})"),
        ]

    assert not make_runner(tmp_path / "out", tmp_path / "one").run(stages(True))
    assert entries(tmp_path / "out")["second"]["reason"] == "exit status 3: no output"
    again = make_runner(tmp_path / "out", tmp_path / "two")
    again.results.resume()
    assert again.run(stages(False))
    assert count.read_text() == "122"
    assert [entry["result"] for entry in entries(tmp_path / "out").values()] == ["ok", "ok"]
    assert {"logs/first.log", "logs/second.log"} <= archived(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"card": "NVIDIA H200"}, "is of card NVIDIA H100, this is NVIDIA H200"),
        ({"tree": "4567", "commit": "def"}, r"is of tree 0123, this is 4567 \(commits abc and def\)"),
        ({"plan": "experiments"}, "is of plan check"),
        ({"dry_run": True}, "is of dry_run False"),
    ],
)
def test_results_of_another_card_or_tree_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    Results(tmp_path / "out", tmp_path / "one", "gpu_check", HEAD).write()
    results = Results(tmp_path / "out", tmp_path / "two", "gpu_check", HEAD | change)
    with pytest.raises(ValueError, match=message):
        results.resume()
    assert json.loads((tmp_path / "out/gpu_check.json").read_text())["card"] == "NVIDIA H100"


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume: expected the gpu_check\.json of an earlier run"):
        Results(tmp_path / "out", tmp_path / "work", "gpu_check", HEAD).resume()


def test_an_archive_that_is_too_large_leaves_out_what_costs_least_and_never_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path / "out", tmp_path / "work", "gpu_check", HEAD)
    run = tmp_path / "work/runs/fig3"
    run.mkdir()
    for name, size in {"checkpoint.pt": 9000, "metrics.npz": 3000, "figure.png": 3000, "summary.json": 10}.items():
        (run / name).write_bytes(os.urandom(size))
    everything = {f"runs/fig3/{name}" for name in ("checkpoint.pt", "metrics.npz", "figure.png", "summary.json")}
    for limit, missing in ((20000, None), (14000, "metrics.npz"), (8000, "checkpoint.pt"), (5000, "checkpoint.pt")):
        monkeypatch.setattr(gpu_runner, "ARCHIVE_BYTES", limit)
        results.write()
        left_out = [f"runs/fig3/{missing}"] if missing else []
        assert archived(tmp_path / "out") == everything - set(left_out)
        assert results.report["archive"]["left_out"] == left_out
        assert ("warning" in results.report["archive"]) == (limit == 5000)


def test_a_checkpoint_is_kept_where_a_run_goes_on(tmp_path: Path) -> None:
    write = "import sys, os; os.makedirs(sys.argv[1]); open(sys.argv[1] + '/checkpoint.pt', 'w'); sys.exit(1)"
    ends = dataclasses.replace(python("ends", ""), command=("{python}", "-c", write, "{run}"))
    goes_on = dataclasses.replace(ends, name="goes_on", goes_on=("true",))
    make_runner(tmp_path / "out", tmp_path / "work").run([ends, goes_on])
    assert archived(tmp_path / "out") == {"logs/ends.log", "logs/goes_on.log", "runs/goes_on/checkpoint.pt"}


def test_a_long_log_keeps_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "LOG_BYTES", 100)
    log = tmp_path / "log"
    log.write_text("first" + "x" * 1000 + "last")
    gpu_runner.shorten(log)
    text = log.read_text()
    assert text.startswith("first") and text.endswith("last") and "909 bytes left out" in text


# ---- what stages say


ADVICE = "Search for `cudaErrorX' in https://docs\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions.\n\n\n"
CHAINED = f"""40 lines
Traceback (most recent call last):
  File "a.py", line 371, in f
    grad(x)
torch.AcceleratorError: CUDA error: operation would make the legacy stream depend on a capturing blocking stream
{ADVICE}During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 455, in <module>
torch.AcceleratorError: CUDA error: operation failed due to a previous error during capture
{ADVICE}"""
COMPARED = """{0}COMPUTE-SANITIZER
kernel_problems.h:435: failed: close(x, expected)
    order 1, row 0, class 2999: 0, expected -nan
gpu_guard: 384 of 852 cases
gpu_guard: 35865610 checks, 3000 failed
{0}Target application returned an error
{0}ERROR SUMMARY: 0 errors
"""
FOUND = """{0}COMPUTE-SANITIZER
{0}Invalid __global__ write of size 4 bytes
{0}    at forward_small(Forward)+0x40
{0}Target application returned an error
{0}ERROR SUMMARY: 12 errors
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (CHAINED, "CUDA error: operation would make the legacy stream depend on a capturing blocking stream"),
        (COMPARED.format("========= "), "gpu_guard: 35865610 checks, 3000 failed"),
        (FOUND.format("========= "), "========= Invalid __global__ write of size 4 bytes"),
        ("========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards\n", "RACECHECK SUMMARY: 0 hazards"),
        ("a.cu(3): error: identifier x is undefined\n1 error detected\n", "a.cu(3): error: identifier x is undefined"),
        ("Traceback (most recent call last):\n  File x\nAssertionError\nbye\n", "AssertionError"),
        ("68 rows, 0 skipped, some failed\n\n", "68 rows, 0 skipped, some failed"),
        (" \n", "no output"),
    ],
    ids=["chained", "compared", "found", "sanitizer-alone", "compiler", "no-message", "summary", "nothing"],
)
def test_a_failure_is_told_by_the_line_that_says_why(log: str, reason: str) -> None:
    assert gpu_runner.telling_line(log).endswith(reason)
    assert "\n" not in gpu_runner.telling_line(log)


def test_a_refused_device_or_a_missing_program_is_no_failure(tmp_path: Path) -> None:
    refusal = "print('========= Error: Device not supported. Please refer to ...'); raise SystemExit(1)"
    runner = make_runner(tmp_path / "out", tmp_path / "work")
    stages = [
        python("refused", refusal, program="sh"),
        python("missing", "", program="no-such-program"),
        python("no_script", "", script="tools/no_such_script.py"),
        python("no_artefact", "", artefact="{work}/no_such_file"),
        python("data", "", needs_data=True),
    ]
    assert runner.run(stages)
    found = entries(tmp_path / "out")
    assert found["refused"]["result"] == "unavailable" and "Device not supported" in found["refused"]["reason"]
    assert found["missing"]["result"] == "unavailable"
    assert found["no_script"]["reason"] == "not there: tools/no_such_script.py"
    assert "no_such_file is not there" in found["no_artefact"]["reason"]
    assert found["data"]["reason"].startswith("no data")
    # the same words from our own program are a failure
    assert not runner.run([python("ours", refusal)])


def test_numbers_are_read_as_far_as_they_have_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "LEAST", 0.1)
    write = "import sys, time; open(sys.argv[1], 'w').write({text!r}); time.sleep({seconds})"
    whole = dataclasses.replace(python("whole", ""), limit=4)
    whole = dataclasses.replace(
        whole, command=("{python}", "-c", write.format(text='{"rows": 3}', seconds=60), "{json}")
    )
    broken = dataclasses.replace(whole, name="broken", limit=20)
    broken = dataclasses.replace(broken, command=("{python}", "-c", write.format(text='{"rows', seconds=0), "{json}"))
    assert not make_runner(tmp_path / "out", tmp_path / "work").run([whole, broken])
    found = entries(tmp_path / "out")
    assert found["whole"]["numbers"] == {"rows": 3} and found["whole"]["reason"] == "took more than 4 s"
    assert found["broken"]["result"] == "failed" and "cannot be read" in found["broken"]["reason"]


def artefacts(folder: Path, log: str = "", table: str | None = None) -> Artefacts:
    (folder / "log").write_text(log)
    if table is not None:
        (folder / "table").write_text(table)
    return Artefacts(folder / "log", folder / "json", folder / "run", folder / "table")


def test_tests_that_have_not_run_have_shown_nothing(tmp_path: Path) -> None:
    skipped = read_pytest(artefacts(tmp_path, "sss\n251 skipped in 3.51s\n"), 0)
    assert (skipped.result, skipped.numbers["skipped"]) == ("failed", 251)
    assert read_pytest(artefacts(tmp_path, "no tests collected in 0.5s\n"), 5).result == "skipped"
    log = "FAILED tests/test_cuda.py::test_a[x] - assert 1\n1 failed, 240 passed, 2 skipped in 31.20s\n"
    reading = read_pytest(artefacts(tmp_path, log), 1)
    assert (reading.result, reading.reason) == (None, "1 failed, 240 passed, 2 skipped in 31.20s")
    assert reading.numbers == {"failed": 1, "passed": 240, "skipped": 2, "failures": ["tests/test_cuda.py::test_a[x]"]}


@pytest.mark.parametrize(
    "log",
    [
        "test_cuda.py::test_a[x 1] PASSED  [ 1%]\ntest_cuda.py::test_b FAILED  [ 2%]\ntest_cuda.py::test_c ",
        "scheduling\n[gw0] [  1%] PASSED test_cuda.py::test_a[x-1] \n[gw3] [  2%] FAILED test_cuda.py::test_b \n",
    ],
    ids=["alone", "workers"],
)
def test_tests_that_were_cut_short_are_counted_as_they_ended(tmp_path: Path, log: str) -> None:
    reading = read_pytest(artefacts(tmp_path, log), -15)
    assert reading.numbers == {"passed": 1, "failed": 1, "error": 0, "failures": ["test_cuda.py::test_b"]}


def test_ncu_is_read_by_launch(tmp_path: Path) -> None:
    table = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","forward_small","Duration","us","12.5"
"0","forward_small","DRAM Throughput","%","81"
"1","forward_warp","Duration","us","7"
"""
    reading = read_ncu(artefacts(tmp_path, table=table), 0)
    assert reading.numbers == [
        {"kernel": "forward_small", "Duration": "12.5 us", "DRAM Throughput": "81 %"},
        {"kernel": "forward_warp", "Duration": "7 us"},
    ]
    assert read_ncu(artefacts(tmp_path, table="==PROF== Connected\n"), 0).result == "failed"


#: An example in small: goes on from its checkpoint, and ends on SIGTERM with a whole one.
RUN = """
import pathlib, signal, sys, time
out, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
out.mkdir(exist_ok=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
checkpoint = out / "checkpoint.pt"
step = int(checkpoint.read_text()) if "--resume" in sys.argv else 0
while step < steps and not stopped:
    step += 1
    time.sleep(0.01)
checkpoint.write_text(str(step))
(out / "summary.json").write_text('{"steps": %d}' % step)
sys.exit(0 if step == steps else 130)
"""


def test_a_run_goes_on_from_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "LEAST", 0.1)
    words = ("{python}", "-c", RUN, "{run}")
    endless = Stage("fig3", (*words, "100000"), 0, goes_on=(*words, "100000", "--resume"))
    runner = make_runner(tmp_path / "out", tmp_path / "one", seconds=6)
    assert runner.run([endless])
    assert entries(tmp_path / "out")["fig3"]["finished"] is False
    assert not runner.results.is_done("fig3")
    first = int((tmp_path / "one/runs/fig3/checkpoint.pt").read_text())
    assert 0 < first < 1000

    work = tmp_path / "two"
    ending = dataclasses.replace(endless, goes_on=(*words, str(first + 7), "--resume"))
    later = make_runner(tmp_path / "later", work)
    unpack(tmp_path / "out/gpu_check.tar.gz", work, "runs")
    assert not (work / "logs/fig3.log").exists()
    assert later.run([ending])
    assert (work / "runs/fig3/checkpoint.pt").read_text() == str(first + 7)
    assert later.results.is_done("fig3")


def test_what_is_no_archive_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no archive")
    with pytest.raises(ValueError, match=r"file: expected the archive of an earlier run"):
        unpack(tmp_path / "file", tmp_path, "runs")


def test_runs_without_end_share_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "LEAST", 0.1)
    stages = [python(name, "", goes_on=("true",)) for name in ("fig3", "fig2")]
    make_runner(tmp_path / "out", tmp_path / "work", seconds=40).run(stages)
    limits = [entry["limit"] for entry in entries(tmp_path / "out").values()]
    assert limits[0] == pytest.approx(20 - 0.9, abs=1) and limits[1] == pytest.approx(40 - 0.9, abs=3)
