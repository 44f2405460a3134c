"""Each CIFAR-10 script from its command line to its figure, on synthetic data."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import dynloss_ext
import myrtle5_bifurcations
import myrtle5_cifar10
import prepare_cifar10
import wrn28_10_cifar10
from common import training
from common.config import TrainingConfig
from common.data import FOLDER, TEST_FILE, TRAIN_FILES, load_data, synthetic_cifar10
from common.stopping import GracefulStop
from common.training_state import build_model, learning_rate

SCRIPTS = [myrtle5_bifurcations, myrtle5_cifar10, wrn28_10_cifar10]
RUN_FILES = {"config.json", "metrics.npz", "summary.json", "figure.png", "checkpoint.pt"}


pytestmark = pytest.mark.usefixtures("one_thread")


def smoke(script: ModuleType, out: Path, *options: str) -> dict[str, Any]:
    arguments = ["--preset", "smoke", "--synthetic", "--device", "cpu", "--out", str(out), *options]
    summary: dict[str, Any] = script.main(arguments)
    assert summary["finished"]
    checkpoints_are_below = script is myrtle5_cifar10 and "--ensemble" not in options
    assert {path.name for path in out.iterdir()} >= RUN_FILES - ({"checkpoint.pt"} if checkpoints_are_below else set())
    assert (out / "figure.png").stat().st_size > 5000
    return summary


def test_bifurcations(tmp_path: Path) -> None:
    summary = smoke(myrtle5_bifurcations, tmp_path / "run")
    assert summary["crossed"] == summary["stability_limit"]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stability_limit"] == pytest.approx(2 / 0.05)
    assert "threshold" in summary
    metrics = np.load(tmp_path / "run" / "metrics.npz")
    assert metrics["eigenvalues"].shape == (len(metrics["eig_step"]), 3)
    assert metrics["step"].tolist() == list(range(60))
    assert metrics["weights"].shape == (60, 3)


def test_myrtle5_with_and_without_oscillation(tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = smoke(myrtle5_cifar10, out, "--seeds", "2")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {
        f"A{amplitude}_seed{seed}" for amplitude in (1, 50) for seed in (0, 1)
    }
    for run in ("A1_seed0", "A50_seed1"):
        assert {path.name for path in (out / run).iterdir()} >= RUN_FILES - {"figure.png"}
    metrics = np.load(out / "metrics.npz")
    assert metrics["validation_accuracy_A50"].shape == (2, 4)
    assert summary["validation_accuracy"]["A50"]["mean"] == metrics["validation_accuracy_A50"][:, -1].mean()
    weights = np.load(out / "A50_seed0" / "metrics.npz")["weights"]  # 3 steps an epoch, plain from epoch 3
    assert np.ptp(weights[6]) > 1
    assert np.all(weights[8:] == 1)


def test_myrtle5_resume_redoes_only_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = smoke(myrtle5_cifar10, out)
    (out / "summary.json").unlink()
    (out / "A50_seed0" / "summary.json").unlink()
    untouched = (out / "A1_seed0" / "checkpoint.pt").stat().st_mtime_ns
    again = smoke(myrtle5_cifar10, out, "--resume")
    assert again["validation_accuracy"] == first["validation_accuracy"]
    assert (out / "A1_seed0" / "checkpoint.pt").stat().st_mtime_ns == untouched


def test_wide_resnet(tmp_path: Path) -> None:
    summary = smoke(wrn28_10_cifar10, tmp_path / "run")
    assert summary["num_parameters"] == 77_850
    assert summary["steps"] == 8
    assert 0 <= summary["validation_accuracy"] <= 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_without_data_the_script_says_what_it_needs(script: ModuleType, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path / "run")])
    expected = "--data: expected an existing folder with CIFAR-10 (or use --synthetic), got none"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training and 60 test images a class, as files of the binary version."""
    folder = tmp_path_factory.mktemp("data") / FOLDER
    folder.mkdir()
    data = synthetic_cifar10(300, 60)
    train, test = (torch.cat([s.labels[:, None].byte(), s.images.flatten(1)], 1) for s in (data.train, data.test))
    for name, records in zip((*TRAIN_FILES, TEST_FILE), (*train.chunk(5), test), strict=True):
        records.numpy().tofile(folder / name)
    return folder.parent


@pytest.mark.filterwarnings("ignore:class .* has .* images")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_300_images_a_class_will_do(script: ModuleType, small_folder: Path) -> None:
    for preset in script.PRESETS.values():
        data = load_data(dataclasses.replace(preset, data=small_folder))
        assert len(data.train) == min(preset.train_images or 3000, 300 * preset.classes)
        assert len(data.test) > 0


def test_a_run_on_files(tmp_path: Path, small_folder: Path, capsys: Any) -> None:
    """A network of the paper's size, its parameters told at the start."""
    options = ["--preset", "smoke", "--data", str(small_folder), "--device", "cpu", "--out", str(tmp_path / "run")]
    options += ["--width", "64", "--train-images", "20", "--validation-images", "10", "--no-baseline"]
    summary = myrtle5_cifar10.main(options)
    assert summary["finished"]
    assert summary["num_parameters"] == 113_226
    assert "myrtle5: 113,226 parameters; 20 training and 10 validation images" in capsys.readouterr().err


def test_download_fetches_only_what_is_not_there(
    tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Path] = []

    def fetch(folder: Path) -> Path:
        fetched.append(folder)
        return shutil.copytree(small_folder, folder, dirs_exist_ok=True)

    monkeypatch.setattr(prepare_cifar10, "download_cifar10", fetch)
    for folder in (small_folder, tmp_path / "new", tmp_path / "new"):
        assert len(load_data(TrainingConfig(data=folder, download=True)).train) == 3000
    assert fetched == [tmp_path / "new"]
    with pytest.raises(FileNotFoundError, match="--data: expected CIFAR-10 in"):
        load_data(TrainingConfig(data=tmp_path))


def test_the_defaults_are_the_papers() -> None:
    myrtle = myrtle5_cifar10.PAPER
    assert sum(p.numel() for p in build_model(myrtle).parameters()) == 113_226
    lr = learning_rate(myrtle, 98)
    assert [lr(98 * epoch) for epoch in (0, 300, 700)] == pytest.approx([0.0, 0.02, 0.002])
    assert (myrtle.batch_size, myrtle.stop_epoch, myrtle.amplitude, myrtle.period) == (512, 600, 50, 100)
    assert (myrtle.momentum, myrtle.nesterov, myrtle.augment, myrtle.batchnorm) == (0.9, True, False, False)
    wide = wrn28_10_cifar10.PAPER
    assert (wide.depth, wide.widen, wide.epochs, wide.batch_size, wide.shards) == (28, 10, 200, 1024, 8)
    assert learning_rate(wide, 49)(0) == 0.1
    assert wide.augment
    three = myrtle5_bifurcations.PAPER
    assert (three.classes, three.train_images, three.batch_size) == (3, 3000, None)
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(dataclasses.replace(wide, seed=0)).parameters())
    assert count == 36_479_194


def test_a_diverged_seed_is_counted_and_left_out(tmp_path: Path) -> None:
    out = tmp_path / "run"
    smoke(myrtle5_cifar10, out)
    summary = json.loads((out / "A50_seed0" / "summary.json").read_text())
    (out / "A50_seed0" / "summary.json").write_text(json.dumps(summary | {"diverged": True}))
    again = smoke(myrtle5_cifar10, out)
    assert again["validation_accuracy"]["A50"] == {"seeds": [], "diverged": 1}
    assert again["validation_accuracy"]["A1"]["diverged"] == 0


def test_rises_in_words() -> None:
    assert myrtle5_bifurcations.rises(40.0, [170, 260]) == "rises through 40 after step 170, 260"
    assert myrtle5_bifurcations.rises(40.0, []) == "never rises through 40"


def test_onset_of_oscillations_and_crossings_are_found() -> None:
    """F falls by 4e-3 a step; from step 200 to 400 it also alternates."""
    step = np.arange(600)
    alternation = np.where((step >= 200) & (step < 400), 5e-3 * (-1.0) ** step, 0.0)
    eig_step = step[::10]
    unstable = (eig_step >= 180) & (eig_step < 390)
    eigenvalues = np.where(unstable, np.where(eig_step % 20, 30.0, 50.0), 30.0)[:, None]  # two branches
    metrics = {
        "step": step,
        "weighted_loss": 3 - 4e-3 * step + alternation,
        "eig_step": eig_step,
        "eigenvalues": eigenvalues,
    }
    analysis = myrtle5_bifurcations.oscillations(metrics)
    (window,) = analysis.instabilities
    assert abs(window.start - 200) <= 2
    assert abs(window.stop - 400) <= 2
    assert {part.period for part in analysis.periods[0]} == {2}
    assert myrtle5_bifurcations.upward_crossings(eig_step, eigenvalues, 40.0, hold=50) == [170]


@pytest.mark.parametrize(
    "options",
    [
        ("--augment", "--batchnorm", "--shards", "2", "--batch-size", "20"),
        ("--channels-last", "--no-bias", "--batch-size", "none", "--weight-decay", "1e-3"),
    ],
    ids=["minibatch-batchnorm", "full-batch"],
)
def test_an_ensemble_trains_each_member_as_alone(tmp_path: Path, options: tuple[str, ...]) -> None:
    options = ("--seeds", "2", "--precision", "float64", "--train-images", "60", *options)
    alone = smoke(myrtle5_cifar10, tmp_path / "alone", *options)
    together = smoke(myrtle5_cifar10, tmp_path / "together", "--ensemble", *options)
    assert (together["num_parameters"], together["networks_at_once"]) == (alone["num_parameters"], 4)
    runs = sorted(path.name for path in (tmp_path / "alone").iterdir() if path.is_dir())
    losses = []
    for run in runs:
        a, b = (np.load(tmp_path / name / run / "metrics.npz") for name in ("alone", "together"))
        assert sorted(a) == sorted(b)
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-8, atol=1e-12, err_msg=f"{run} {name}")
        config, summary = (
            json.loads((tmp_path / "together" / run / f"{n}.json").read_text()) for n in ("config", "summary")
        )
        assert f"A{config['amplitude']:g}_seed{config['seed']}" == run
        assert summary["weighted_loss"] == b["weighted_loss"][-1]
        losses.append(summary["weighted_loss"])
    assert len(set(losses)) == len(runs) == 4


def test_an_interrupted_ensemble_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--seeds", "2", "--ensemble", "--batchnorm", "--augment")
    straight = smoke(myrtle5_cifar10, tmp_path / "straight", *options)
    out = tmp_path / "interrupted"

    class StopAfterSevenSteps(GracefulStop):
        looks = 0

        @property
        def requested(self) -> bool:
            self.looks += 1
            return self.looks >= 7

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(training, "GracefulStop", StopAfterSevenSteps)
        arguments = ["--preset", "smoke", "--synthetic", "--device", "cpu", "--out", str(out), *options]
        assert myrtle5_cifar10.main(arguments) == {"finished": False}
    again = smoke(myrtle5_cifar10, out, "--resume", *options)
    assert again["validation_accuracy"] == straight["validation_accuracy"]
    for run in ("A1_seed0", "A50_seed1"):
        a, b = (np.load(tmp_path / name / run / "metrics.npz") for name in ("straight", "interrupted"))
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("options", [("--model", "wrn"), ("--eig-every", "5"), ("--precision", "float16")])
def test_what_an_ensemble_cannot_do_is_refused(tmp_path: Path, options: tuple[str, str], capsys: Any) -> None:
    arguments = ["--preset", "smoke", "--synthetic", "--ensemble", "--out", str(tmp_path / "run"), *options]
    with pytest.raises(SystemExit):
        myrtle5_cifar10.main(arguments)
    assert (
        "--ensemble: expected Myrtle5, no eigenvalues and another precision than float16, "
        f"got {' '.join(options) if options[0] == '--model' else '--model myrtle5'}"
    ) in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    "options", [pytest.param((), id="one by one"), pytest.param(("--ensemble",), id="ensemble", marks=pytest.mark.slow)]
)
def test_torchrun_on_two_processes_gives_the_results_of_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    options = ("--train-images", "50", "--batch-size", "25", "--precision", "float64", *options)
    alone = smoke(myrtle5_cifar10, tmp_path / "alone", *options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    script = ["--master-port", port, myrtle5_cifar10.__file__, "--preset", "smoke", "--synthetic", "--device", "cpu"]
    packages = os.pathsep.join([str(Path(dynloss_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, *launcher, *script, "--out", str(tmp_path / "two"), *options],
        check=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": packages},
    )
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["validation_accuracy"] == alone["validation_accuracy"]
    for run in ("A1_seed0", "A50_seed0"):
        a, b = (np.load(tmp_path / name / run / "metrics.npz") for name in ("alone", "two"))
        np.testing.assert_allclose(b["weighted_loss"], a["weighted_loss"], rtol=1e-9)
        np.testing.assert_allclose(b["validation_loss"], a["validation_loss"], rtol=1e-9)
    assert json.loads((tmp_path / "two" / "A1_seed0" / "summary.json").read_text())["processes"] == 2
