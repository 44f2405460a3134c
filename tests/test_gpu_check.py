"""The plan of ten minutes on a GPU, as far as it can be seen without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dynloss_ext

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

import gpu_check  # noqa: E402
import gpu_packing  # noqa: E402
import gpu_runner  # noqa: E402
import pack_for_gpu  # noqa: E402
from gpu_runner import Results, Runner, end_group, run_child, unpack  # noqa: E402
from gpu_stages import PLANS, Artefacts, Stage, read_ncu, read_pytest  # noqa: E402

HEAD = {"plan": "check", "dry_run": False, "tree": "0123", "commit": "abc", "card": "NVIDIA H100"}


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


def make_runner(out: Path, work: Path, *, seconds: float = 60, **fields: Any) -> Runner:
    results = Results(out, work, "gpu_check", HEAD)
    (work / "tree").mkdir(exist_ok=True)
    values: dict[str, str | list[str]] = {"root": str(ROOT), "python": sys.executable, "data": ["--synthetic"]}
    return Runner(results, values, end=time.monotonic() + seconds, cwd=work / "tree", **({"grace": 0.3} | fields))


def python(name: str, code: str, limit: float = 20, **fields: Any) -> Stage:
    return Stage(name, ("{python}", "-c", code), limit, **fields)


def entries(out: Path) -> dict[str, dict[str, Any]]:
    report: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return dict(report["stages"])


def archived(out: Path) -> set[str]:
    with tarfile.open(out / "gpu_check.tar.gz") as tar:
        return set(tar.getnames())


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(process: int) -> bool:
    """Whether it is gone soon: a signal takes its time on a busy machine."""
    end = time.monotonic() + 5
    while is_running(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(process)


def wait_for(path: Path) -> str:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    return path.read_text()


# ---- children


#: Starts a grandchild, which writes its number, and what it hears. Both are deaf to SIGTERM if they shall be.
FAMILY = """
import signal, subprocess, sys, time
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("from the child")
trap = "" if {deaf} else "trap 'echo heard > {file}.heard; exit' TERM;"
grandchild = subprocess.Popen(["sh", "-c", trap + "echo $$ > {file}; while :; do sleep 0.1; done"])
while {seconds}:
    time.sleep(60)
while True:
    try:
        open("{file}").read(1)
        break
    except OSError:
        time.sleep(0.01)
"""


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
from test_gpu_check import FAMILY, make_runner, python
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
        Stage("later", (), 0, not_built=True),
        python("data", "", needs_data=True),
    ]
    assert runner.run(stages)
    found = entries(tmp_path / "out")
    assert found["refused"]["result"] == "unavailable" and "Device not supported" in found["refused"]["reason"]
    assert found["missing"]["result"] == "unavailable"
    assert found["no_script"]["reason"] == "not there: tools/no_such_script.py"
    assert "no_such_file is not there" in found["no_artefact"]["reason"]
    assert found["later"]["reason"] == "not built yet"
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


# ---- the plans


@pytest.mark.parametrize("plan", PLANS)
def test_fewer_processors_take_longer(plan: str) -> None:
    totals = [sum(stage.estimate(processors) for stage in PLANS[plan]) for processors in (1, 2, 4, 8)]
    if plan == "check":
        assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    assert sum(stage.estimate(16) for stage in PLANS[plan]) < gpu_check.SECONDS
    for stage in PLANS[plan]:
        assert stage.goes_on or stage.not_built or stage.estimate(16) <= stage.limit, stage.name


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
    files = [f"tests/test_{name}.py" for name in ("cuda", "cuda_curvature", "cuda_graphs", "cuda_perceptron")]
    assert words[-8:] == ["-n", "8", "--dist", "worksteal", *files]


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


# ---- the pack


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
        assert reached or entry["reason"].startswith(("not there", "not built yet")), entry
    assert {path.name for path in out.iterdir()} == {f"gpu_{plan}.json", f"gpu_{plan}.tar.gz"}
    with tarfile.open(out / f"gpu_{plan}.tar.gz") as tar:
        assert {"logs/load.log", "logs/smoke.log", "results/smoke.json"} <= set(tar.getnames())
    assert "rehearsal of the runner" in text and "estimate" in text
