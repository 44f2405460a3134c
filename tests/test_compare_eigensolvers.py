"""The comparison of eigensolvers, as far as its CUDA graph can be seen without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def solvers(benchmark_script: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield benchmark_script("compare_eigensolvers")
    torch.set_default_dtype(dtype)  # main has set both
    torch.set_num_threads(threads)


def small_problem(solvers: ModuleType) -> Any:
    return solvers.spiral(Namespace(dtype="float64", device="cpu"))


def test_a_graph_has_parameters_of_its_own(solvers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the problem may have nodes of the default stream, which a capture must not meet."""
    problem = small_problem(solvers)
    alive = problem.hessian()
    before = [torch.autograd.graph.get_gradient_edge(p).node for p in problem.params]
    inside: list[str] = []  # streams and captures
    seen: list[tuple[list[str], list[torch.Tensor]]] = []

    @contextlib.contextmanager
    def enter(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    def grad(outputs: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        seen.append((list(inside), list(inputs)))
        return original(outputs, inputs, *rest, **options)

    class Fake:
        def wait_stream(self, other: object) -> None: ...
        def replay(self) -> None: ...

    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", grad)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: enter("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: enter("capture"))
    assert solvers.graphed_product_seconds(problem) >= 0
    assert [where for where, _ in seen] == [["stream"]] * 4 + [["stream", "capture"]]
    for _, inputs in seen:
        nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in inputs]
        assert len(nodes) == len(before) and not set(nodes) & set(before)
    assert alive.shape[0] == sum(p.numel() for p in problem.params)


def test_a_capture_that_fails_costs_its_own_figure_and_the_exit_status(
    solvers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(problem: object) -> float:
        try:
            raise RuntimeError("CUDA error: the cause\nCompile with advice.")
        finally:
            raise RuntimeError("CUDA error: due to a previous error during capture")

    driver = {"overhead_median": 0.1, "product_seconds_median": 2.0, "update_seconds_per_product_median": 3.0}
    problem = small_problem(solvers)
    monkeypatch.setattr(solvers, "spiral", lambda arguments: problem)
    monkeypatch.setattr(solvers, "machine", lambda device: {})
    monkeypatch.setattr(solvers, "measure_overhead", lambda *arguments: driver)
    monkeypatch.setattr(solvers, "contenders", lambda: {"eigsh (cold)": solvers.ours_cold})
    monkeypatch.setattr(solvers, "graphed_product_seconds", fails)
    path = tmp_path / "figures.json"
    command = ["x", "spiral", "--states", "1", "--gap", "1", "--device", "cuda", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"failed: a product in a CUDA graph: RuntimeError: CUDA error: the cause$"):
        solvers.main()
    found = json.loads(path.read_text())["spiral"]
    assert found["driver"] == driver | {"graphed_product_seconds": "RuntimeError: CUDA error: the cause"}
    assert found["solvers"]["eigsh (cold)"]["products"] > 0
    monkeypatch.setattr(solvers, "graphed_product_seconds", lambda problem: 1.5)
    solvers.main()
    found = json.loads(path.read_text())["spiral"]["driver"]
    assert (found["graphed_product_seconds"], found["update_over_graphed_products"]) == (1.5, 2.0)
    assert "an update takes 2.00 times" in capsys.readouterr().out


def test_a_grid_over_sizes_and_numbers_of_pairs(
    solvers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def low(problem: Any) -> Any:
        answer = solvers.ours_cold(problem)
        return solvers.Answer(0.9 * answer.values, answer.products)

    monkeypatch.setattr(
        solvers, "contenders", lambda: {"eigsh (cold)": solvers.ours_cold, "absent": None, "PyHessian": low}
    )
    path = tmp_path / "figures.json"
    command = [
        "x",
        "grid",
        "--sizes",
        "40",
        "200",
        "--ks",
        "1",
        "2",
        "--states",
        "2",
        "--gap",
        "1",
        "--json",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", command)
    solvers.main()
    grid = json.loads(path.read_text())["grid"]["solvers"]
    assert [(row["product"], row["k"]) for row in grid.values()] == [
        (c, k) for c in ("cheap", "dear") for k in (1, 2, 1, 2)
    ]
    for row in grid.values():
        assert abs(row["parameters"] - (40 if row["parameters"] < 100 else 200)) < 60
        ours = row["solvers"]["eigsh (cold)"]
        assert ours["products"] >= row["k"] and 0 < ours["seconds_min"] <= ours["seconds_median"]
        assert row["solvers"]["absent"] is None
        assert ours["worst_error"] == 0  # the best of those that are to be trusted
        assert row["solvers"]["PyHessian"]["worst_error"] == pytest.approx(0.1)
    assert "not installed" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*command, "--ks", "2", "3", "--products", "cheap"])
    solvers.main()
    more = json.loads(path.read_text())["grid"]["solvers"]
    assert {name: more.pop(name) for name in grid} == grid  # not measured again
    assert [(row["product"], row["k"]) for row in more.values()] == [("cheap", 3)] * 2


def test_peak_memory_is_that_of_a_process_for_each_solver(
    solvers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = importlib.import_module("eigensolver_grid")
    alone = grid.peak_bytes
    vector = 4 * 200_000
    held = torch.ones(100 * 200_000)  # what this process holds, or has held, is not counted
    del held
    peak = alone("eigsh (cold)", 200_000, 1, torch.float32, 1)
    assert 8 * vector < peak < 80 * vector
    monkeypatch.setattr(grid, "MEMORY_FROM", 100)
    monkeypatch.setattr(grid, "peak_bytes", lambda name, size, *rest: (name, size))
    monkeypatch.setattr(solvers, "contenders", lambda: {"eigsh (cold)": solvers.ours_cold, "curvlinops": 1, "x": None})
    arguments = Namespace(
        dtype="float32", products=["cheap", "dear"], sizes=[40, 200], ks=[1], states=1, gap=1, warm=0, threads=1
    )
    rows: dict[str, Any] = {}
    arguments.without = ["curvlinops"]
    grid.measure_grid(solvers, arguments, rows, lambda _: None)
    found = {cell: row["solvers"]["eigsh (cold)"].get("peak_bytes") for cell, row in rows.items()}
    assert list(found.values()) == [None, ("eigsh (cold)", 200), None, None]
    assert all(row["solvers"].keys() == {"eigsh (cold)"} for row in rows.values())
    assert alone("no solver", 100, 1, torch.float32, 1) is None
    assert "peak memory of no solver, P=100 k=1: 'no solver'" in capsys.readouterr().err


def test_a_case_of_one_state_goes_on_with_the_solvers_that_it_lacks(
    solvers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = importlib.import_module("eigensolver_grid")
    contenders = {"eigsh (cold)": solvers.ours_cold, "EigenTracker (warm)": solvers.Tracked(), "x": None}

    def fails(problem: Any) -> Any:
        raise ValueError("no")

    arguments = Namespace(
        dtype="float64", products=["dear"], sizes=[200], ks=[2], states=1, gap=1, warm=1, threads=1, without=[]
    )
    rows: dict[str, Any] = {}
    saved: list[list[str]] = []
    for more in ({}, {"SciPy (cold)": solvers.Scipy(None, False), "curvlinops": fails}):
        monkeypatch.setattr(solvers, "contenders", lambda more=more: contenders | more)
        grid.measure_grid(solvers, arguments, rows, lambda rows: saved.append(list(rows["dear P=200 k=2"]["solvers"])))
        rows = json.loads(json.dumps(rows))
    first, second = "eigsh (cold)", "EigenTracker (warm)"
    third = "SciPy (cold)"
    assert saved == [[first], [first, second], [first, second, third], [first, second, third, "curvlinops"]]
    cell = rows["dear P=200 k=2"]["solvers"]
    assert cell.pop("curvlinops") == {"failed": "ValueError: no"}
    assert all(0 <= row["worst_error"] < 1e-3 for row in cell.values())
    problem = grid.made(solvers, 200, "dear", 2, torch.float64)
    by_turns = solvers.measure(
        problem, {"eigsh (cold)": solvers.ours_cold, "EigenTracker (warm)": solvers.Tracked()}, 1, 1, 1, lambda _: None
    )
    assert {name: row["products"] for name, row in by_turns.items()} == {
        name: row["products"] for name, row in cell.items() if name in by_turns
    }  # the same states
