"""Captured steps and Hessians on a CUDA device: replays give the bits of plain calls."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cuda_cases import NEEDS_KERNELS
from curvature_problems import Spiral
from torch import nn

from common.config import TrainingConfig
from common.data import load_data
from common.distributed import World
from common.training_state import Training
from dynloss_ext import (
    CapturedHessian,
    CapturedStep,
    DeviceRecords,
    DynamicCrossEntropyLoss,
    EigenTracker,
    HessianOperator,
    Oscillation,
    eigsh,
)

DEVICE = torch.device("cuda")

pytestmark = NEEDS_KERNELS


@pytest.fixture(autouse=True)
def numerics():
    """Puts back the switches of the process, which a training sets."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


class Loop:
    """A user's loop: a network, an optimizer, the loss with its step on the device, and records of it."""

    def __init__(self, optimizer="sgd", *, dropout=0.0, momentum=0.9):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(300, 2, generator=generator).to(DEVICE)
        self.target = torch.randint(3, (300,), generator=generator).to(DEVICE)
        torch.manual_seed(1)
        layers = [nn.Linear(2, 100), nn.ReLU(), nn.BatchNorm1d(100), nn.Dropout(dropout), nn.Linear(100, 3)]
        self.model = nn.Sequential(*layers).to(DEVICE)
        self.rate = torch.tensor(0.1, device=DEVICE)
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate, momentum=momentum, fused=True)
        else:
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate, capturable=True)
        self.criterion = DynamicCrossEntropyLoss(Oscillation(3, 70, 10)).to(DEVICE)
        self.records = DeviceRecords(100, device=DEVICE)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.criterion(self.model(self.inputs), self.target)
        loss.backward()
        self.optimizer.step()
        self.criterion.step()
        self.records.append(loss)
        self.rate.mul_(0.99)

    def state(self):
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.state_dict().values(), *moments, self.criterion.current_step, self.rate]


def equal(actual, expected):
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def both(steps, **options):
    """Two loops after as many steps, plain and replayed, and their losses."""
    plain = Loop(**options)
    torch.manual_seed(2)
    for _ in range(steps):
        plain.step()
    replayed = Loop(**options)
    torch.manual_seed(2)
    captured = CapturedStep(replayed.step, DEVICE)
    captured.run(steps)
    assert captured.fallback is None, captured.fallback
    assert captured.captured
    return plain, replayed, captured


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_replayed_steps_have_the_bits_of_plain_ones(optimizer):
    plain, replayed, captured = both(50, optimizer=optimizer)
    assert equal(replayed.state(), plain.state())
    losses = plain.records.read()
    assert torch.equal(replayed.records.read(), losses)
    assert len(losses) == 50
    assert losses.unique().numel() > 40  # Γ has gone on in the graph
    assert replayed.criterion.current_step.item() == 50
    for n in (1, 0, 7):  # and in parts
        captured.run(n)
        for _ in range(n):
            plain.step()
    assert equal(replayed.state(), plain.state())


def test_random_numbers_go_on_in_a_graph():
    plain, replayed, _ = both(20, dropout=0.5)
    after_replays = torch.rand(4, device=DEVICE)
    assert equal(replayed.state(), plain.state())
    again = Loop(dropout=0.5)
    torch.manual_seed(2)
    for _ in range(20):
        again.step()
    assert torch.equal(torch.rand(4, device=DEVICE), after_replays)


def test_gradients_that_are_summed_over_steps():
    """Whoever never drops them gets what plain calls give."""
    sums = []
    for capture in (False, True):
        loop = Loop()

        def step(loop=loop):
            loop.criterion(loop.model(loop.inputs), loop.target).backward()
            loop.criterion.step()

        captured = CapturedStep(step, DEVICE, capture=capture)
        captured.run(10)
        assert captured.captured is capture, captured.fallback
        sums.append([p.grad.clone() for p in loop.model.parameters()])
    assert equal(*sums)


def test_a_step_replays_on_the_stream_of_its_caller():
    plain, replayed, captured = both(5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.run(10)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(10):
        plain.step()
    assert equal(replayed.state(), plain.state())


def test_a_step_that_reads_from_the_device_stays_plain():
    plain, loop = Loop(), Loop()
    read = []

    def step():
        loop.step()
        read.append(loop.rate.item())

    captured = CapturedStep(step, DEVICE)
    captured.run(10)
    assert not captured.captured
    assert captured.fallback.startswith(f"it waits for the device, in {Path(__file__).name}, line "), captured.fallback
    for _ in range(10):
        plain.step()
    assert len(read) == 10
    assert equal(loop.state(), plain.state())


def test_a_capture_that_fails_leaves_everything_as_it_was():
    # In a process of its own: torch's generator believes itself in the capture until another has ended.
    code = """
    import torch
    from test_cuda_graphs import DEVICE, Loop, equal
    from dynloss_ext import CapturedStep

    plain, loop = Loop(dropout=0.5), Loop(dropout=0.5)
    torch.manual_seed(2)
    for _ in range(10):
        plain.step()
    after = torch.rand(4, device=DEVICE)

    def step():
        loop.step()
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    torch.manual_seed(2)
    captured = CapturedStep(step, DEVICE)
    captured.run(10)
    assert not captured.captured
    assert captured.fallback.startswith("it could not be captured: "), captured.fallback
    print(captured.fallback)
    assert equal(loop.state(), plain.state())
    assert torch.equal(torch.rand(4, device=DEVICE), after)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()

    # Gradients that were made in the capture, and computed by nobody, are gone.
    w = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = torch.optim.SGD([w], lr=0.5)

    def descend():
        w.sum().backward()
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    CapturedStep(descend, DEVICE).run(8)
    assert torch.equal(w, torch.full_like(w, -3.0)), w

    fine = CapturedStep(loop.step, DEVICE)  # and nothing keeps the next one from it
    fine.run(10)
    assert fine.captured, fine.fallback
    for _ in range(10):
        plain.step()
    torch.cuda.synchronize()
    """
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "python_examples")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], timeout=120, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_records_are_read_in_one_copy():
    records = DeviceRecords(8, (3,), device=DEVICE)
    for number in range(5):
        records.append(torch.full((3,), float(number), device=DEVICE))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        rows = records.read()
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    copies = sum(event.count for event in profile.key_averages() if "Memcpy DtoH" in event.key)
    assert copies == 1


# ---- Hessians


def moved(steps=50, dtype=torch.float64):
    spiral = Spiral()
    for _ in range(steps):
        spiral.train()
    moved = spiral.to(DEVICE, dtype)
    moved.step = torch.tensor(steps, device=DEVICE)  # what a graph can see go on
    return moved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_replayed_products_have_the_bits_of_plain_ones(dtype):
    spiral = moved(dtype=dtype)
    H = CapturedHessian(spiral.loss, spiral.params)
    assert H.fallback is None, H.fallback
    v = torch.randn(H.shape[0], 4, device=DEVICE, dtype=dtype)
    for _ in range(3):
        plain = HessianOperator(spiral.loss(), spiral.params)
        expected = plain @ v
        assert torch.equal(H @ v, expected)
        assert equal(H.gradients, [g.detach() for g in plain.gradients])
        del plain
        with torch.no_grad():
            for p in spiral.params:
                p.mul_(0.99)
        spiral.step.add_(100)
        H.refresh()
        assert not torch.equal(H @ v, expected)


def test_products_between_replayed_steps():
    """The Hessian follows parameters that another graph moves."""
    spiral = moved()

    def descend():
        gradients = torch.autograd.grad(spiral.loss(), spiral.params)
        with torch.no_grad():
            torch._foreach_add_(spiral.params, gradients, alpha=-1)
        spiral.step.add_(1)

    step = CapturedStep(descend, DEVICE)
    H = CapturedHessian(spiral.loss, spiral.params)
    tracker, expected = EigenTracker(3, audit_every=4), EigenTracker(3, audit_every=4)
    for _ in range(8):
        step.run(5)
        values = tracker.update(H.refresh()).values
        assert torch.equal(values, expected.update(HessianOperator(spiral.loss(), spiral.params)).values)
    assert step.captured, step.fallback
    assert H.fallback is None, H.fallback


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigsh(which):
    spiral = moved()
    H = CapturedHessian(spiral.loss, spiral.params)
    assert H.fallback is None, H.fallback
    result, expected = (eigsh(A, 3, which=which) for A in (H, HessianOperator(spiral.loss(), spiral.params)))
    assert torch.equal(result.values, expected.values)
    assert torch.equal(result.vectors, expected.vectors)
    assert result.num_hvp == expected.num_hvp


def test_refreshing_leaves_buffers_alone():
    loop = Loop()
    before = [buffer.clone() for buffer in loop.model.buffers()]
    H = CapturedHessian(lambda: loop.criterion(loop.model(loop.inputs), loop.target), loop.model.parameters())
    assert H.fallback is None, H.fallback
    H.refresh()
    assert equal(list(loop.model.buffers()), before)


def test_a_loss_that_reads_from_the_device_has_plain_products():
    spiral = moved()

    def loss():
        return spiral.loss() * float(torch.ones((), device=DEVICE))

    H = CapturedHessian(loss, spiral.params)
    assert "it waits for the device" in H.fallback
    v = torch.randn(H.shape[0], device=DEVICE, dtype=torch.float64)
    assert torch.equal(H @ v, HessianOperator(spiral.loss(), spiral.params) @ v)


# ---- the trainer of the examples


@functools.cache
def images():
    return load_data(TrainingConfig(synthetic=True, train_images=200, validation_images=10))


def trained(tmp_path, steps, **changes):
    options = {
        "out": tmp_path, "synthetic": True, "device": "cuda", "classes": 10, "width": 16, "batch_size": 64,
        "epochs": 50, "amplitude": 20.0, "period": 8.0, "momentum": 0.9, "nesterov": True,
        "weight_decay": 1e-3, "schedule": "cosine", "batchnorm": True, "augment": True,
    }  # fmt: skip
    config = TrainingConfig(**options | changes)
    training = Training(config, images(), World(DEVICE))
    for _ in range(steps):
        training.update()
    return training


@pytest.mark.parametrize("changes", [{}, {"channels_last": True}, {"batch_size": None}, {"shards": 2}], ids=str)
def test_the_trainer_replays_its_steps(tmp_path, changes):
    """Batches of two sizes, four epochs and more, rates and order from the device."""
    plain = trained(tmp_path, 22, graphs=False, **changes)
    replayed = trained(tmp_path, 22, **changes)
    assert plain.fallback() == "--no-graphs"
    assert replayed.fallback() is None
    assert all(step.captured for step in replayed._captured.values())
    for training in (plain, replayed):
        training.measure_last_row()
    assert (replayed.metrics()[0]["weighted_loss"] == plain.metrics()[0]["weighted_loss"]).all()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(replayed.model.state_dict()[name], value), name


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_fast_precisions_are_captured_too(tmp_path, precision):
    training = trained(tmp_path, 22, precision=precision, deterministic=False, channels_last=True)
    assert training.fallback() is None
    assert training.newest().isfinite().all()


def test_the_trainer_says_why_it_does_not(tmp_path):
    training = trained(tmp_path, 4, precision="float64")
    assert training.new_fallback() == "--precision float64 has its learning rate on the host"
    assert training.new_fallback() is None


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    straight = trained(tmp_path, 30)
    first = trained(tmp_path, 18)
    second = trained(tmp_path, 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(12):
        second.update()
    for name, value in straight.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert (second.metrics()[0]["loss"] == straight.metrics()[0]["loss"]).all()
