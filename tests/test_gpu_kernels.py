"""The benchmark of the CUDA kernels counts bytes, keeps to its time, and lets nothing wrong pass."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture
def gpu_kernels(benchmark_script):
    return benchmark_script("gpu_kernels")


@pytest.fixture
def kernel_rows(gpu_kernels):
    return sys.modules["kernel_rows"]


def run(gpu_kernels, tmp_path, stage, *options, seconds=500):
    path = tmp_path / "report.json"
    status = gpu_kernels.main([stage, "--json", str(path), "--seconds", str(seconds), "--dry-run", *options])
    return status, json.loads(path.read_text())


# ---- what is counted


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("sum", 100 * 10 * 4 * 2 + 800),
        ("mean", 100 * 10 * 4 * 2 + 800),
        ("ignored", 80 * 10 * 4 + 100 * 10 * 4 + 800),  # what is ignored need not be read
        ("ensemble", 100 * 10 * 4 * 2 + 800),
        ("hessian", 100 * 10 * 4 * 3 + 800),
        ("loss", 100 * 10 * 4 + 800),
    ],
)
def test_fewest_bytes(kernel_rows, variant, expected):
    assert kernel_rows.Row(100, 10, torch.float32, variant).moved == expected


def test_bytes_of_halves_and_of_a_rest_of_ignored_rows(kernel_rows):
    assert kernel_rows.Row(3, 7, torch.bfloat16).moved == 2 * 2 * 21 + 24
    assert kernel_rows.Row(11, 7, torch.bfloat16, "ignored").moved == 2 * (8 * 7 + 11 * 7) + 88
    inputs = kernel_rows.Inputs(kernel_rows.Row(11, 7, torch.float32, "ignored"), 2, "cpu")
    assert [int((target == -100).sum()) for target in inputs.target] == [3, 3]


def test_table_has_every_size_and_variant(kernel_rows):
    rows = kernel_rows.table_rows()
    assert len({str(row) for row in rows}) == len(rows)
    for dtype in (torch.float32, torch.bfloat16):
        large = {row.classes for row in rows if row.dtype == dtype and row.bytes > 0.9 * (256 << 20)}
        assert large >= set(kernel_rows.CLASSES)
        assert {(row.samples, row.classes) for row in rows if row.dtype == dtype} >= set(kernel_rows.DESIGN)
    assert {row.variant for row in rows} == set(kernel_rows.VARIANTS)


def test_calls_fill_a_graph_and_the_sets_exceed_the_cache(gpu_kernels, kernel_rows):
    gpu = gpu_kernels.Gpu.__new__(gpu_kernels.Gpu)
    gpu.l2_bytes = 50 << 20
    for row in kernel_rows.table_rows():
        sets = gpu.sets(row.moved)
        calls = gpu_kernels.calls_per_graph(sets, row.moved)
        assert sets >= 2 and sets * row.moved > 3 * gpu.l2_bytes
        assert calls % sets == 0 and calls <= gpu_kernels.MAX_CALLS
        assert calls * row.moved / 3e12 > 0.9e-3 or calls > gpu_kernels.MAX_CALLS - sets or calls * 2e-6 >= 1e-3


# ---- values


def inputs_and_results(kernel_rows, variant, dtype=torch.float32):
    row = kernel_rows.Row(40, 12, dtype, variant)
    inputs = kernel_rows.Inputs(row, 2, "cpu")
    return inputs, [call() for call in inputs.calls()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["sum", "mean", "ignored", "smoothing", "weights", "ensemble", "hessian", "loss"])
def test_right_results_pass_and_wrong_ones_do_not(kernel_rows, variant, dtype):
    inputs, results = inputs_and_results(kernel_rows, variant, dtype)
    report = inputs.errors(results)
    assert report["ok"] is True
    assert ("loss_error" in report) == (variant != "hessian")
    assert ("derivative_error" in report) == (variant != "loss")
    for name in ("loss", "derivative"):
        right = getattr(results[-1], name)
        if right is None:
            continue
        with_nan = right.clone()
        with_nan.view(-1)[0] = math.nan
        for wrong in (right * 1.02, with_nan):
            setattr(results[-1], name, wrong)
            report = inputs.errors(results)
            assert report["ok"] is False and not report[f"{name}_error"] <= 1e-2, (name, report)
        setattr(results[-1], name, right)
    assert inputs.errors(results)["ok"] is True


def test_an_unwritten_element_anywhere_is_found(kernel_rows):
    row = kernel_rows.Row(5000, 3, torch.float32)
    inputs = kernel_rows.Inputs(row, 1, "cpu")
    result = inputs.call(0)
    result.derivative[2345, 1] = math.nan  # hardly among the rows that are compared
    assert inputs.errors([result])["ok"] is False


# ---- graphs, with a stand-in for the device


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.ops.append((function, args, kwargs or {}, result))
        return result


class RecordedGraph:
    """Replays the ops of a capture into the memory of their results."""

    def replay(self):
        for function, args, kwargs, result in self.ops:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def gpu(gpu_kernels, monkeypatch):
    """A Gpu whose device is the CPU."""

    @contextlib.contextmanager
    def capture(graph):
        with Recorder() as recorder:
            yield
        graph.ops = recorder.ops

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": RecordedGraph,
        "graph": capture,
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "get_device_properties": lambda index: types.SimpleNamespace(L2_cache_size=1 << 14),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    monkeypatch.setattr(torch.cuda.profiler, "profile", contextlib.nullcontext)
    monkeypatch.setattr(gpu_kernels, "NOMINAL_GBPS", 0.5)  # so that graphs stay short
    gpu = gpu_kernels.Gpu()
    gpu.device = "cpu"
    return gpu


@pytest.mark.parametrize("variant", ["sum", "mean", "ignored", "smoothing", "weights", "ensemble", "hessian", "loss"])
def test_graphs_are_timed_and_checked(gpu_kernels, kernel_rows, gpu, variant):
    row = gpu_kernels.measure(kernel_rows.Row(400, 10, torch.float32, variant), gpu, 3000.0, 0.0)
    assert row["ok"] is True and row["cold"] is True
    assert row["calls"] > row["sets"] >= 2 and row["calls"] % row["sets"] == 0
    assert row["us"] > 0 and row["memcpy_us"] > 0 and row["elementwise_us"] > 0


def test_what_a_replay_does_not_write_is_found(gpu_kernels, kernel_rows, gpu, monkeypatch):
    monkeypatch.setattr(RecordedGraph, "replay", lambda self: None)
    row = gpu_kernels.measure(kernel_rows.Row(400, 10, torch.float32), gpu, 3000.0, 0.0)
    assert row["ok"] is False and math.isnan(row["derivative_error"]) and math.isnan(row["loss_error"])


def test_results_of_a_graph_belong_to_the_problems_in_their_order(gpu_kernels, kernel_rows, gpu):
    inputs = kernel_rows.Inputs(kernel_rows.Row(40, 10, torch.float32), 3, "cpu")
    graph = sys.modules["graph_timing"].Graph(inputs.calls(), 9)
    assert len(graph.results) == 3
    for i, result in enumerate(graph.results):
        assert torch.equal(result.derivative, inputs.call(i).derivative)


# ---- dry runs


def test_table(gpu_kernels, tmp_path, capsys):
    shapes = ("1048576x10:float32", "65536x1000:fp32", "8192x32000:bf16", "7x5:float64")
    status, report = run(gpu_kernels, tmp_path, "table", "--only", *shapes)
    rows = report["rows"]
    assert status == 0 and report["stage"] == "table" and report["dry_run"] is True
    assert {name.rpartition("-")[2] for name in rows if name.startswith("65536x1000-")} == set(
        sys.modules["kernel_rows"].VARIANTS
    )
    assert "7x5-float64-sum" in rows
    for name, row in rows.items():
        assert row["ok"] is True, (name, row)
        assert row["us"] >= row["us_min"] > 0 and row["copy_gbps"] > 0 and row["floor_us"] > 0
        assert row["of_copy"] == pytest.approx(min(row["memcpy_us"], row["elementwise_us"]) / row["us"])
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    assert list(report).index("copy_gbps") < list(report).index("rows") and report["ceiling_gbps"] > 0
    best: dict[str, float] = {}
    for row in rows.values():
        best[str(row["bytes"])] = max(row["copy_gbps"], best.get(str(row["bytes"]), 0))
    assert report["copy_gbps"] == best and list(best) != list(report["copy_gbps"]) == sorted(best, key=int)
    printed = capsys.readouterr().out
    assert f"of a copy's {rows['7x5-float64-sum']['copy_gbps']:5.0f}" in printed
    assert "8192x32000-bfloat16-hessian" in printed and str(3 * 2 * 8192 * 32000 + 8 * 8192) in printed


def test_contenders(gpu_kernels, tmp_path):
    status, report = run(gpu_kernels, tmp_path, "contenders", "--only", "4096x1000:float32", "512x10:bfloat16")
    rows = report["rows"]
    assert status == 0
    assert set(rows) == {
        "4096x1000-float32-loss",
        "4096x1000-float32-hessian",
        "4096x1000-float32-linear",
        "512x10-bfloat16-loss",
        "512x10-bfloat16-hessian",
    }
    for row in rows.values():
        assert row["ours"]["us"] > 0 and row["eager"]["us"] > 0
    loss = rows["4096x1000-float32-loss"]
    assert loss["liger"] == loss["compile"] == "not run without a GPU"
    assert "not installed" in rows["4096x1000-float32-hessian"]["hessian-eigenthings"]


def test_profile(gpu_kernels, tmp_path):
    status, report = run(gpu_kernels, tmp_path, "profile")
    assert status == 0 and len(report["rows"]) == 3
    assert all(row["launches"] == 2 and row["ok"] for row in report["rows"].values())


def test_wrong_row_fails_the_run(gpu_kernels, kernel_rows, tmp_path, monkeypatch):
    right = kernel_rows.Inputs.call
    monkeypatch.setattr(
        kernel_rows.Inputs, "call", lambda self, i: kernel_rows.Result(right(self, i).loss * 1.01, None)
    )
    status, report = run(gpu_kernels, tmp_path, "table", "--only", "7x5:float32")
    assert status == 1 and report["rows"]["7x5-float32-sum"]["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "--only", "7x5"], "--only: expected ROWSxCLASSES:DTYPE"),
        (["table", "--only", "0x5:float32"], "--only: expected ROWSxCLASSES:DTYPE"),
        (["table", "--only", "7x5:int8"], "--only: expected ROWSxCLASSES:DTYPE"),
        (["contenders", "--seconds", "0"], "--seconds: expected a number > 0"),
        (["profile", "--json", "nowhere/x.json"], "--json: expected a file in a folder that exists"),
    ],
)
def test_bad_arguments(gpu_kernels, tmp_path, arguments, message, capsys):
    stage, *rest = arguments
    defaults = [stage, "--json", str(tmp_path / "x.json"), "--seconds", "5", "--dry-run"]
    with pytest.raises(SystemExit) as error:
        gpu_kernels.main([*defaults, *rest])
    assert error.value.code == 2 and message in capsys.readouterr().err


# ---- time and partial results


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_rows_stop_when_no_other_fits_and_the_file_is_never_behind(gpu_kernels, tmp_path):
    clock, path, seen = Clock(), tmp_path / "x.json", []
    budget = gpu_kernels.Budget(45, clock)
    results = gpu_kernels.Results(path, {"stage": "table"})

    def measure(seconds):
        seen.append(json.loads(path.read_text())["rows"])
        assert 0 < seconds <= 0.5
        clock.now += 10
        return {"ok": True}

    gpu_kernels.go_through({f"{i}-sum": measure for i in range(6)}, results, budget, 0.5, lambda *_: None)
    assert [len(rows) for rows in seen] == [0, 1, 2, 3]  # after 40 s another 10 s do not fit
    rows = json.loads(path.read_text())["rows"]
    assert rows["4-sum"] == rows["5-sum"] == {"skipped": "no time left"}
    assert not results.failed and not list(tmp_path.glob("*.tmp"))


def test_a_short_kind_of_row_is_not_skipped_for_a_long_one(gpu_kernels, tmp_path):
    clock = Clock()
    results = gpu_kernels.Results(tmp_path / "x.json", {})

    def lasting(duration):
        def measure(seconds):
            clock.now += duration
            return {}

        return measure

    rows = {"a-loss": lasting(20), "b-hessian": lasting(1), "c-loss": lasting(20), "d-hessian": lasting(1)}
    gpu_kernels.go_through(rows, results, gpu_kernels.Budget(30, clock), 0.5, lambda *_: None)
    assert [name for name, row in results.rows.items() if "skipped" in row] == ["c-loss"]


def test_a_failing_row_costs_only_itself(gpu_kernels, tmp_path):
    results = gpu_kernels.Results(tmp_path / "x.json", {})

    def fail(seconds):
        raise ValueError("first line\nsecond line")

    rows = {"a": lambda seconds: {"ok": True}, "b": fail, "c": lambda seconds: {"ok": True}}
    gpu_kernels.go_through(rows, results, gpu_kernels.Budget(60), 0.5, lambda *_: None)
    assert results.rows == {"a": {"ok": True}, "b": {"error": "ValueError: first line"}, "c": {"ok": True}}
    assert results.failed


def test_after_an_error_of_the_device_nothing_more_is_tried(gpu_kernels, tmp_path, monkeypatch):
    results = gpu_kernels.Results(tmp_path / "x.json", {})
    monkeypatch.setattr(sys.modules["time_budget"], "device_error", lambda: "after AcceleratorError: illegal address")

    def fail(seconds):
        raise RuntimeError("illegal address")

    gpu_kernels.go_through({"a": fail, "b": fail}, results, gpu_kernels.Budget(60), 0.5, lambda *_: None)
    assert results.rows["b"] == {"skipped": "after AcceleratorError: illegal address"}


# ---- contenders


def test_a_contender_that_fails_or_is_missing_is_told_in_one_line(gpu_kernels, monkeypatch):
    Contender = sys.modules["loss_contenders"].Contender

    def fail():
        raise RuntimeError("no such kernel\nstack")

    candidates = {"ours": Contender(lambda: None), "compile": Contender(fail), "quack": "not installed (x)"}
    monkeypatch.setitem(gpu_kernels.GROUPS, "loss", lambda case, device: candidates)
    row = gpu_kernels.compare("loss", None, gpu_kernels.Rehearsal(), 0.0)
    assert row["compile"] == "failed (RuntimeError: no such kernel)" and row["quack"] == "not installed (x)"
    assert set(row["ours"]) == {"us", "us_min"}


def test_contenders_compute_the_same_products(gpu_kernels, monkeypatch):
    def triton_ce_hvp(logits, u, valid, n):
        p = torch.softmax(logits, -1)
        return (p * u - p * (p * u).sum(-1, keepdim=True)) * valid[:, None] / n

    module = types.SimpleNamespace(triton_ce_hvp=triton_ce_hvp)
    monkeypatch.setitem(sys.modules, "hessian_eigenthings.loss_fns._fused_ce_hvp", module)
    case = sys.modules["loss_contenders"].Case(30, 12, torch.float32)
    candidates = gpu_kernels.products_of(case, "cpu")
    expected = candidates["ours"].run().derivative
    torch.testing.assert_close(candidates["eager"].run(), expected)
    torch.testing.assert_close(candidates["hessian-eigenthings"].run(), expected)


def test_contenders_compute_the_same_gradients_through_a_linear_layer(gpu_kernels):
    case = sys.modules["loss_contenders"].Case(30, 12, torch.float32)
    gradients = {}
    for name in gpu_kernels.linear_of(case, "cpu"):
        candidate = gpu_kernels.linear_of(case, "cpu")[name]  # anew: the same data, at the same step
        if isinstance(candidate, str):
            assert not hasattr(torch.nn.functional, "linear_cross_entropy")
        else:
            gradients[name] = candidate.run()
    assert len(gradients) >= 2
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["ours"])
