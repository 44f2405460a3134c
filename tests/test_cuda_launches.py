"""The loss on CUDA: streams, captures, launches."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from cross_entropy_cases import normal as randn
from cuda_cases import NEEDS_KERNELS, labels, launched_by

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient

pytestmark = NEEDS_KERNELS


def in_a_process_of_its_own(code, seconds=120):
    """Runs code that must be the first to do something, or that could hang."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=seconds, env=environment)


def test_same_bits_on_every_run_and_stream():
    logits, target = randn(20000, 10, dtype=torch.float32).cuda(), labels(10, 20000, ignored=True).cuda()
    oscillation = Oscillation(10, 70, 100)
    loss, gradient = loss_and_gradient(logits, target, oscillation, 7)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(loss_and_gradient(logits, target, oscillation, 7))
    torch.cuda.synchronize()
    assert all(torch.equal(x, loss) and torch.equal(y, gradient) for x, y in results)


def test_streams_at_once_with_shapes_of_their_own():
    problems = []
    for shape in ((20000, 10), (70000, 3), (4096, 100), (300, 2000)):
        arguments = (randn(*shape, dtype=torch.float32).cuda(), labels(shape[1], shape[0], ignored=True).cuda())
        oscillation = Oscillation(shape[1], 70, 100)
        expected = loss_and_gradient(*arguments, oscillation, 7)
        problems.append((torch.cuda.Stream(), (*arguments, oscillation, 7), expected))
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream, arguments, expected in problems:
            with torch.cuda.stream(stream):
                results.append((loss_and_gradient(*arguments), expected))
    torch.cuda.synchronize()
    for actual, expected in results:
        assert all(map(torch.equal, actual, expected))


def test_threads_whose_streams_have_one_handle():
    # cudaStreamPerThread is the same handle, 2, in every thread, and another stream in each.
    problems, results, errors = [], [[], []], []
    for rows, classes in ((20000, 10), (2000, 100)):
        arguments = (randn(rows, classes, dtype=torch.float32).cuda(), labels(classes, rows).cuda())
        problems.append((*arguments, Oscillation(classes, 70, 100), 7))
    expected = [loss_and_gradient(*problem) for problem in problems]
    torch.cuda.synchronize()
    together = threading.Barrier(2)
    pools = [torch.cuda.MemPool() for _ in problems]

    def work(k):
        try:
            stream = torch.cuda.ExternalStream(2, device=torch.device("cuda", torch.cuda.current_device()))
            # PyTorch's allocator, too, takes the streams for one: each thread has memory of its own.
            with torch.cuda.use_mem_pool(pools[k]), torch.cuda.stream(stream):
                together.wait(timeout=60)
                for _ in range(200):
                    results[k].append(loss_and_gradient(*problems[k]))
                stream.synchronize()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    torch.cuda.synchronize()
    assert not errors and [len(x) for x in results] == [200, 200], errors
    assert all(all(map(torch.equal, actual, expected[k])) for k in range(2) for actual in results[k])
    results.clear()  # before the pools


def test_first_call_of_several_blocks_inside_a_memory_pool():
    in_a_process_of_its_own("""
        import torch
        from dynloss_ext import Oscillation, loss_and_gradient

        logits = torch.randn(20000, 10, device="cuda")
        target = torch.randint(10, (20000,), device="cuda")
        oscillation = Oscillation(10, 70, 100)
        loss_and_gradient(logits[:4], target[:4], oscillation, 7)  # one block
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            loss, gradient = loss_and_gradient(logits, target, oscillation, 7)
        expected = loss.clone(), gradient.clone()
        del loss, gradient
        torch.cuda.synchronize()
        # Nothing of what the op keeps to itself lies in memory that is not its own.
        blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
        assert blocks and not [block for block in blocks if block["state"] == "active_allocated"], blocks
        del pool
        torch.cuda.empty_cache()
        junk = torch.full((1 << 26,), 0x55555555, dtype=torch.int32, device="cuda")
        for _ in range(3):
            assert all(map(torch.equal, loss_and_gradient(logits, target, oscillation, 7), expected))
    """)


def test_first_call_of_several_blocks_inside_a_capture_and_graphs_beside_eager_calls():
    in_a_process_of_its_own("""
        import torch
        from dynloss_ext import Oscillation, loss_and_gradient

        oscillations = [Oscillation(10, 70, 100), Oscillation(100, 70, 100)]
        problems = []
        for rows, oscillation in zip((20000, 3000), oscillations):
            classes = oscillation.num_classes
            logits = torch.randn(rows, classes, device="cuda")
            target = torch.randint(classes, (rows,), device="cuda")
            loss_and_gradient(logits[:4], target[:4], oscillation, 7)  # one block: loads the kernel
            problems.append((logits, target, oscillation, 7))
        torch.cuda.synchronize()
        graphs, captured = [torch.cuda.CUDAGraph() for _ in problems], []
        for graph, problem in zip(graphs, problems):
            with torch.cuda.graph(graph):
                captured.append(loss_and_gradient(*problem))
        expected = [loss_and_gradient(*problem) for problem in problems]
        for actual, (logits, target, oscillation, step) in zip(expected, problems):
            exact, _ = loss_and_gradient(logits.double().cpu(), target.cpu(), oscillation, step)
            torch.testing.assert_close(actual[0].double().cpu(), exact, rtol=1e-5, atol=0)
        streams = [torch.cuda.Stream() for _ in graphs]
        for _ in range(5):
            for results in captured:
                for tensor in results:
                    tensor.fill_(float("nan"))
            torch.cuda.synchronize()
            eager = []
            for _ in range(20):
                for stream, graph, problem in zip(streams, graphs, problems):
                    with torch.cuda.stream(stream):
                        graph.replay()
                    eager.append(loss_and_gradient(*problem))
            torch.cuda.synchronize()
            for k, results in enumerate(eager):
                assert all(map(torch.equal, results, expected[k % 2]))
            for results, wanted in zip(captured, expected):
                assert all(map(torch.equal, results, wanted))
    """)


@pytest.mark.parametrize("kind", ["plain", "order", "table", "ensemble"])
def test_first_use_of_an_oscillation_inside_a_capture(kind):
    def oscillation():
        if kind == "table":
            return Oscillation.from_table(randn(4, 10).abs())
        if kind == "ensemble":
            return Oscillation(10, torch.tensor([2.0, 30.0]), 100)
        return Oscillation(10, 70, 100, class_order=list(range(9, -1, -1)) if kind == "order" else None)

    shape = (2, 300) if kind == "ensemble" else (300,)
    problem = randn(*shape, 10, dtype=torch.float32).cuda(), labels(10, *shape).cuda()
    expected = loss_and_gradient(*problem, oscillation(), 7)
    fresh = oscillation()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(*problem, fresh, 7)
    # What the capture has left behind serves before the first replay as well,
    assert all(map(torch.equal, loss_and_gradient(*problem, fresh, 7), expected))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
    # and when the graph and its memory are gone.
    del captured, graph
    torch.cuda.empty_cache()
    junk = torch.full((1 << 24,), float("nan"), device="cuda")
    assert all(map(torch.equal, loss_and_gradient(*problem, fresh, 7), expected))
    del junk


def test_compiled_with_graphs_equals_eager():
    in_a_process_of_its_own(
        """
        import torch
        from dynloss_ext import Oscillation, dynamic_cross_entropy

        for rows, classes in ((20000, 10), (4096, 100), (300, 2000)):
            oscillation = Oscillation(classes, 70, 5)
            target = torch.randint(classes, (rows,), device="cuda")
            target[::7] = -100
            logits = torch.randn(rows, classes, device="cuda", requires_grad=True)
            step = torch.zeros((), dtype=torch.int64, device="cuda")

            def loss_of(logits, target, step, oscillation=oscillation):
                return dynamic_cross_entropy(logits * 2, target, oscillation, step)

            loss_of(logits, target, step)  # brings the oscillation to the device
            compiled = torch.compile(loss_of, mode="reduce-overhead", fullgraph=True, dynamic=False)
            for number in range(8):  # warmed up, recorded, replayed
                with torch.no_grad():
                    logits.normal_()
                torch.compiler.cudagraph_mark_step_begin()
                loss = compiled(logits, target, step)
                (gradient,) = torch.autograd.grad(loss, logits)
                actual = loss.detach().clone(), gradient.clone()
                loss = loss_of(logits, target, step)
                (gradient,) = torch.autograd.grad(loss, logits)
                assert torch.equal(actual[0], loss.detach()), (rows, classes, number, actual[0], loss)
                # Eager divides by the number of rows and mends that; compiled code knows the divisor.
                scale = gradient.abs().max().item()
                torch.testing.assert_close(actual[1], gradient, rtol=0, atol=1e-6 * scale)
                step += 1
        # Else nothing was captured, and this shows nothing.
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        """,
        seconds=90,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("rows", [512, 20000])
def test_replayed_graph_advances_the_oscillation(rows, probabilities, weighted):
    logits = randn(rows, 10, dtype=torch.float32).cuda().requires_grad_()
    target = (logits.detach().softmax(1) if probabilities else labels(10, rows, ignored=True)).cuda()
    weight = torch.rand(10) if weighted else None
    criterion = DynamicCrossEntropyLoss(Oscillation(10, 70, 10), weight=weight).cuda()

    def training_step():
        logits.grad = None
        loss = criterion(logits, target)
        loss.backward()
        criterion.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step()
    criterion.current_step.zero_()
    captured = logits.grad
    for step in range(30):
        graph.replay()
        expected = dynamic_cross_entropy(logits, target, criterion.oscillation, step, weight=criterion.weight)
        (gradient,) = torch.autograd.grad(expected, logits)
        assert torch.equal(loss, expected) and torch.equal(captured, gradient)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("module", [False, True])
def test_function_of_the_user_is_refused_in_a_graph(module, where):
    code = (
        "import torch, dynloss_ext as d\n"
        f"o = d.Oscillation.from_function(lambda step: torch.ones(3, device='{where}'), 3)\n"
        "x, y = torch.zeros(4, 3).cuda(), torch.zeros(4, dtype=torch.int64).cuda()\n"
        "criterion = d.DynamicCrossEntropyLoss(o).cuda()\n"
        f"loss = (lambda: criterion(x, y)) if {module} else (lambda: d.dynamic_cross_entropy(x, y, o, 3))\n"
        "loss()\n"
        "try:\n"
        "    with torch.cuda.graph(torch.cuda.CUDAGraph()): loss()\n"
        "except Exception as error: print(error)\n"
        "else: raise SystemExit('captured a constant, silently')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_waits_for_the_device():
    logits = randn(20000, 10, dtype=torch.float32).cuda().requires_grad_()
    target, step = labels(10, 20000).cuda(), torch.tensor(3, device="cuda")
    oscillation, weight = Oscillation(10, 70, 10), torch.rand(10, device="cuda")
    for given in (target, logits.detach().softmax(1)):
        dynamic_cross_entropy(logits, given, oscillation, step).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = dynamic_cross_entropy(logits, given, oscillation, step, weight=weight)
            (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
            torch.autograd.grad(gradient.sum(), logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(300, 3), (512, 10), (65536, 10), (4096, 1000), (64, 32000)], ids=str)
def test_one_launch_for_loss_and_gradient_and_one_to_scale_it(shape):
    logits = randn(*shape, dtype=torch.float32).cuda().requires_grad_()
    target = labels(shape[1], shape[0]).cuda()
    oscillation = Oscillation(shape[1], 70, 10)

    def backward():
        logits.grad = None
        dynamic_cross_entropy(logits, target, oscillation, 3).backward()

    kernels = launched_by(backward)
    ours = [name for name in kernels if "dynloss" in name]
    assert len(ours) == 2
    # Beside ours only the 1 that backward begins with.
    assert len(kernels) <= 3, kernels


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(300, 3), (128, 10), (65536, 10), (4096, 1000), (64, 32000)], ids=str)
def test_launches_of_loss_and_gradient(shape, reduction):
    logits, target = randn(*shape, dtype=torch.float32).cuda(), labels(shape[1], shape[0]).cuda()
    oscillation = Oscillation(shape[1], 70, 10)
    kernels = launched_by(lambda: loss_and_gradient(logits, target, oscillation, 3, reduction=reduction))
    assert all("dynloss" in name for name in kernels), kernels
    # Several blocks learn what a mean divides by only from each other, or from a launch before them.
    one_block = shape in ((300, 3), (128, 10))
    assert len(kernels) == 1 or (reduction == "mean" and not one_block and len(kernels) == 2), kernels
