"""Ten minutes on a GPU: a plan of stages, the most valuable first, that ends by itself in 8:30.

    python tools/pack_for_gpu.py --out gpu_pack                # before, on a machine without a GPU
    python tools/gpu_check.py --pack gpu_pack --out results    # on the GPU
    python tools/gpu_check.py --dry-run --out results          # all that needs no GPU, and how long the rest will take

`--plan check` proves the kernels right and measures them; `--plan experiments --data DIR` makes the paper's figures
as far as the time allows, and goes on next time with `--from gpu_experiments.tar.gz`. Writes two files, after every
stage anew: OUT/gpu_PLAN.json, with the machine and every stage's result, reason, seconds and numbers, and
OUT/gpu_PLAN.tar.gz with logs, figures and run folders. `--resume` repeats what is not ok in them. A result is ok,
failed, skipped or unavailable (the machine refuses a tool); the exit status is 1 if anything has failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_packing import ROOT, git_commit, read_pack, tree_hash
from gpu_runner import GRACE, LAST_WRITE, Results, Runner, run_child, say, unpack
from gpu_stages import BUILD_SECONDS, PLANS, Stage

SECONDS = 510.0
PROCESSES = 8  # of pytest, on one GPU
DESCRIBE = """
import json, platform, sys
import torch
from machine import machine
cuda = torch.cuda.is_available()
print(json.dumps(machine("cuda" if cuda else "cpu") | {"glibc": platform.libc_ver()[1], "has_cuda": cuda}))
"""


def main(argv: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    arguments = parse(argv)
    stages = chosen(arguments)
    show(stages, arguments)
    if arguments.list:
        return
    signal.signal(signal.SIGTERM, stop)  # ends the stage that runs, and keeps what there is
    pack = find_pack(arguments.pack)
    description = describe()
    if not description.pop("has_cuda") and not arguments.dry_run:
        sys.exit("gpu_check: torch sees no CUDA device; --dry-run does what needs none")
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        work = Path(folder)
        results = Results(arguments.out.resolve(), work, f"gpu_{arguments.plan}", head(arguments, pack, description))
        try:
            if arguments.resume:
                results.resume()
            if arguments.before:
                unpack(arguments.before, work, "runs")
        except (ValueError, OSError) as error:
            sys.exit(f"gpu_check: {error}")
        runner = Runner(
            results,
            values(arguments, pack, work, description),
            end=start + arguments.seconds - LAST_WRITE,
            dry=arguments.dry_run,
            has_data=arguments.data is not None or arguments.synthetic,
            cwd=work / "tree",
            env=environment(work),
            processors=arguments.processors,
        )
        (work / "tree").mkdir()
        passed = runner.run(stages)
        if arguments.dry_run:
            passed &= rehearse(results, stages)
    archive = results.report["archive"]
    if archive["left_out"]:
        print("left out of the archive:", ", ".join(archive["left_out"]))
    if "warning" in archive:
        print("the archive has", archive["warning"])
    written = ", ".join(f"{path} ({path.stat().st_size:,} bytes)" for path in (results.json, results.archive))
    print(f"{time.monotonic() - start:.0f} s of {arguments.seconds:.0f}: {written}")
    if not passed:
        sys.exit(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder for the two files")
    parser.add_argument("--plan", choices=tuple(PLANS), default="check")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all, the start of Python included")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, and the one that loads the extension")
    parser.add_argument("--list", action="store_true", help="print the plan, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="what needs no GPU of every stage, and of the runner")
    parser.add_argument("--resume", action="store_true", help="keep what is ok in OUT, on the same tree and card")
    parser.add_argument("--pack", type=Path, help="from tools/pack_for_gpu.py (default: gpu_pack, if it is there)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10, for the experiments")
    parser.add_argument("--synthetic", action="store_true", help="made-up images for the experiments")
    parser.add_argument("--from", type=Path, dest="before", metavar="ARCHIVE", help="go on with the runs in it")
    parser.add_argument("--processors", type=int, default=len(os.sched_getaffinity(0)), help="to plan for")
    arguments = parser.parse_args(argv)
    if not arguments.seconds > 0:
        parser.error(f"--seconds: expected a positive number, got {arguments.seconds:g}")
    if arguments.processors < 1:
        parser.error(f"--processors: expected at least 1, got {arguments.processors}")
    for name, path in (("--data", arguments.data), ("--from", arguments.before)):
        if path is not None and not path.exists():
            parser.error(f"{name}: expected something that exists, got {path}")
    known = [stage.name for stage in PLANS[arguments.plan]]
    if unknown := [name for name in arguments.only or () if name not in known]:
        parser.error(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return arguments


def chosen(arguments: argparse.Namespace) -> list[Stage]:
    stages = [stage for stage in PLANS[arguments.plan] if not arguments.only or stage.name in ("load", *arguments.only)]
    if find_pack(arguments.pack) is None:
        fixed, work = BUILD_SECONDS
        stages[0] = dataclasses.replace(stages[0], fixed=stages[0].fixed + fixed, work=work)
    return stages


def find_pack(given: Path | None) -> Path | None:
    pack = given or (ROOT / "gpu_pack" if (ROOT / "gpu_pack/pack.json").exists() else None)
    try:
        if pack is not None:
            read_pack(pack)
    except ValueError as error:
        sys.exit(f"gpu_check: {error}")
    return pack and pack.resolve()


def show(stages: Sequence[Stage], arguments: argparse.Namespace) -> None:
    """The plan, with what it will take."""
    processors, total = arguments.processors, 0.0
    print(f"plan '{arguments.plan}', {arguments.seconds:.0f} s, {processors} processors\n")
    print(f"{'stage':28}{'estimate':>10}{'limit':>8}  without a GPU")
    for stage in stages:
        estimate = stage.estimate(processors)
        total += estimate
        words = [f"{estimate:.0f} s", f"{stage.limit:.0f} s"] if not stage.goes_on else ["what is", "left"]
        dry = "its arguments" if stage.dry is None else "a part" if stage.dry else "nothing"
        print(f"{stage.name:28}{words[0]:>10}{words[1]:>8}  {dry if stage.needs_gpu else 'all'}")
    print(f"{'all':28}{total:8.0f} s\n", flush=True)


def describe() -> dict[str, Any]:
    """The machine, from a process of its own: one that has opened the device would keep some of its memory."""
    search = os.pathsep.join(filter(None, (str(ROOT / "tests/benchmarks"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", DESCRIBE]
    answer = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search}, stdout=subprocess.PIPE, text=True, timeout=120
    )
    if answer.returncode:
        sys.exit("gpu_check: this Python cannot describe the machine; does it have torch?")
    description: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return description | {"driver": driver.partition("\n")[0] or None, "processors": os.cpu_count()}


def head(arguments: argparse.Namespace, pack: Path | None, description: dict[str, Any]) -> dict[str, Any]:
    """What the report says of the run as a whole."""
    tree, commit = tree_hash(), git_commit()
    if commit is None and pack:  # a copy without its repository
        packed = read_pack(pack)
        commit = packed["commit"] if packed["tree"] == tree else f"unknown, other than {packed['commit']}"
    return {
        "plan": arguments.plan,
        "dry_run": arguments.dry_run,
        "commit": commit,
        "tree": tree,
        "card": description.get("gpu", {}).get("name"),
        "machine": description,
        "seconds": arguments.seconds,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def values(
    arguments: argparse.Namespace, pack: Path | None, work: Path, description: dict[str, Any]
) -> dict[str, str | list[str]]:
    """What the words in braces of the stages' commands stand for; the rest is in Runner.fill."""
    workers = max(1, min(PROCESSES, arguments.processors))
    data = ["--data", str(arguments.data.resolve())] if arguments.data else ["--synthetic"]
    return {
        "root": str(ROOT),
        "python": sys.executable,
        "pack": ["--pack", str(pack)] if pack else [],
        "data": data,
        "device": "cuda",
        "arch": "sm_" + description.get("gpu", {}).get("capability", "9.0").replace(".", ""),
        "module": str(work / f"tree/dynloss_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}"),
        "threads": str(max(1, arguments.processors // workers)),
        "xdist": ["-n", str(workers), "--dist", "worksteal"],
        "cuda_tests": [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_cuda*.py"))],
    }


def environment(work: Path) -> dict[str, str]:
    """Of every child: the copy of the tree in front, what the pack brought behind it."""
    paths = [str(work / "tree"), str(work / "site"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "Agg",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "cache/inductor"),
        "TRITON_CACHE_DIR": str(work / "cache/triton"),
    }


def rehearse(results: Results, stages: Sequence[Stage]) -> bool:
    """What a dry run can see of the runner itself: a child that overstays, the archive, a second run."""
    faults = []
    snippet = "import subprocess, sys, time; subprocess.Popen(['sleep', '60'], stdout=sys.stdout); time.sleep(60)"
    log = results.work / "logs/rehearsal.log"
    begin = time.monotonic()
    _, late = run_child([sys.executable, "-c", snippet], log, 0.5)
    if not late or time.monotonic() - begin > GRACE + 1:
        faults.append("a child was not ended at its limit")
    results.write()
    with tarfile.open(results.archive) as tar:
        names = set(tar.getnames())
    report = json.loads(results.json.read_text())
    missing = [stage.name for stage in stages if stage.name not in report["stages"]]
    missing += [log.name for log in results.work.glob("logs/*") if f"logs/{log.name}" not in names]
    if missing:
        faults.append(f"not in the results: {', '.join(missing)}")
    second = Results(results.json.parent, results.work, results.json.stem, {**report, "stages": {}})
    second.resume()
    again = [name for name, entry in report["stages"].items() if entry["result"] == "ok" and not second.is_done(name)]
    if again:
        faults.append(f"a second run would repeat {', '.join(again)}")
    say("rehearsal of the runner", "failed" if faults else "ok", "; ".join(faults), time.monotonic() - begin)
    return not faults


def stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
