"""The run folder and the command line that every example shares."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from typing import Literal

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common.config import parse_options
from common.records import Table, load_state, state_of
from common.run import BaseConfig, RunError, RunFolder, atomic_write, open_run, resolve_device
from common.stopping import GracefulStop, Stopped, interruptible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """A small experiment."""

    preset: Literal["paper", "small"] = "paper"  # a named set of defaults
    steps: int = 10  # steps
    lr: float = 0.5  # learning rate
    stop_step: int | None = 7  # step, or none
    closed: bool = True  # closed turns
    ntk: bool = False  # kernel
    mode: Literal["a", "b"] = "a"  # mode

    MAY_CHANGE = BaseConfig.MAY_CHANGE | {"steps"}

    def __post_init__(self):
        self.require("steps", self.steps >= 1, "at least 1")


PRESETS = {"paper": Config(), "small": Config(preset="small", lr=0.25, stop_step=None, closed=False)}


def parse(*argv):
    return parse_options(PRESETS["paper"], "A test.", [str(word) for word in argv], PRESETS)


def stderr(capsys):
    """What went to standard error, without the frame that tyro draws and its line breaks."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


# ---- run folder ------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_previous_file_and_no_litter(tmp_path):
    path = tmp_path / "metrics.npz"
    with atomic_write(path) as file:
        file.write(b"first")

    def fail():
        with atomic_write(path) as file:
            file.write(b"half of the sec")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_files_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_every_file_of_the_folder_is_read_back(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.write_config({"lr": 0.1, "out": tmp_path})
    folder.write_metrics({"step": np.arange(3), "loss": np.ones(3)})
    folder.write_summary({"accuracy": torch.tensor(0.5), "best": float("nan"), "nested": [{"a": np.int64(3)}]})
    folder.write_figure(Figure())
    folder.write_checkpoint({"weight": torch.ones(2), "step": 3})
    assert folder.read_config() == {"lr": 0.1, "out": str(tmp_path)}
    np.testing.assert_array_equal(folder.read_metrics()["step"], [0, 1, 2])
    assert folder.read_summary() == {"accuracy": 0.5, "best": None, "nested": [{"a": 3}]}
    assert torch.equal(folder.read_checkpoint()["weight"], torch.ones(2))
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == ["checkpoint.pt", "config.json", "figure.png", "metrics.npz", "summary.json"]
    json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)  # no NaN: that is no JSON


def test_a_file_in_the_folders_place_is_an_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"--out: expected a folder or a new name, got .*/run, which is a file"):
        RunFolder(tmp_path / "run")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


# ---- one process in a folder ------------------------------------------------------------------------------


def start_child(work):
    """The id of a forked process that does `work`, ends with code 1 on a RunError, and after a minute anyway."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            signal.alarm(60)
            work()
            code = 0
        except RunError:
            code = 1
        finally:
            os._exit(code)
    return child


def another_process_may_claim(path):
    _, status = os.waitpid(start_child(lambda: RunFolder(path).claim()), 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1)
    return code == 0


def test_a_second_process_is_refused_until_the_first_lets_go(tmp_path):
    folder = open_run(Config(out=tmp_path / "run"))
    again = open_run(Config(out=tmp_path / "run"))  # the same process may
    assert not another_process_may_claim(tmp_path / "run")
    assert another_process_may_claim(tmp_path / "other")
    del folder
    assert not another_process_may_claim(tmp_path / "run")
    del again
    assert another_process_may_claim(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_file_system_that_locks_only_what_is_open_for_writing(tmp_path, monkeypatch):
    """As NFS."""
    flock = fcntl.flock

    def of_nfs(handle, operation):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, operation)

    monkeypatch.setattr("common.run.fcntl.flock", of_nfs)
    folder = RunFolder(tmp_path).claim()
    assert not another_process_may_claim(tmp_path)
    del folder
    assert another_process_may_claim(tmp_path)


def test_the_lock_file_of_another_process_is_left_alone(tmp_path):
    folder = RunFolder(tmp_path).claim()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("")
    theirs = os.stat(tmp_path / ".lock").st_ino
    del folder
    assert os.stat(tmp_path / ".lock").st_ino == theirs
    assert another_process_may_claim(tmp_path)


def test_a_lock_file_that_its_process_removes_meanwhile_is_not_taken_for_ours(tmp_path, monkeypatch):
    """Between our open and our flock, when what we lock is out of the others' reach."""
    flock, times = fcntl.flock, []

    def late(handle, operation):
        if not times:
            (tmp_path / ".lock").unlink()
        times.append(handle)
        flock(handle, operation)

    with monkeypatch.context() as patch:
        patch.setattr("common.run.fcntl.flock", late)
        folder = RunFolder(tmp_path).claim()
    assert len(times) == 2
    assert not another_process_may_claim(tmp_path)
    del folder
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_lock_and_its_children_keep_none(tmp_path):
    ready, tell = os.pipe()

    def inherit():
        os.write(tell, f"{os.getpid():10d}".encode())
        time.sleep(30)

    def work():
        folder = RunFolder(tmp_path).claim()
        os.waitpid(start_child(inherit), 0)
        del folder

    child = start_child(work)
    grandchild = int(os.read(ready, 10))
    try:
        with pytest.raises(RunError, match=r"--out: expected a folder in which no other process works, got .*; wait"):
            RunFolder(tmp_path).claim()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.kill(grandchild, 0)  # is there yet
        RunFolder(tmp_path).claim()
        assert not list(tmp_path.iterdir())
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    folder = open_run(Config(out=tmp_path / "run"))
    kept = folder / ".notes"
    for path in (kept, folder / ".checkpoint.pt.abcdefgh", folder / ".metrics.npz.a_cdef0h"):
        path.write_bytes(b"half")
    assert RunFolder(folder.path).path.joinpath(".checkpoint.pt.abcdefgh").exists()  # a reader leaves it alone
    open_run(Config(out=tmp_path / "run", resume=True))
    assert set(files_of(folder)) == {"config.json", ".notes", ".lock"}


# ---- files that are not what they should be ----------------------------------------------------------------


def saved_run(path):
    folder = open_run(Config(out=path))
    folder.write_checkpoint({"weight": torch.arange(300.0), "step": 3})
    folder.write_metrics({"step": np.arange(300)})
    folder.write_summary({"finished": False})
    return folder


@pytest.mark.parametrize("where", [0, 10, 0.2, 0.5, 0.8, -100, -72, -71, -65, -30, -1])
def test_a_flipped_byte_in_a_checkpoint_is_noticed(tmp_path, where):
    folder = saved_run(tmp_path / "run")
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    content[int(where * len(content)) if isinstance(where, float) else where] ^= 4
    (folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(
        RunError, match=r"checkpoint\.pt: expected the checkpoint of a run, got .* differ .*; put a good"
    ):
        folder.read_checkpoint()


@pytest.mark.parametrize("keep", [0, 1, 22, 70, 71, 72, 500, 0.9, -1])
def test_a_truncated_checkpoint_is_noticed(tmp_path, keep):
    folder = saved_run(tmp_path / "run")
    content = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(RunError, match=r"checkpoint\.pt: expected the checkpoint of a run, got .*; put a good copy"):
        folder.read_checkpoint()


def test_a_checkpoint_without_checksum_is_read_and_checked_by_the_crcs_of_its_zip(tmp_path):
    folder = saved_run(tmp_path / "run")
    torch.save({"weight": torch.arange(300.0)}, folder / "checkpoint.pt")
    assert torch.equal(folder.read_checkpoint()["weight"], torch.arange(300.0))
    content = (folder / "checkpoint.pt").read_bytes()
    at = content.index(np.arange(100, 300, dtype=np.float32).tobytes())
    (folder / "checkpoint.pt").write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(RunError, match=r"checkpoint\.pt: .* got ValueError: bytes in .*/data/0 that differ"):
        folder.read_checkpoint()


def test_a_checkpoint_is_a_file_for_torch_load(tmp_path):
    folder = saved_run(tmp_path / "run")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3


class Owner:
    def __init__(self):
        self.step, self.layer = 0, torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": None}, "KeyError: 'step'"),
        ({"step": "many"}, "TypeError: step of type str"),
        ({"layer": torch.nn.Linear(3, 2).state_dict()}, "RuntimeError: .*size mismatch"),
        ({"layer": 5}, "TypeError"),
    ],
)
def test_the_checkpoint_of_something_else_is_refused(tmp_path, change, reason):
    folder = RunFolder(tmp_path)
    state = state_of(Owner(), ("step", "layer")) | change
    folder.write_checkpoint({name: value for name, value in state.items() if value is not None})
    with pytest.raises(RunError, match=rf"checkpoint\.pt: expected the state of this run, got {reason}") as error:
        folder.restore(lambda state: load_state(Owner(), state, ("step", "layer")))
    assert "\n" not in str(error.value)
    torch.save([1, 2], folder / "checkpoint.pt")
    with pytest.raises(RunError, match=r"checkpoint\.pt: expected the checkpoint of a run, got TypeError: a list"):
        folder.restore(pytest.fail)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json: expected a JSON object, got JSONDecodeError"),
        ('{"lr": 0.', "config.json: expected a JSON object, got JSONDecodeError"),
        ("[1]", "config.json: expected a JSON object, got TypeError: a list"),
        ("\udc80", "config.json: expected a JSON object, got UnicodeDecodeError"),
        ('{"lr": "fast"}', "config.json: expected a value for --lr, got 'fast'"),
        ('{"steps": 1.5}', "config.json: expected a value for --steps, got 1.5"),
        ('{"closed": 1}', "config.json: expected a value for --closed, got 1"),
        ('{"mode": "c"}', "config.json: expected a value for --mode, got 'c'"),
        ('{"stop_step": [3]}', "config.json: expected a value for --stop-step, got [3]"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_told_in_one_line(tmp_path, text, message, capsys):
    folder = saved_run(tmp_path / "run")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = files_of(folder)
    with pytest.raises(SystemExit):
        parse("--out", folder.path, "--resume")
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert files_of(folder) == before


def test_values_of_every_kind_are_read_back(tmp_path):
    config = Config(out=tmp_path / "run", stop_step=None, lr=2, mode="b", ntk=True)
    open_run(config)
    assert parse("--out", config.out, "--resume") == dataclasses.replace(config, resume=True)


def test_damaged_metrics_and_summaries_are_told_by_name(tmp_path):
    folder = saved_run(tmp_path / "run")
    for name, read in (("metrics.npz", folder.read_metrics), ("summary.json", folder.read_summary)):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(RunError, match=rf"{name}: expected .*, got "):
            read()
        path.unlink()
        with pytest.raises(RunError, match=rf"{name}: expected .*, got No such file"):
            read()


# ---- places that cannot be written to ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small file system: only root can mount one")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_leaves_every_file_as_it_was(small_disk):
    folder = saved_run(small_disk / "run")
    before = files_of(folder)
    for write in (
        lambda: folder.write_checkpoint({"weight": torch.zeros(100_000)}),
        lambda: folder.write_metrics({"step": np.arange(100_000)}),
        lambda: folder.write_summary({"names": ["long"] * 100_000}),
    ):
        with pytest.raises(
            RunError, match=r"/run/\w+\.\w+: expected .*, got No space left on device; nothing was"
        ) as e:
            write()
        assert "\n" not in str(e.value)
        assert files_of(folder) == before


def test_a_read_only_folder_is_told_and_left_alone(small_disk):
    folder = RunFolder(saved_run(small_disk / "run").path)
    before = files_of(folder)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(
        RunError, match=r"checkpoint\.pt: expected a place to write to, got Read-only file system; nothing"
    ):
        folder.write_checkpoint({})
    with pytest.raises(RunError, match=r"config\.json: expected a place to write to, got Read-only file system"):
        open_run(Config(out=folder.path, resume=True))
    with pytest.raises(
        RunError, match=r"/new: expected a folder that can be made, got Read-only .*; take another --out"
    ):
        RunFolder(small_disk / "new")
    assert files_of(folder) == before


# ---- table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 11])
def test_rows_come_back_in_order_whatever_the_block(rows):
    table = Table("loss", "vector", "count", block=4)
    for index in range(rows):
        table.append(loss=torch.tensor(float(index)), vector=torch.full((2,), index), count=index)
    arrays = table.arrays()
    assert len(table) == rows
    assert arrays["loss"].tolist() == arrays["count"].tolist() == list(range(rows))
    if rows:
        np.testing.assert_array_equal(arrays["vector"][:, 1], np.arange(rows))


def test_single_rows_blocks_and_restored_rows_mix():
    table = Table("a", block=3)
    table.append(a=0)
    table.extend(a=np.array([1, 2]))
    table.append(a=3)
    other = Table("a")
    other.append(a=99)
    other.load_state_dict(table.state_dict())
    other.append(a=4)
    assert len(other) == 5
    assert other.arrays()["a"].tolist() == [0, 1, 2, 3, 4]
    assert table.arrays()["a"].tolist() == [0, 1, 2, 3]


def test_recorded_tensors_keep_no_graph():
    table = Table("loss")
    table.append(loss=torch.ones((), requires_grad=True) * 2)
    assert table.arrays()["loss"].tolist() == [2]


def test_wrong_columns_are_refused():
    table = Table("a", "b")
    with pytest.raises(ValueError, match="columns: expected"):
        table.append(a=1)
    with pytest.raises(ValueError, match="columns: expected one number of rows"):
        table.extend(a=[1], b=[1, 2])


# ---- command line ----------------------------------------------------------------------------------------


def test_options_are_kebab_case_fields_with_their_types(tmp_path):
    config = parse("--out", tmp_path, "--stop-step", "none", "--no-closed", "--ntk", "--lr", "1e-3", "--mode", "b")
    assert config == Config(out=tmp_path, stop_step=None, closed=False, ntk=True, lr=1e-3, mode="b")
    assert parse().stop_step == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--steps", "0"), "--steps: expected at least 1, got 0"),
        (("--steps", "many"), "--steps"),
        (("--stop-step", "soon"), "--stop-step"),
        (("--mode", "c"), "--mode"),
        (("--preset", "large"), "--preset"),
        (("--lr",), "--lr"),
        (("extra",), "extra"),
        (("--step", "3"), "Unrecognized options: --step"),  # no abbreviations: they would break when options are added
    ],
)
def test_bad_values_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    assert message in stderr(capsys)


def test_resume_takes_the_saved_options(tmp_path, capsys):
    folder = open_run(parse("--out", tmp_path / "run", "--lr", 0.1, "--stop-step", "none"))
    folder.write_checkpoint({})
    resumed = parse("--out", tmp_path / "run", "--resume", "--steps", 20)
    assert (resumed.lr, resumed.stop_step, resumed.steps, resumed.resume) == (0.1, None, 20, True)
    with pytest.raises(SystemExit):
        parse("--out", tmp_path / "run", "--resume", "--lr", 0.2)
    assert "--lr: expected 0.1, as in the run in" in stderr(capsys)


def test_resume_beside_a_preset_keeps_what_was_given_then(tmp_path, capsys):
    open_run(parse("--out", tmp_path / "run", "--preset", "small", "--mode", "b"))
    resumed = parse("--out", tmp_path / "run", "--preset", "small", "--resume")
    assert (resumed.lr, resumed.mode, resumed.stop_step) == (0.25, "b", None)
    open_run(parse("--out", tmp_path / "other", "--mode", "b"))
    with pytest.raises(SystemExit):
        parse("--out", tmp_path / "other", "--preset", "small", "--resume")
    assert "--lr: expected 0.5, as in the run in" in stderr(capsys)


def test_a_preset_gives_the_defaults_and_other_options_win(tmp_path):
    assert parse("--preset", "small") == PRESETS["small"]
    assert parse("--preset", "paper") == parse() == PRESETS["paper"]
    for argv in (("--preset", "small", "--lr", 2, "--closed"), ("--lr=2", "--closed", "--preset=small")):
        assert parse(*argv) == dataclasses.replace(PRESETS["small"], lr=2.0, closed=True)
    folder = open_run(parse("--out", tmp_path / "run", "--preset", "small"))
    assert "preset" not in folder.read_config()  # what it stands for is recorded instead


def test_none_is_spelled_in_any_case_and_the_last_of_a_repeated_option_counts():
    for word in ("none", "None", "NONE"):
        assert parse("--stop-step", word).stop_step is None
    assert parse("--stop-step", 3, "--stop-step", "none", "--stop-step", 5).stop_step == 5
    assert parse("--no-closed", "--closed", "--ntk", "--no-ntk") == Config()


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--stop-step none|INT step, or none (default: 7)" in shown
    assert "--closed, --no-closed closed turns (default: True)" in shown
    assert "--preset {paper,small} a named set of defaults (default: paper)" in shown


def test_only_a_finished_run_of_the_same_options_is_replaced(tmp_path):
    config = Config(out=tmp_path / "run")
    folder = open_run(config)
    folder.write_checkpoint({})
    with pytest.raises(ValueError, match="unfinished run; --resume"):
        open_run(config)
    folder.write_summary({"finished": True})
    open_run(config)
    with pytest.raises(ValueError, match=r"other options \(--lr\)"):
        open_run(dataclasses.replace(config, lr=0.7))


def test_a_folder_of_runs_is_not_replaced_either(tmp_path):
    config = Config(out=tmp_path / "seeds")
    open_run(config)
    open_run(config)  # nothing was begun
    open_run(Config(out=tmp_path / "seeds" / "A1_seed0")).write_checkpoint({"step": 1})
    with pytest.raises(ValueError, match="unfinished run; --resume continues it"):
        open_run(config)
    open_run(dataclasses.replace(config, resume=True))


def test_device_auto_exists_and_absent_cuda_is_refused():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device: expected cpu or auto, as torch finds no CUDA device, got cuda"):
            resolve_device("cuda")


# ---- stopping --------------------------------------------------------------------------------------------


def test_first_signal_asks_and_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_what_is_interruptible_and_nothing_else(number):
    with GracefulStop() as stop:
        with pytest.raises(Stopped), interruptible():
            signal.raise_signal(number)
            pytest.fail("went on")
        assert stop.requested
        with pytest.raises(Stopped), interruptible():  # asked for before it began
            pytest.fail("began")
    with GracefulStop() as stop:
        with interruptible():
            pass
        signal.raise_signal(number)
    assert stop.requested
    with GracefulStop(interrupts=False), interruptible():
        signal.raise_signal(number)
    with interruptible():  # no stop to wait for
        pass
