"""Captured steps and Hessians with a pretended device: what a graph would do is done by plain calls."""

import pytest
import torch
from curvature_problems import Spiral, loss_of, mlp
from torch import nn

from dynloss_ext import (
    CapturedHessian,
    CapturedStep,
    DeviceRecords,
    DynamicCrossEntropyLoss,
    EigenTracker,
    HessianOperator,
    Oscillation,
    eigsh,
    graphs,
)


class PretendedGraph:
    """What a capture gives; a replay writes over its answer, as memory that stays where it is."""

    def __init__(self, work):
        self._work, self.answer, self.replays = work, None, 0

    def replay(self):
        self.replays += 1
        answer = self._work()
        if isinstance(answer, torch.Tensor):
            self.answer.copy_(answer)
        elif isinstance(answer, HessianOperator):
            self.answer.__dict__.update(answer.__dict__)

    def pool(self):
        return self


class PretendedStage(graphs._Stage):
    """A device on which what is captured computes nothing, unless its answer is needed."""

    log: list
    waits = None
    broken = None

    def __init__(self, device):
        self.device = torch.device("cpu")

    def call(self, work):
        self.log.append("plain")
        return work()

    def watch(self, work):
        self.log.append("watched")
        work()
        return self.waits

    def capture(self, work, pool=None):
        self.log.append("captured")
        if self.broken:
            raise graphs._CaptureError(self.broken)
        graph = PretendedGraph(work)
        if self.captured_answers:
            graph.answer = work()
        self.graphs.append((graph, pool))
        return graph, graph.answer


@pytest.fixture
def stage(monkeypatch):
    """The pretended device, as what the test may change of it."""
    kind = type("Stage", (PretendedStage,), {"log": [], "graphs": [], "captured_answers": False})
    monkeypatch.setattr(graphs, "_Stage", kind)
    monkeypatch.setattr(graphs, "_obstacle", lambda device, capture: None if capture else "capture=False was asked for")
    return kind


class Loop:
    """A training step that keeps all that changes in tensors, and records its losses."""

    def __init__(self, capacity=100):
        torch.manual_seed(0)
        self.inputs, self.target = torch.randn(30, 2), torch.arange(30) % 3
        self.model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
        self.criterion = DynamicCrossEntropyLoss(Oscillation(3, 70, 10))
        self.records = DeviceRecords(capacity)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.criterion(self.model(self.inputs), self.target)
        loss.backward()
        self.optimizer.step()
        self.criterion.step()
        self.records.append(loss)

    def state(self):
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*self.model.state_dict().values(), *momentum, self.criterion.current_step, self.records.read()]


def after(steps):
    """The state after plain steps."""
    loop = Loop()
    for _ in range(steps):
        loop.step()
    return loop.state()


def same(actual, expected):
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


# ---- steps


@pytest.mark.parametrize("chunks", [[0], [1], [2, 1], [3], [4], [1] * 6, [20], [3, 0, 5]], ids=str)
@pytest.mark.parametrize("warmup", [1, 3])
def test_n_steps_are_n_steps(stage, chunks, warmup):
    loop = Loop()
    step = CapturedStep(loop.step, "cuda", warmup=warmup)
    for n in chunks:
        step.run(n)
    total = sum(chunks)
    assert same(loop.state(), after(total))
    rehearsed = (["plain"] * (warmup - 1) + ["watched"])[:total]
    assert stage.log == rehearsed + ["captured"] * (total > warmup)
    assert sum(graph.replays for graph, _ in stage.graphs) == max(0, total - warmup)
    assert step.captured == (total > warmup)
    assert step.fallback is None


def test_a_step_that_waits_is_not_captured(stage):
    stage.waits = "it waits for the device, in loop.py, line 3"
    loop = Loop()
    step = CapturedStep(loop.step, "cuda")
    step.run(2)
    assert step.fallback is None
    step.run(8)
    assert step.fallback == stage.waits
    assert not step.captured
    assert same(loop.state(), after(10))
    assert stage.log == ["plain", "plain", "watched"]


def test_a_capture_that_fails_costs_nothing(stage):
    stage.broken = "it could not be captured: operation not permitted"
    loop = Loop()
    step = CapturedStep(loop.step, "cuda", warmup=1)
    step.run(10)
    assert step.fallback == stage.broken
    assert same(loop.state(), after(10))
    step.run(1)
    assert stage.log == ["watched", "captured"]  # once, and not again


def test_an_error_of_the_step_is_the_caller_s(stage):
    def fail():
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        CapturedStep(fail, "cuda").run()


def test_the_pool_is_handed_on(stage):
    pool = object()
    step = CapturedStep(lambda: None, "cuda", warmup=1, pool=pool)
    step.run(2)
    assert [given for _, given in stage.graphs] == [pool]


def test_plain_calls_on_the_cpu():
    loop = Loop()
    step = CapturedStep(loop.step, "cpu")
    step.run(4)
    assert step.fallback == "there are no CUDA graphs on a cpu"
    assert repr(step) == "CapturedStep(there are no CUDA graphs on a cpu)"
    assert same(loop.state(), after(4))


def test_plain_calls_for_a_comparison():
    assert CapturedStep(Loop().step, "cuda", capture=False).fallback == "capture=False was asked for"


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"step": 3}, "step: expected a callable, got int"),
        (TypeError, {"device": None}, "device: expected a torch.device or its name, got NoneType"),
        (ValueError, {"warmup": 0}, "warmup: expected an int >= 1, got 0"),
        (TypeError, {"warmup": 2.0}, "warmup: expected an int, got float"),
    ],
)
def test_bad_arguments_of_a_step(error, arguments, message):
    with pytest.raises(error, match=message):
        CapturedStep(**{"step": lambda: None, "device": "cpu", **arguments})


def test_a_bad_number_of_steps():
    with pytest.raises(ValueError, match="n: expected an int >= 0, got -1"):
        CapturedStep(lambda: None, "cpu").run(-1)


def test_gradients_of_a_capture_that_fails_are_dropped():
    kept, dropped = (nn.Parameter(torch.ones(3)) for _ in range(2))
    kept.grad = gradient = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(KeyboardInterrupt), graphs._gradients_kept():
        kept.grad, dropped.grad = torch.full((3,), torch.nan), torch.full((3,), torch.nan)
        raise KeyboardInterrupt
    assert kept.grad is gradient and dropped.grad is None
    with graphs._gradients_kept():
        dropped.grad = gradient
    assert dropped.grad is gradient


def test_reasons_name_the_first_cause():
    try:
        try:
            raise RuntimeError("operation not permitted\nmore words")
        finally:
            raise RuntimeError("due to a previous error")
    except RuntimeError as error:
        assert graphs._first_cause(error) == "operation not permitted"
    assert graphs._first_cause(KeyboardInterrupt()) == "KeyboardInterrupt"
    try:
        raise KeyError("the caller's")
    except KeyError as outside:
        try:
            raise RuntimeError("operation not permitted")
        except RuntimeError as error:
            assert graphs._first_cause(error, outside) == "operation not permitted"


# ---- records


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16, torch.complex128], ids=str)
def test_rows_come_back_in_order_around_the_ring(shape, dtype):
    records, number = DeviceRecords(5, shape, dtype=dtype), 0
    for count in (3, 0, 4, 5, 1, 5, 2):
        expected = []
        for _ in range(count):
            number += 1
            expected.append(torch.full(shape, number, dtype=dtype))
            records.append(expected[-1].to(torch.promote_types(dtype, torch.float64)))
        rows = records.read()
        assert rows.dtype == dtype
        assert torch.equal(rows, torch.stack(expected) if expected else torch.empty(0, *shape, dtype=dtype))


def test_rows_written_over_are_noticed():
    records = DeviceRecords(4)
    for number in range(5):
        records.append(torch.tensor(float(number)))
    with pytest.raises(RuntimeError, match="expected at most 4 rows between two readings, got 5: read more often"):
        records.read()
    records.append(torch.tensor(7.0))
    assert records.read().tolist() == [7.0]


def test_rows_are_constants():
    records = DeviceRecords(4)
    records.append(torch.ones((), requires_grad=True) * 2)
    assert not records.read().requires_grad


def test_bad_rows():
    with pytest.raises(ValueError, match=r"row: expected shape \(2,\) on cpu, got \(3,\) on cpu"):
        DeviceRecords(4, (2,)).append(torch.ones(3))
    with pytest.raises(ValueError, match=r"row: expected shape \(\) on cpu, got \(\) on meta"):
        DeviceRecords(4).append(torch.ones((), device="meta"))
    with pytest.raises(TypeError, match=r"row: expected a torch.Tensor, got float"):
        DeviceRecords(4).append(1.0)
    with pytest.raises(ValueError, match="capacity: expected an int >= 1, got 0"):
        DeviceRecords(0)


# ---- Hessians


def captured(stage, spiral):
    stage.captured_answers = True
    return CapturedHessian(spiral.loss, spiral.params)


def test_products_follow_the_parameters(stage):
    spiral = Spiral()
    H = captured(stage, spiral)
    assert H.fallback is None
    assert stage.log == ["plain", "plain", "watched", "captured", "captured"]
    (first, _), (_, pool) = stage.graphs
    assert pool is first  # the product needs what the first has saved
    for number in range(3):
        expected = HessianOperator(spiral.loss(), spiral.params)
        assert torch.equal(H.to_dense(), expected.to_dense())
        spiral.train()
        with pytest.raises(RuntimeError, match="changed in place"):  # a real graph would not notice
            H.to_dense()
        assert H.refresh() is H
        assert H.num_refreshes == number + 1
    assert (H.shape, H.dtype, H.device) == ((603, 603), torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("pretended", [False, True])
def test_solvers_take_it_as_any_operator(stage, monkeypatch, pretended):
    if not pretended:
        monkeypatch.undo()
    spiral = Spiral()
    H, tracker, plain = captured(stage, spiral), EigenTracker(3), EigenTracker(3)
    assert torch.equal(eigsh(H, 3).values, eigsh(HessianOperator(spiral.loss(), spiral.params), 3).values)
    for _ in range(3):
        spiral.train()
        expected = plain.update(HessianOperator(spiral.loss(), spiral.params))
        assert torch.equal(tracker.update(H.refresh()).values, expected.values)
    assert H.fallback == (None if pretended else "there are no CUDA graphs on a cpu")
    gradients = HessianOperator(spiral.loss(), spiral.params).gradients
    assert pretended or same(H.gradients, gradients)


@pytest.mark.parametrize("where", ["waits", "broken"])
def test_a_hessian_without_graphs_says_why(stage, where):
    setattr(stage, where, "it waits for the device, in loss.py, line 1")
    spiral = Spiral()
    H = captured(stage, spiral)
    assert H.fallback == "it waits for the device, in loss.py, line 1"
    for _ in range(2):
        assert torch.equal(H.to_dense(), HessianOperator(spiral.loss(), spiral.params).to_dense())
        spiral.train()
        H.refresh()


def test_a_refresh_leaves_buffers_alone():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    inputs = torch.randn(10, 2, dtype=torch.float64)
    before = [buffer.clone() for buffer in model.buffers()]
    CapturedHessian(lambda: model(inputs).square().mean(), model.parameters()).refresh()
    assert same(list(model.buffers()), before)


def test_a_random_loss_has_no_hessian():
    params = mlp()
    with pytest.raises(ValueError, match="loss: expected the same value for the same parameters"):
        CapturedHessian(lambda: loss_of(params) * torch.rand(()), params)


@pytest.mark.parametrize(("loss", "message"), [(3, "loss: expected a callable"), (lambda: 3, "loss: expected a 0-d")])
def test_a_bad_loss(loss, message):
    with pytest.raises(TypeError, match=message):
        CapturedHessian(loss, mlp())
