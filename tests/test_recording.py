"""The run folder and the command line that every example shares."""

import dataclasses
import json
import os
import signal
import stat

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common.cli import BaseConfig, open_run, option, parse_config, resolve_device
from common.recording import GracefulStop, RunFolder, Table, atomic_write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """A small experiment."""

    steps: int = option(10, "steps", may_change=True)
    lr: float = option(0.5, "learning rate")
    stop_step: int | None = option(7, "step, or none")
    closed: bool = option(True, "closed turns")
    ntk: bool = option(False, "kernel")
    mode: str = option("a", "mode", choices=("a", "b"))

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1")


def parse(*argv):
    return parse_config(Config, "A test.", [str(word) for word in argv])


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
    with pytest.raises(ValueError, match="is a file"):
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
    with pytest.raises(ValueError, match="columns: got"):
        table.append(a=1)
    with pytest.raises(ValueError, match="lengths differ"):
        table.extend(a=[1], b=[1, 2])


# ---- command line ----------------------------------------------------------------------------------------


def test_options_are_kebab_case_fields_with_their_types(tmp_path):
    config = parse("--out", tmp_path, "--stop-step", "none", "--no-closed", "--ntk", "--lr", "1e-3", "--mode", "b")
    assert config == Config(out=tmp_path, stop_step=None, closed=False, ntk=True, lr=1e-3, mode="b")
    assert parse().stop_step == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--steps", "0"), "steps: got 0"),
        (("--steps", "many"), "--steps"),
        (("--stop-step", "soon"), "--stop-step"),
        (("--mode", "c"), "--mode"),
        (("--step", "3"), "unrecognized"),  # no abbreviations: they would break when options are added
    ],
)
def test_bad_values_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_resume_takes_the_saved_options(tmp_path, capsys):
    folder = open_run(parse("--out", tmp_path / "run", "--lr", 0.1, "--stop-step", "none"))
    folder.write_checkpoint({})
    resumed = parse("--out", tmp_path / "run", "--resume", "--steps", 20)
    assert (resumed.lr, resumed.stop_step, resumed.steps, resumed.resume) == (0.1, None, 20, True)
    with pytest.raises(SystemExit):
        parse("--out", tmp_path / "run", "--resume", "--lr", 0.2)
    assert "--lr is 0.1" in capsys.readouterr().err


def test_only_a_finished_run_of_the_same_options_is_replaced(tmp_path):
    config = Config(out=tmp_path / "run")
    folder = open_run(config)
    folder.write_checkpoint({})
    with pytest.raises(ValueError, match="unfinished run; --resume"):
        open_run(config)
    folder.write_summary({"finished": True})
    open_run(config)
    with pytest.raises(ValueError, match=r"other options \(lr\)"):
        open_run(dataclasses.replace(config, lr=0.7))


def test_device_auto_exists_and_absent_cuda_is_refused():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: got 'cuda'"):
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
