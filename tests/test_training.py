"""The training loop against a loop written out by hand, and its resume, by killing it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dynloss_ext
from common import training_state
from common.config import TrainingConfig, parse_options
from common.data import Batches, load_data
from common.distributed import World
from common.run import RunFolder, changed_options
from common.training import train
from common.training_state import Training, build_model, learning_rate
from dynloss_ext import EigenTracker, graphs

EXAMPLES = Path(__file__).parent.parent / "python_examples"
PACKAGES = Path(dynloss_ext.__file__).parent.parent  # first in the path: the working folder could hide the package
CPU = World(torch.device("cpu"))


pytestmark = pytest.mark.usefixtures("one_thread")


def small(out: Path, **changes: Any) -> TrainingConfig:
    options: dict[str, Any] = {
        "out": out,
        "device": "cpu",
        "synthetic": True,
        "classes": 3,
        "train_images": 60,
        "validation_images": 30,
        "width": 4,
        "precision": "float64",
        "amplitude": 20.0,
        "period": 8.0,
        "eig_images": 6,
        "lr": 0.05,
        "epochs": 6,
    }
    return TrainingConfig(**{**options, **changes})


def run(config: TrainingConfig) -> dict[str, np.ndarray]:
    (record,) = train(config)
    assert record.summary["finished"]
    return RunFolder(config.out).read_metrics()


def triangle(step: int, amplitude: float, period: float, classes: int = 3) -> torch.Tensor:
    """Γ of the paper, written out for an even period."""
    gamma = torch.ones(classes, dtype=torch.float64)
    turn, t = divmod(step, int(period))
    up = 2 * (amplitude - 1) * t / period
    gamma[turn % classes] = 1 + up if t < period / 2 else 2 * amplitude - 1 - up
    return classes * gamma / gamma.sum()


# --- schedules ------------------------------------------------------------------------------------


def test_piecewise_schedule_at_the_named_epochs() -> None:
    config = TrainingConfig(schedule="piecewise", epochs=700, peak_epoch=300, lr=0.02, final_lr=0.002)
    lr = learning_rate(config, 98)
    named = {0: 0.0, 150: 0.01, 300: 0.02, 500: 0.011, 600: 0.0065, 700: 0.002, 800: 0.002}
    assert {epoch: lr(98 * epoch) for epoch in named} == pytest.approx(named)
    assert lr(49) == pytest.approx(0.5 * 0.02 / 300)


def test_cosine_and_constant_schedules() -> None:
    lr = learning_rate(TrainingConfig(schedule="cosine", epochs=200, lr=0.1), 49)
    assert [lr(49 * epoch) for epoch in (0, 50, 100, 200, 201)] == pytest.approx(
        [0.1, 0.05 + 0.05 * 0.5**0.5, 0.05, 0.0, 0.0], abs=1e-15
    )
    assert learning_rate(TrainingConfig(lr=0.3), 49)(12345) == 0.3


# --- what a run computes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 20},
        {"epochs": 20, "stop_epoch": 9},
        {"batch_size": 16, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "schedule": "piecewise",
         "peak_epoch": 3, "final_lr": 0.01},
        {"batch_size": 16, "schedule": "cosine", "augment": True, "batchnorm": True, "momentum": 0.5},
        {"model": "mlp", "amplitude": 1.0, "shards": 3},
    ],
    ids=["full-batch", "stop", "nesterov", "batchnorm", "shards"],
)  # fmt: skip
def test_a_run_is_gradient_descent_on_the_dynamical_loss(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = small(tmp_path / "run", **changes)
    metrics = run(config)
    data = load_data(config)
    batches = Batches(data.train, config.batch_size, seed=config.seed, augment=config.augment, dtype=torch.float64)
    model = build_model(config)
    options = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **options)
    lr = learning_rate(config, batches.per_epoch)
    steps = config.epochs * batches.per_epoch
    rows, gammas = [], []
    for step in range(steps + 1):
        batch = batches.get(step)
        stopped = config.stop_epoch is not None and step >= config.stop_epoch * batches.per_epoch
        gamma = triangle(step, 1.0 if stopped else config.amplitude, config.period)
        logits = model(batch.images)
        loss = F.cross_entropy(logits, batch.labels, reduction="none")
        weighted = (gamma[batch.labels] * loss).mean()
        accuracy = (logits.argmax(1) == batch.labels).double().mean()
        rows.append([weighted.item(), loss.mean().item(), accuracy.item()])
        gammas.append(gamma)
        optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.zero_grad()
        weighted.backward()
        if step < steps:
            optimizer.step()
    recorded = np.stack([metrics["weighted_loss"], metrics["loss"], metrics["accuracy"]], axis=1)
    np.testing.assert_array_equal(metrics["step"], np.arange(steps))
    np.testing.assert_allclose(recorded, rows[1:], rtol=1e-9)
    np.testing.assert_allclose(metrics["weights"], torch.stack(gammas[1:]), rtol=1e-14)
    assert recorded[-1, 0] != recorded[-2, 0]


def test_validation_is_plain_cross_entropy_on_the_test_images(tmp_path: Path) -> None:
    config = small(tmp_path / "run", validate_every=3, batchnorm=True, epochs=7)
    metrics = run(config)
    assert metrics["validation_step"].tolist() == [2, 5, 6]
    model = build_model(config)
    model.load_state_dict(RunFolder(config.out).read_checkpoint()["model"])
    batch = Batches(load_data(config).test, dtype=torch.float64).get(0)
    logits = model.eval()(batch.images)
    assert metrics["validation_loss"][-1] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-12)
    accuracy = (logits.argmax(1) == batch.labels).double().mean().item()
    assert metrics["validation_accuracy"][-1] == pytest.approx(accuracy)


@pytest.mark.parametrize("changes", [{}, {"eig_images": 9, "eig_batch": 4}, {"batchnorm": True}])
def test_recorded_eigenvalues_are_those_of_the_dense_hessian(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = small(tmp_path / "run", width=2, eig_every=2, eig_tol=1e-6, epochs=5, **changes)
    training = Training(config, load_data(config), CPU)
    images = training.batches.split.subset(3, config.eig_images)
    batch = training.batches.normalise(images.images, images.labels)
    for row in range(3):
        training.update()
        training.measure_eigenvalues()
        twin = build_model(config)
        twin.load_state_dict(training.model.state_dict())
        names, values = zip(*twin.named_parameters(), strict=True)
        sizes, shapes = [p.numel() for p in values], [p.shape for p in values]
        gamma = triangle(row + 1, config.amplitude, config.period)[batch.labels]

        def loss(flat: torch.Tensor, names=names, sizes=sizes, shapes=shapes, twin=twin, gamma=gamma) -> torch.Tensor:
            parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
            logits = torch.func.functional_call(twin, dict(zip(names, parts, strict=True)), (batch.images,))
            return (gamma * F.cross_entropy(logits, batch.labels, reduction="none")).mean()

        flat = torch.cat([p.detach().reshape(-1) for p in values])
        dense = torch.autograd.functional.hessian(loss, flat, vectorize=True)
        expected = torch.linalg.eigvalsh(dense).flip(0)[:3]
        recorded = training.curvature.rows.arrays()["eigenvalues"][-1]
        np.testing.assert_allclose(recorded, expected, rtol=1e-5)


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    plain = small(tmp_path / "a", batchnorm=True, batch_size=20, validate_every=0)
    measured = small(tmp_path / "b", batchnorm=True, batch_size=20, eig_every=1, validate_every=1)
    a, b = run(plain), run(measured)
    np.testing.assert_array_equal(a["weighted_loss"], b["weighted_loss"])
    states = [RunFolder(config.out).read_checkpoint()["model"] for config in (plain, measured)]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    assert b["eig_step"].tolist() == b["step"].tolist()
    assert a["eig_step"].size == 0


def test_shards_have_their_own_batchnorm_statistics(tmp_path: Path) -> None:
    whole = run(small(tmp_path / "a", batchnorm=True))
    sharded = run(small(tmp_path / "b", batchnorm=True, shards=4))
    assert abs(whole["weighted_loss"] - sharded["weighted_loss"]).max() > 1e-4
    statistics = []
    for name in "ab":  # one step's worth of running average each, whatever the number of shards
        state = RunFolder(tmp_path / name).read_checkpoint()["model"]
        statistics.append(state["norm1.running_mean"])
    torch.testing.assert_close(*statistics, rtol=0.1, atol=5e-3)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bfloat16"}, {"precision": "float16"}, {"precision": "float32", "channels_last": True}],
)
def test_fast_modes_follow_float64(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = run(small(tmp_path / "a", epochs=12))
    fast = run(small(tmp_path / "b", epochs=12, **changes))
    tolerance = 1e-4 if changes["precision"] == "float32" else 0.03
    np.testing.assert_allclose(fast["weighted_loss"], reference["weighted_loss"], rtol=tolerance)


@pytest.mark.slow
def test_compiled_network_follows_the_eager_one(tmp_path: Path) -> None:
    options = {"precision": "float32", "batch_size": 25, "epochs": 2, "eig_every": 2}
    eager, compiled = (
        run(small(tmp_path / "a", **options)),
        run(small(tmp_path / "b", compile=True, **options)),
    )
    np.testing.assert_allclose(compiled["weighted_loss"], eager["weighted_loss"], rtol=1e-4)
    np.testing.assert_allclose(compiled["eigenvalues"], eager["eigenvalues"], rtol=1e-2)


def test_summary_and_files(tmp_path: Path) -> None:
    config = small(tmp_path / "run", eig_every=3, tensorboard=True)
    (record,) = train(config)
    summary = record.summary
    assert summary == json.loads((config.out / "summary.json").read_text())
    assert summary["finished"]
    assert not summary["diverged"]
    assert summary["num_parameters"] == sum(p.numel() for p in build_model(config).parameters())
    assert summary["steps"] == 6
    assert summary["num_training_images"] == 60
    assert list((config.out / "tensorboard").iterdir())
    saved = json.loads((config.out / "config.json").read_text())
    assert saved["amplitude"] == 20.0
    assert saved["width"] == 4


def test_a_diverging_run_ends_early_and_says_so(tmp_path: Path) -> None:
    ((summary, _),) = train(small(tmp_path / "run", lr=1e300, epochs=50, checkpoint_every=10))
    assert summary["diverged"]
    assert summary["steps"] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amplitude": 0.5}, "--amplitude: expected at least 1, got 0.5"),
        ({"classes": 1}, "--classes: expected 2 to 10, got 1"),
        ({"momentum": 1.0}, "--momentum: expected less than 1 without --nesterov: .*, got 1.0"),
        ({"nesterov": True}, "--momentum: expected more than 0 with --nesterov, got 0.0"),
        ({"schedule": "piecewise", "peak_epoch": 9}, "--peak-epoch: expected less than --epochs 6, got 9"),
        ({"batch_size": 0}, "--batch-size: expected at least 1, or none, got 0"),
        ({"batchnorm": True, "eig_batch": 8}, "--eig-batch: expected none with BatchNorm: .*, got 8"),
        ({"sync_batchnorm": True, "eig_every": 1}, "--eig-every: expected 0 with --sync-batchnorm: .*, got 1"),
    ],
)
def test_bad_options_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


@pytest.mark.parametrize(("data", "got"), [(Path("/nowhere"), "/nowhere"), (None, "none")])
def test_data_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, data: Path | None, got: str
) -> None:
    config = small(tmp_path / "run", synthetic=False, data=data)
    with pytest.raises(ValueError, match=f"--data: expected an existing folder with CIFAR-10 .*, got {got}"):
        train(config)
    assert list(tmp_path.iterdir()) == []


# --- whole steps in graphs ------------------------------------------------------------------------


class PretendedStage(graphs._Stage):
    """A device whose graphs are plain calls, and whose captures compute nothing."""

    def __init__(self, device: torch.device) -> None:
        self.replays = 0

    def call(self, work: Any) -> Any:
        return work()

    def watch(self, work: Any) -> str | None:
        work()
        return None

    def capture(self, work: Any, pool: Any = None) -> Any:
        return types.SimpleNamespace(replay=work), None


def test_replayed_steps_train_as_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes of batches, rows read in blocks, and a resume that knows of none of it."""
    options: dict[str, Any] = {
        "batch_size": 25, "augment": True, "batchnorm": True, "momentum": 0.9, "schedule": "cosine",
        "epochs": 8, "eig_every": 5, "checkpoint_every": 7,
    }  # fmt: skip
    plain = run(small(tmp_path / "plain", **options))
    monkeypatch.setattr(graphs, "_Stage", PretendedStage)
    monkeypatch.setattr(graphs, "_obstacle", lambda device, capture: None)
    monkeypatch.setattr(training_state, "_BLOCK", 5)
    monkeypatch.setattr(Training, "_obstacle_to_graphs", lambda self: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    config = small(tmp_path / "replayed", **options)
    replayed = run(config)
    assert RunFolder(config.out).read_summary()["graph_fallback"] is None
    for name in plain:
        np.testing.assert_array_equal(replayed[name], plain[name], err_msg=name)
    training = Training(config, load_data(config), CPU)
    for _ in range(12):
        training.update()
    assert all(step.captured for step in training._captured.values())
    assert sorted(training._captured) == [10, 25]
    state = copy.deepcopy(training.state_dict())
    expected = [training.update() or training.newest() for _ in range(3)]
    training.load_state_dict(state)
    assert training._captured == {}  # they hold the momenta of before
    assert torch.equal(torch.stack([training.update() or training.newest() for _ in range(3)]), torch.stack(expected))


def test_learning_rates_that_lie_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: SGD's fused kernel with one of a block of rates; across blocks, and a resume in the middle of one."""
    monkeypatch.setattr(training_state, "_BLOCK", 5)
    options: dict[str, Any] = {"precision": "float32", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
    config = small(tmp_path / "run", schedule="cosine", batch_size=25, **options)
    plain, device = (Training(config, load_data(config), CPU) for _ in range(2))
    device.optimizer.param_groups[0]["fused"] = True
    device._rates = torch.zeros(5)
    for step in range(13):
        for training in (plain, device):
            training.update()
        torch.testing.assert_close(device.newest(), plain.newest(), rtol=1e-5, atol=1e-6, equal_nan=True)
        rate = device._rates[step % 5].item()
        assert rate == pytest.approx(device.learning_rate(step))
        assert device.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
        if step == 7:
            device.load_state_dict(copy.deepcopy(plain.state_dict()))
            assert device.optimizer.param_groups[0]["fused"]
    for a, b in zip(device.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_summary_says_why_steps_are_plain_calls(tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    run(config)
    assert RunFolder(config.out).read_summary()["graph_fallback"] == "there are no CUDA graphs on a cpu"
    assert RunFolder(config.out).read_config()["graphs"] is True


@pytest.mark.parametrize(
    ("changes", "size", "reason"),
    [
        ({"graphs": False, "precision": "float32"}, 1, "--no-graphs"),
        ({"precision": "float32"}, 2, "several processes sum their gradients"),
        ({}, 1, "--precision float64 has its learning rate on the host"),
        ({"precision": "bfloat16"}, 1, None),
    ],
)
def test_obstacles_to_graphs(tmp_path: Path, changes: dict[str, Any], size: int, reason: str | None) -> None:
    config = small(tmp_path / "run", **changes)
    rates = None if config.precision == "float64" else torch.zeros(1)
    world = types.SimpleNamespace(device=torch.device("cuda"), size=size)
    stand_in = types.SimpleNamespace(config=config, world=world, _rates=rates)
    assert Training._obstacle_to_graphs(stand_in) == reason


def test_fast_stands_for_other_defaults(tmp_path: Path) -> None:
    def parse(*argv: str) -> TrainingConfig:
        return parse_options(TrainingConfig(), "A test.", ["--synthetic", "--out", str(tmp_path), *argv])

    fast = parse("--fast")
    assert (fast.precision, fast.channels_last, fast.deterministic) == ("bfloat16", True, False)
    assert parse("--fast", "--precision", "tf32").precision == "tf32"
    assert "fast" not in fast.as_dict()
    assert not changed_options(fast, replace(fast, fast=False).as_dict())
    assert parse().precision == "float32"


# --- resume ---------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{packages!r}, {examples!r}]
import torch
torch.set_num_threads(1)
from common.config import TrainingConfig
from common.training import train
options = eval(sys.argv[1])
train(TrainingConfig(**{{**options, "out": Path(options["out"])}}))
left = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in left), f"threads of a process group that is destroyed: {{left}}"
"""


def command(config: TrainingConfig) -> list[str]:
    options = vars(config) | {"out": str(config.out)}
    return [sys.executable, "-c", SCRIPT.format(packages=str(PACKAGES), examples=str(EXAMPLES)), repr(options)]


def test_resume_after_sigkill_at_random_moments_is_bit_for_bit(tmp_path: Path) -> None:
    """Mini-batches, augmentation, BatchNorm, momentum, eigenvalues, validation: no bit may differ."""
    options = {
        "batch_size": 16, "augment": True, "batchnorm": True, "momentum": 0.9, "epochs": 30,
        "eig_every": 9, "eig_images": 6, "num_eigenvalues": 2,
        "validate_every": 5, "checkpoint_every": 7, "precision": "float32",
    }  # fmt: skip
    subprocess.run(command(small(tmp_path / "straight", **options)), check=True, timeout=300, capture_output=True)
    rng = random.Random(0)
    kills = 0
    for attempt in range(100):
        config = small(tmp_path / "killed", **options, resume=attempt > 0)
        process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 100
            before = _checkpoint_time(config.out)
            while process.poll() is None and _checkpoint_time(config.out) == before:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.wait(rng.uniform(0.0, 0.8) if kills < 4 else 100)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0
        break
    assert kills >= 2
    straight, killed = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "killed")
    a, b = straight.read_metrics(), killed.read_metrics()
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    first, second = straight.read_checkpoint(), killed.read_checkpoint()
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    assert not [path for path in killed.path.iterdir() if path.name.endswith(".tmp")]


def _checkpoint_time(out: Path) -> int:
    path = out / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def test_sigterm_leaves_a_checkpoint_of_the_last_whole_step(tmp_path: Path) -> None:
    config = small(tmp_path / "run", epochs=100_000, checkpoint_every=100_000, validate_every=0)
    process = subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not _checkpoint_time(config.out):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "--resume continues" in errors
    state = RunFolder(config.out).read_checkpoint()
    assert state["step"] > 0
    assert len(state["rows"]["metrics"]) == state["step"] - 1


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_stop_in_an_eigenvalue_update_is_resumed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The update of the last step among them, and one that ends where a checkpoint and a validation are due."""
    options: dict[str, Any] = {
        "batchnorm": True, "momentum": 0.9, "eig_every": 3, "validate_every": 2, "checkpoint_every": 4, "epochs": 12,
    }  # fmt: skip
    straight = run(small(tmp_path / "straight", **options))
    update, calls = EigenTracker.update, itertools.count(1)

    def stopped(self: EigenTracker, *arguments: Any, **keywords: Any) -> Any:
        result = update(self, *arguments, **keywords)
        if next(calls) == number:
            signal.raise_signal(signal.SIGTERM)  # when all that the update changes is changed
        return result

    monkeypatch.setattr(EigenTracker, "update", stopped)
    config = small(tmp_path / "stopped", **options)
    ((summary, metrics),) = train(config)
    assert summary == {"finished": False}
    assert len(metrics["eig_step"]) == number - 1
    resumed = run(replace(config, resume=True))
    for name in straight:
        np.testing.assert_array_equal(resumed[name], straight[name], err_msg=name)
    states = [RunFolder(tmp_path / name).read_checkpoint()["model"] for name in ("straight", "stopped")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_sigterm_ends_a_long_eigenvalue_update_between_two_products(tmp_path: Path) -> None:
    config = small(tmp_path / "run", width=24, eig_every=1, eig_images=60, num_eigenvalues=40, eig_tol=1e-14)
    process = subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not _checkpoint_time(config.out):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(2.0)  # of the minute that the first update would take
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopped after step 1 in an eigenvalue update, which will be repeated; --resume continues" in errors
    state = RunFolder(config.out).read_checkpoint()
    assert state["step"] == 1
    assert state["curvature"]["tracker"]["num_updates"] == 0


# --- several processes ----------------------------------------------------------------------------


def torchrun(config: TrainingConfig, processes: int = 2) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    environment |= {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(command(config), env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        for child in children:
            assert child.wait(timeout=200) == 0
    finally:
        for child in children:
            child.kill()


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_two_processes_train_as_one_on_the_global_batch(tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {
        "batch_size": 25, "augment": True, "momentum": 0.9, "epochs": 8, "precision": precision,
        "eig_every": 5, "validate_every": 2,
    }  # fmt: skip
    one = run(small(tmp_path / "one", **options))
    torchrun(small(tmp_path / "two", **options))
    two = RunFolder(tmp_path / "two").read_metrics()
    tolerance = 1e-6 if precision == "float32" else 1e-12
    for name in ("weighted_loss", "loss", "accuracy", "validation_loss", "validation_accuracy", "weights"):
        np.testing.assert_allclose(two[name], one[name], rtol=tolerance, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(two["eigenvalues"], one["eigenvalues"], rtol=1e-2, atol=1e-6)
    assert RunFolder(tmp_path / "two").read_summary()["processes"] == 2


def test_two_processes_have_the_shards_of_one(tmp_path: Path) -> None:
    """Per-shard BatchNorm is the same whether one process or two do the shards; resume works there, too."""
    options: dict[str, Any] = {
        "batch_size": 24,
        "batchnorm": True,
        "shards": 4,
        "checkpoint_every": 5,
        "epochs": 4,
    }
    one = run(small(tmp_path / "one", **options))
    two = small(tmp_path / "two", **options)
    torchrun(two)
    torchrun(small(tmp_path / "two", **options, resume=True))
    metrics = RunFolder(two.out).read_metrics()
    np.testing.assert_allclose(metrics["weighted_loss"], one["weighted_loss"], rtol=1e-9)
    np.testing.assert_allclose(metrics["validation_loss"], one["validation_loss"], rtol=0.05)


def test_shards_must_divide_among_the_processes(tmp_path: Path) -> None:
    config = small(tmp_path / "run", shards=3)
    with pytest.raises(ValueError, match="--shards: expected a multiple of the number of processes, 2, got 3"):
        Training(config, load_data(config), World(torch.device("cpu"), rank=0, size=2))


def test_synchronised_batchnorm_is_for_cuda_and_one_shard_each(tmp_path: Path) -> None:
    config = small(tmp_path / "run", batchnorm=True, sync_batchnorm=True)
    with pytest.raises(ValueError, match="--sync-batchnorm: expected CUDA and one shard per process"):
        Training(config, load_data(config), CPU)


def test_metrics_before_the_first_row_are_empty(tmp_path: Path) -> None:
    config = small(tmp_path / "run", eig_every=2)
    (arrays,) = Training(config, load_data(config), CPU).metrics()
    assert {name: len(values) for name, values in arrays.items() if len(values)} == {}
    assert arrays["weights"].shape == (0, 3)
    assert arrays["eigenvalues"].shape == (0, 3)
