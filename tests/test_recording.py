"""The run folder and the command line that every example shares."""

import dataclasses
import json
import os
import signal
import stat
from typing import Literal

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common.config import parse_options
from common.run import BaseConfig, GracefulStop, RunFolder, Table, atomic_write, open_run, resolve_device


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
