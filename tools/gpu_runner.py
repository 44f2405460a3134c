"""Runs the stages of a plan against the clock and keeps what each gave.

The results are one JSON and one archive, replaced after every stage by whole new ones, so that a run that is killed
leaves what it had. A stage's child leads a process group of its own, which ends with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_packing import ROOT
from gpu_stages import REFUSED, Artefacts, Reading, Stage, read_json

GRACE = 5.0  # seconds from SIGTERM to SIGKILL
LAST_WRITE = 8.0  # seconds for the results of the last stage
DRY_LIMIT = 120.0  # of each stage in a dry run
LEAST = 5.0  # a stage is not begun with fewer seconds left, nor with less than half of its estimate
ARCHIVE_BYTES = 16 << 20  # such machines give back no larger file
LOG_BYTES = 2 << 20  # more is cut out of a log's middle
KEPT = ("logs", "results", "runs")  # of the work folder, in the archive
LEFT_OUT = ("events.out.tfevents.*", ".*")
#: Left out besides, one after the other, while the archive is too large: a checkpoint holds the rows of the metrics;
#: where it is too large itself, the metrics and the figures come back instead.
ALSO_LEFT_OUT = (("metrics.npz",), ("checkpoint.pt",))
#: The line that says why a child has failed: an exception's, a compiler's, what a sanitizer has found.
TELLING = re.compile(r"([\w.]*(Error|Exception)(:|$)|.*\berror: |========= (?!COMPUTE-SANITIZER|Target|\w+ SUMMARY)\S)")


def end_group(child: subprocess.Popen[bytes], grace: float) -> None:
    """Ends a child that leads its group, if it has not ended, and all that it has started."""
    try:
        if child.poll() is None:
            signal_group(child, signal.SIGTERM)
            end = time.monotonic() + grace
            while signal_group(child, 0) and time.monotonic() < end:
                time.sleep(0.02)
                child.poll()  # one that nobody has waited for still counts
    finally:
        signal_group(child, signal.SIGKILL)
        child.wait()


def signal_group(child: subprocess.Popen[bytes], number: int) -> bool:
    """False if none of the group is left."""
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return False
    return True


def run_child(
    command: Sequence[str],
    log: Path,
    limit: float,
    *,
    grace: float = GRACE,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, bool]:
    """Runs a command for at most limit + grace seconds; its exit status, and whether it was ended at its limit."""
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env=env,
        )
        late = False
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end_group(child, grace)
    return child.returncode, late


class Results:
    """OUT/NAME.json and OUT/NAME.tar.gz."""

    def __init__(self, out: Path, work: Path, name: str, head: Mapping[str, Any]) -> None:
        self.json, self.archive, self.work = out / f"{name}.json", out / f"{name}.tar.gz", work
        self.report: dict[str, Any] = {**head, "stages": {}}
        for folder in (out, *(work / kept for kept in KEPT)):
            folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Takes over what an interrupted run left.

        Raises:
            ValueError: It left nothing, or it is of another plan, tree or card.
        """
        try:
            before = json.loads(self.json.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--resume: expected the {self.json.name} of an earlier run ({error})") from None
        for what in ("plan", "dry_run", "tree", "card"):
            if before.get(what) != self.report[what]:
                commits = f" (commits {before.get('commit')} and {self.report['commit']})" if what == "tree" else ""
                raise ValueError(
                    f"--resume: {self.json.name} is of {what} {before.get(what)}, this is {self.report[what]}{commits}:"
                    " give another --out"
                )
        self.report["stages"] = before["stages"]
        if self.archive.exists():
            unpack(self.archive, self.work)

    def is_done(self, name: str) -> bool:
        stage = self.report["stages"].get(name, {})
        return "ok" in (stage.get("result"), stage.get("dry")) and stage.get("finished") is not False

    def record(self, name: str, entry: Mapping[str, Any]) -> None:
        self.report["stages"][name] = dict(entry)
        self.write()

    def write(self) -> None:
        for also in ((), *ALSO_LEFT_OUT):
            left_out = self._write_archive(LEFT_OUT + also)
            size = self.archive.stat().st_size
            if size <= ARCHIVE_BYTES:
                break
        self.report["archive"] = {"bytes": size, "left_out": left_out}
        if size > ARCHIVE_BYTES:
            self.report["archive"]["warning"] = f"more than {ARCHIVE_BYTES >> 20} MiB: it may not come back"
        with Replacement(self.json) as part:
            part.write_text(json.dumps(self.report, indent=2) + "\n")

    def _write_archive(self, left_out: Sequence[str]) -> list[str]:
        """Returns the names of what it has left out."""
        found = [path for kept in KEPT for path in sorted((self.work / kept).rglob("*")) if path.is_file()]
        out = [path for path in found if any(path.match(pattern) for pattern in left_out)]
        with Replacement(self.archive) as part, tarfile.open(part, "w:gz", compresslevel=4) as tar:
            for path in found:
                if path not in out:
                    tar.add(path, path.relative_to(self.work))
        return [path.relative_to(self.work).as_posix() for path in out]


class Replacement:
    """A scratch file that takes the place of `path` once the block has ended without an error."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


def unpack(archive: Path, work: Path, only: str = "") -> None:
    """Puts an archive's folders back into the work folder, or only the one named.

    Raises:
        ValueError: It is no archive.
    """
    try:
        with tarfile.open(archive) as tar:
            members = [member for member in tar if not only or Path(member.name).parts[0] == only]
            tar.extractall(work, members=members, filter="data")
    except tarfile.TarError as error:
        reason = str(error).partition(":")[0]
        raise ValueError(f"{archive}: expected the archive of an earlier run ({reason})") from None


@dataclasses.dataclass
class Runner:
    """Runs stages.

    Args:
        results: takes what they give.
        values: what words in braces in a command stand for; a list stands for several arguments.
        end: when all must be over, on time.monotonic()'s clock.
        dry: run only what needs no GPU.
        has_data: whether stages that need data get it.
    """

    results: Results
    values: Mapping[str, str | list[str]]
    end: float
    dry: bool = False
    has_data: bool = False
    cwd: Path | None = None
    env: Mapping[str, str] | None = None
    processors: int = 1
    grace: float = GRACE

    def run(self, stages: Sequence[Stage]) -> bool:
        """Runs those that are not done, in turn; whether none has failed."""
        for index, stage in enumerate(stages):
            again = stage.name == "load"  # the others run in the copy that it makes
            if self.results.is_done(stage.name) and not again:
                say(stage.name, "ok before")
                continue
            sharing = sum(bool(other.goes_on) and not self.results.is_done(other.name) for other in stages[index:])
            entry = self.attempt(stage, max(1, sharing))
            self.results.record(stage.name, entry)
            say(stage.name, entry["result"], entry.get("reason", ""), entry["seconds"])
            if again and entry["result"] != "ok":
                for other in stages[index + 1 :]:
                    if not self.results.is_done(other.name):
                        self.results.record(other.name, skipped("the extension did not load"))
                return False
        return not any(entry["result"] == "failed" for entry in self.results.report["stages"].values())

    def attempt(self, stage: Stage, sharing: int = 1) -> dict[str, Any]:
        """Runs a stage if it can be run; its entry in the report."""
        if reason := self.obstacle(stage):
            return reason
        left = self.end - time.monotonic()
        least = LEAST if self.dry or stage.goes_on else max(LEAST, stage.estimate(self.processors) / 2)
        grace = self.grace_of(stage)
        if left < least + grace:
            return skipped(f"no time left: it needs {least:.0f} s and more, there are {max(0.0, left - grace):.0f}")
        if not self.dry:
            limit = left / sharing - grace if stage.goes_on else min(left - grace, stage.limit)
            return self.execute(stage, self.command(stage, limit), limit, limit < stage.limit)
        if stage.dry == ():
            return skipped("needs a GPU; nothing of it runs without one") | {"dry": "ok"}
        limit = min(left - grace, DRY_LIMIT)
        entry = self.execute(stage, self.fill(stage, self.dry_command(stage), limit), limit, limit < DRY_LIMIT)
        if stage.dry is None and entry["result"] == "ok":
            entry |= self.unknown_options(stage)
        if stage.needs_gpu and entry["result"] == "ok":
            entry |= {"result": "skipped", "reason": "needs a GPU; its dry part passed", "dry": "ok"}
        return entry

    def grace_of(self, stage: Stage) -> float:
        """A run that goes on has a checkpoint to write."""
        return 3 * self.grace if stage.goes_on else self.grace

    def obstacle(self, stage: Stage) -> dict[str, Any] | None:
        """Why a stage cannot run here, as its entry."""
        if stage.script and not (Path(str(self.values["root"])) / stage.script).exists():
            return skipped(f"not there: {stage.script}")
        if self.dry:
            return None
        if stage.needs_data and not self.has_data:
            return skipped("no data: give --data DIR with CIFAR-10, or --synthetic")
        if stage.program and shutil.which(stage.program) is None:
            return skipped(f"{stage.program} is not on PATH") | {"result": "unavailable"}
        if stage.artefact and not Path(self.fill(stage, (stage.artefact,), 0)[0]).exists():
            return skipped(f"{stage.artefact.rpartition('/')[2]} is not there: an earlier stage has not made it")
        return None

    def portable(self, command: Sequence[str]) -> list[str]:
        """The command without this machine's folders, for the report."""
        names = {sys.executable: "python", str(self.results.work): "WORK", str(ROOT): "."}
        words = [str(word) for word in command]
        for folder, name in names.items():
            words = [word.replace(folder, name) for word in words]
        return words

    def execute(self, stage: Stage, command: Sequence[str], limit: float, is_cut: bool) -> dict[str, Any]:
        """Runs a command for a stage; `is_cut`: the limit is that of the plan, and not the stage's own."""
        artefacts = self.artefacts(stage)
        start = time.monotonic()
        entry: dict[str, Any] = {"command": self.portable(command), "limit": round(limit, 1)}
        try:
            grace = self.grace_of(stage)
            code, late = run_child(command, artefacts.log, limit, grace=grace, cwd=self.cwd, env=self.env)
        except OSError as error:
            return entry | skipped(str(error)) | {"result": "unavailable"}
        except BaseException:  # the plan itself is stopped: what there is stays
            stopped = entry | {"result": "failed", "reason": "the plan was stopped", "seconds": 0.0}
            self.results.record(stage.name, stopped | {"seconds": round(time.monotonic() - start, 1)})
            raise
        entry["seconds"] = round(time.monotonic() - start, 1)
        if not stage.goes_on:  # nothing will: in the archive it would only be in the way
            (artefacts.run / "checkpoint.pt").unlink(missing_ok=True)
        shorten(artefacts.log)
        text = artefacts.log.read_text(errors="replace")
        try:
            reading = (read_json if self.dry else stage.read)(artefacts, code)
        except Exception as error:  # a half-written or foreign file must not end the plan
            reading = Reading(None, "failed", f"its results cannot be read: {error!r}")
        if reading.numbers is not None:
            entry["numbers"] = reading.numbers
        entry |= verdict(stage, code, late, text, reading)
        if late and entry["result"] == "failed":
            entry["reason"] = f"took more than {limit:.3g} s"
            if is_cut:
                entry |= {"result": "skipped", "reason": f"no time left: ended with the plan after {limit:.3g} s"}
        if entry["result"] == "failed":
            entry["end"] = text[-1500:]
        return entry

    def artefacts(self, stage: Stage) -> Artefacts:
        work, name = self.results.work, stage.name
        return Artefacts(
            log=work / f"logs/{name}.log",
            json=work / f"results/{name}.json",
            run=work / f"runs/{name}",
            table=work / f"results/{name}.csv",
        )

    def command(self, stage: Stage, limit: float) -> list[str]:
        has_checkpoint = (self.artefacts(stage).run / "checkpoint.pt").exists()
        return self.fill(stage, stage.goes_on if stage.goes_on and has_checkpoint else stage.command, limit)

    def dry_command(self, stage: Stage) -> Sequence[str]:
        """Its own, or the help of its script, subcommand included."""
        if stage.dry is not None:
            return stage.dry
        first = stage.command.index(stage.script) + 1
        words = stage.command[first : first + 1]
        return (*stage.command[:first], *(word for word in words if word[0] not in "-{"), "--help")

    def unknown_options(self, stage: Stage) -> dict[str, Any]:
        """A failure if the help of a script does not name the options that the stage will give it."""
        help_text = self.artefacts(stage).log.read_text()
        given = [*stage.command, *stage.goes_on, *(self.values["data"] if stage.needs_data else ())]
        options = {word for word in given[stage.command.index(stage.script) :] if word.startswith("--")}
        unknown = sorted(word for word in options if not re.search(rf"{word}(?![\w-])", help_text))
        return {"result": "failed", "reason": f"{stage.script} has no {', '.join(unknown)}"} if unknown else {}

    def fill(self, stage: Stage, command: Sequence[str], limit: float) -> list[str]:
        """The command with values for its words in braces; `seconds` is what its child may plan with."""
        artefacts = self.artefacts(stage)
        seconds = f"{max(1.0, limit - max(5.0, limit / 10)):.0f}"
        values = {**self.values, "seconds": seconds, "work": str(self.results.work)}
        values |= {"json": str(artefacts.json), "run": str(artefacts.run), "table": str(artefacts.table)}
        words: list[str] = []
        for word in command:
            value = values.get(word[1:-1])
            filled = re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), word)
            words += value if word.startswith("{") and isinstance(value, list) else [filled]
        return words


def verdict(stage: Stage, code: int, late: bool, text: str, reading: Reading) -> dict[str, Any]:
    """Result and reason of a child that has ended."""
    refusal = next((line.strip() for line in text.splitlines() if any(word in line for word in REFUSED)), None)
    if stage.program and refusal:
        return {"result": "unavailable", "reason": refusal[:200]}
    if stage.goes_on and code == 130:  # stopped, with a whole checkpoint
        step = next(iter(re.findall(r"stopped after step \d+", text)), "stopped in time")
        return {"result": "ok", "reason": f"{step}; goes on with --from", "finished": False}
    if late:
        return {"result": "failed"}
    if reading.result:
        return {"result": reading.result, "reason": reading.reason}
    if code:
        return {"result": "failed", "reason": f"exit status {code}: {reading.reason or telling_line(text)[:200]}"}
    return {"result": "ok"}


def telling_line(text: str) -> str:
    """The first that says why a child has failed, or else the last: a program's summary, and not a sanitizer's."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    why = next((line for line in lines if TELLING.match(line)), None)
    own = [line for line in lines if not line.startswith("=========")]
    return why or (own or lines or ["no output"])[-1]


def skipped(reason: str) -> dict[str, Any]:
    return {"result": "skipped", "reason": reason, "seconds": 0.0}


def shorten(log: Path) -> None:
    """Cuts the middle out of a log that is too long for the archive."""
    size = log.stat().st_size
    if size <= LOG_BYTES:
        return
    with log.open("rb") as stream:
        head = stream.read(LOG_BYTES // 2)
        stream.seek(size - LOG_BYTES // 2)
        tail = stream.read()
    log.write_bytes(head + f"\n... {size - LOG_BYTES} bytes left out ...\n".encode() + tail)


def say(name: str, result: str, reason: str = "", seconds: float = 0.0) -> None:
    print(f"{name:28}{seconds:7.1f} s  {result}{': ' if reason else ''}{reason}", flush=True)
