"""The command lines of the example scripts: each option by its name, its default and its value in config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import myrtle5_bifurcations
import myrtle5_cifar10
import spiral_mlp
import wrn28_10_cifar10
from common.config import parse_options

EVERY_RUN = ("out", "device", "seed", "resume")
TRAINING = (
    *("data", "download", "synthetic", "classes", "train-images", "validation-images", "augment"),
    *("model", "width", "depth", "widen", "bias", "batchnorm"),
    *("amplitude", "period", "waveform", "stop-epoch"),
    *("epochs", "batch-size", "shards", "lr", "schedule", "peak-epoch", "final-lr"),
    *("momentum", "nesterov", "weight-decay", "sync-batchnorm"),
    *("validate-every", "eig-every", "num-eigenvalues", "eig-images", "eig-batch", "eig-tol"),
    *("precision", "channels-last", "compile", "deterministic", "graphs", "checkpoint-every", "tensorboard"),
)
SPIRAL = (
    *("steps", "amplitude", "period", "closed", "stop-step", "lr", "init", "width", "points", "classes", "noise"),
    *("data-seed", "dtype", "eig-every", "num-eigenvalues", "tol", "ntk", "density-every", "rule", "engine", "threads"),
    *("graphs", "checkpoint-every"),
)
OPTIONS = {
    spiral_mlp: (*EVERY_RUN, *SPIRAL),
    myrtle5_bifurcations: (*EVERY_RUN, *TRAINING),
    myrtle5_cifar10: (*EVERY_RUN, *TRAINING, "seeds", "baseline", "ensemble"),
    wrn28_10_cifar10: (*EVERY_RUN, *TRAINING),
}
FIGURES = Path(myrtle5_cifar10.__file__).parent / "figures"


def parse(script: ModuleType, *argv: str) -> Any:
    if script is spiral_mlp:
        return parse_options(spiral_mlp.SpiralConfig(), script.__doc__, argv)
    return parse_options(script.PAPER, script.__doc__, argv, script.PRESETS)


@pytest.mark.parametrize("script", OPTIONS, ids=lambda script: script.__name__)
def test_help_names_these_options_and_no_others(script: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = set(re.findall(r"^[│ ]+--([a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE))
    presets = set() if script is spiral_mlp else {"preset", "fast"}  # other defaults, recorded as what they stand for
    assert shown == {*OPTIONS[script], *presets}
    assert tuple(name.replace("_", "-") for name in parse_or_default(script).as_dict()) == OPTIONS[script]


def parse_or_default(script: ModuleType) -> Any:
    return parse(script) if script is spiral_mlp else parse(script, "--synthetic")


@pytest.mark.parametrize("script", OPTIONS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("unknown", ["--amplitudes", "--amp", "--eig-everything", "--preset-name"])
def test_unknown_options_are_refused_by_name(script: ModuleType, unknown: str, capsys: Any) -> None:
    """Abbreviations, too: they would break when options are added."""
    with pytest.raises(SystemExit) as exit_info:
        script.main([unknown, "3"])
    assert exit_info.value.code == 2
    assert f"Unrecognized options: {unknown}" in capsys.readouterr().err


def test_the_spirals_command_line() -> None:
    assert parse(spiral_mlp) == spiral_mlp.SpiralConfig()
    argv = "--seed 3 --stop-step none --no-closed --ntk --amplitude 30 --lr 1e-2 --init lecun-normal --device cpu"
    config = parse(spiral_mlp, *argv.split(), "--eig-every=10", "--density-every=20", "--dtype", "float32")
    assert (config.seed, config.stop_step, config.closed, config.ntk) == (3, None, False, True)
    assert (config.amplitude, config.lr, config.init, config.device) == (30.0, 1e-2, "lecun-normal", "cpu")
    assert (config.eig_every, config.density_every, config.dtype) == (10, 20, "float32")


@pytest.mark.parametrize("script", list(OPTIONS)[1:], ids=lambda script: script.__name__)
def test_a_preset_is_read_before_the_options_beside_it(script: ModuleType) -> None:
    smoke = parse(script, "--batch-size", "none", "--preset", "smoke", "--synthetic", "--stop-epoch", "none")
    paper = parse(script, "--synthetic")
    assert parse(script, "--preset", "paper", "--synthetic") == paper
    assert (smoke.preset, paper.preset) == ("smoke", "paper")
    assert (smoke.batch_size, smoke.stop_epoch) == (None, None)
    assert smoke.epochs == script.PRESETS["smoke"].epochs < script.PRESETS["cpu"].epochs < paper.epochs
    assert smoke.lr == paper.lr


@pytest.mark.parametrize("name", ["myrtle5_bifurcations", "myrtle5_cifar10", "wrn28_10_cifar10"])
def test_the_committed_runs_have_the_options_of_preset_cpu(name: str) -> None:
    """Their config.json was written by `--preset cpu --data DATA --out RUN`."""
    script = {script.__name__: script for script in OPTIONS}[name]
    saved = json.loads((FIGURES / f"{name}_cpu" / "config.json").read_text())
    config = parse(script, "--preset", "cpu", "--data", saved["data"], "--download", "--out", saved["out"])
    assert config.as_dict() == saved | {"download": True}
    assert list(config.as_dict()) == list(saved)


def test_every_script_has_a_folder_of_its_own() -> None:
    scripts = list(OPTIONS)
    assert [parse_or_default(script).out for script in scripts] == [Path("runs") / s.__name__ for s in scripts]
    for script in scripts[1:]:
        assert all(preset.out == script.PAPER.out for preset in script.PRESETS.values())


def test_members_have_their_own_folders_and_seeds(tmp_path: Path) -> None:
    config = parse(
        myrtle5_cifar10, "--preset", "smoke", "--synthetic", "--seeds", "2", "--seed", "3", "--out", "runs/x"
    )
    runs = {run.out.name: (run.amplitude, run.seed) for run in config.runs()}
    assert runs == {"A1_seed3": (1, 3), "A1_seed4": (1, 4), "A50_seed3": (50, 3), "A50_seed4": (50, 4)}
    alone = parse(myrtle5_cifar10, "--preset", "smoke", "--synthetic", "--no-baseline", "--amplitude", "2.5")
    assert [run.out.name for run in alone.runs()] == ["A2.5_seed0"]
