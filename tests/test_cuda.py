"""The ops on a CUDA device against the CPU's, in float64; streams, graphs, launches and bad targets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from dynloss_ext import DynamicCrossEntropyLoss, Oscillation, dynamic_cross_entropy, loss_and_gradient, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("dynloss::cross_entropy", "CUDA"),
        reason="built without CUDA kernels",
    ),
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
#: Relative to the largest entry: a few roundings of the storage type.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

#: Every regime of the kernels, with one block and with several.
SHAPES = [
    (1, 1), (31, 1), (1025, 1), (300, 3), (70000, 3), (5000, 2), (512, 10), (65536, 10), (1025, 17), (31, 31),
    (1025, 32), (31, 33), (2000, 100), (31, 257), (1025, 1000), (7, 1023), (31, 1025), (40, 32000), (3, 128256),
]  # fmt: skip


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(classes, *shape, seed=0, ignored=False):
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    if ignored:
        target.view(-1)[::5] = -100
    return target


def near(actual, expected, dtype, least=1e-30):
    """Within some roundings of the largest element expected, or of `least`, where that is smaller."""
    expected = expected.double().cpu()
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), least) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double().cpu() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype], equal_nan=True
    )


def derivatives(logits, target, oscillation, step, u, v, **options):
    """Loss, gradient by a plain backward and by create_graph, Hessian·v and third·u·v of the summed loss."""
    leaf = logits.detach().requires_grad_()
    loss = dynamic_cross_entropy(leaf, target, oscillation, step, **options)
    (plain,) = torch.autograd.grad(loss.sum(), leaf)
    loss = dynamic_cross_entropy(leaf, target, oscillation, step, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    (hessian,) = torch.autograd.grad((gradient * v).sum(), leaf, create_graph=True)
    (third,) = torch.autograd.grad((hessian * u).sum(), leaf)
    return loss.detach(), plain, gradient.detach(), hessian.detach(), third


def compare(logits, target, oscillation, step, dtype, *, place=torch.Tensor.cuda, **options):
    """The op on the device in `dtype` against the CPU in float64, at the values that `dtype` can hold.

    `place` brings logits and directions to the device.
    """
    logits = logits.to(dtype)
    u, v = (torch.randn_like(logits, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = derivatives(logits.double(), target, oscillation, step, u.double(), v.double(), **options)
    device_step = step.cuda() if isinstance(step, torch.Tensor) else step
    on_device = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    actual = derivatives(place(logits), target.cuda(), oscillation, device_step, place(u), place(v), **on_device)
    # With one class every derivative is 0, and the third what u·v - u·v leaves of its rounding.
    single = logits.dim() == 2 and logits.shape[1] == 1
    least = (u.double() * v.double()).abs().max().item() / len(logits) if single else 1e-30
    for ours, theirs in zip(actual, expected, strict=True):
        near(ours, theirs, dtype, least)


def in_a_process_of_its_own(code, seconds=120):
    """Runs code that must be the first to do something, or that could hang."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=seconds, env=environment)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_regime_equals_the_cpu(shape, dtype):
    rows, classes = shape
    compare(randn(*shape), labels(classes, rows, ignored=rows > 1), Oscillation(classes, 70, 100), 1234, dtype)


@pytest.mark.parametrize("classes", [3, 10, 40, 1100])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("normalization", ["samples", "weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [50, 2000])
def test_options_equal_the_cpu(classes, reduction, normalization, smoothing, rows):
    options = {"reduction": reduction, "normalization": normalization, "label_smoothing": smoothing}
    target = labels(classes, rows, ignored=True)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(1)).tolist()
    for oscillation in (
        Oscillation(classes, 20, 13, waveform="sine", class_order=order),
        Oscillation(classes, 20, 12, closed=True, waveform="square", stop_step=40),
        Oscillation.from_table(randn(4, classes).abs()),
    ):
        for dtype in (torch.float32, torch.float64):
            compare(randn(rows, classes), target, oscillation, 33, dtype, **options)


@pytest.mark.parametrize("classes", [3, 40, 1100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [7, 3000])
def test_ensembles_equal_the_cpu(classes, shared, rows):
    oscillation = Oscillation(classes, torch.tensor([2.0, 30.0, 70.0]), torch.tensor([5, 100, 7]))
    target = labels(classes, *([rows] if shared else [3, rows]), ignored=True)
    for step in (77, torch.tensor([3, 50, 1000])):
        for reduction in ("mean", "none"):
            compare(randn(3, rows, classes), target, oscillation, step, torch.float32, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 10, 40, 1100, 10000])
@pytest.mark.parametrize("normalization", ["samples", "weights"])
def test_weights_of_classes_equal_the_cpu(classes, normalization, dtype):
    ensemble = Oscillation(classes, torch.tensor([2.0, 30.0, 70.0]), torch.tensor([5, 100, 7]))
    target, weight = labels(classes, 70, ignored=True), randn(3, classes, seed=1, dtype=dtype).abs() + 0.1
    options = {"normalization": normalization, "label_smoothing": 0.1}
    for step in (77, torch.tensor(77)):
        compare(randn(70, classes), target, Oscillation(classes, 70, 100), step, dtype, weight=weight[0], **options)
    for own in (weight[0], weight):
        compare(randn(3, 70, classes), target, ensemble, torch.tensor([3, 50, 1000]), dtype, weight=own, **options)


@pytest.mark.parametrize("rows", [300, 20000, 600_000])
def test_weights_of_classes_add_one_launch(rows):
    logits, target, weight = randn(rows, 10, dtype=torch.float32).cuda(), labels(10, rows).cuda(), torch.rand(10).cuda()
    oscillation = Oscillation(10, 70, 10)

    def call(**options):
        return loss_and_gradient(logits, target, oscillation, 3, **options)

    plain, weighted = launched_by(call), launched_by(lambda: call(weight=weight))
    assert len(weighted) == len(plain) + 1
    assert len([name for name in weighted if "weigh_classes" in name]) == 1
    near(call(weight=torch.ones(10).cuda())[1], call()[1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_probabilities_equal_the_cpu(reduction, dtype):
    options = {"reduction": reduction, "label_smoothing": 0.1}
    ensemble = Oscillation(10, torch.tensor([2.0, 30.0, 70.0]), torch.tensor([5, 100, 7]))
    for shape, dim, oscillation, step in (
        ((300, 10), 1, Oscillation(10, 20, 13), 33),
        ((4, 10, 9), 1, Oscillation.from_table(randn(4, 10).abs()), torch.tensor(7)),
        ((3, 50, 10), 2, ensemble, torch.tensor([3, 50, 1000])),
    ):
        logits, target = randn(*shape), randn(*shape, seed=1).softmax(dim).to(dtype)
        compare(logits, target, oscillation, step, dtype, **options)
        device_step = step.cuda() if isinstance(step, torch.Tensor) else step
        pair = loss_and_gradient(logits.to(dtype).cuda(), target.cuda(), oscillation, device_step, **options)
        expected = loss_and_gradient(logits, target.double(), oscillation, step, **options)
        for ours, theirs in zip(pair, expected, strict=True):
            near(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 40])
def test_layouts_equal_the_cpu(classes, dtype):
    oscillation = Oscillation(classes, 9, 10)
    images = randn(4, classes, 9, 7)
    target = labels(classes, 4, 9, 7, ignored=True)
    compare(images, target, oscillation, 3, dtype)
    compare(images.to(memory_format=torch.channels_last), target, oscillation, 3, dtype)
    compare(images[:, :, ::2], target[:, ::2], oscillation, 3, dtype)
    rows = randn(classes, 300).t()
    compare(rows, labels(classes, 300), oscillation, 3, dtype)
    compare(randn(classes), torch.tensor(classes - 1), oscillation, 3, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("classes", [3, 10, 17, 32, 33, 100, 257, 1000, 1025, 4099, 60001])
def test_rows_that_do_not_begin_at_multiples_of_16_bytes(classes, offset, dtype):
    rows = 301 if classes < 1000 else 9

    def misaligned(x):
        storage = torch.empty(x.numel() + offset, device="cuda", dtype=dtype)
        return storage[offset:].view(x.shape).copy_(x)

    target = labels(classes, rows, ignored=True)
    compare(randn(rows, classes), target, Oscillation(classes, 9, 10), 3, dtype, place=misaligned)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_target_dtypes(dtype):
    target = labels(10, 2000)
    compare(randn(2000, 10), target.to(dtype), Oscillation(10, 70, 100), 5, torch.float32, ignore_index=3)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rows", [100, 70_000])
def test_gradient_of_a_scaled_loss_in_float16(rows, keep):
    logits, target = randn(rows, 10).half(), labels(10, rows)
    oscillation = Oscillation(10, 70, 100)
    leaf = logits.cuda().requires_grad_()
    loss = dynamic_cross_entropy(leaf, target.cuda(), oscillation, 7)
    (gradient,) = torch.autograd.grad(loss * rows, leaf, retain_graph=keep)
    _, expected = loss_and_gradient(logits.double(), target, oscillation, 7)
    near(gradient, expected * rows, torch.float16)


@pytest.mark.parametrize("rows", [40, 5000])
@pytest.mark.parametrize("keep", [False, True])
def test_all_ignored(rows, keep):
    logits = torch.full((rows, 10), float("nan"), device="cuda", requires_grad=True)
    target = torch.full((rows,), -100, device="cuda")
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss = dynamic_cross_entropy(logits, target, Oscillation(10, 70, 100), 7, reduction=reduction)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=keep)
        assert not gradient.any()


@pytest.mark.parametrize("classes", [10, 100, 1100])
@pytest.mark.parametrize("rows", [20, 3000])
def test_target_out_of_range_is_nan_and_touches_nothing_else(classes, rows):
    logits = randn(rows, classes, dtype=torch.float32).cuda().requires_grad_()
    target = labels(classes, rows).cuda()
    oscillation = Oscillation(classes, 70, 100)
    _, expected = loss_and_gradient(logits, target, oscillation, 3, reduction="sum")
    target[1], target[2] = classes, -(2**40)
    loss = dynamic_cross_entropy(logits, target, oscillation, 3, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isnan() and gradient[1:3].isnan().all()
    assert torch.equal(gradient[3:], expected[3:])
    torch.cuda.synchronize()


def test_checked_targets_raise():
    code = (
        "import torch, dynloss_ext as d\n"
        "try: d.dynamic_cross_entropy(torch.zeros(4, 3).cuda(), torch.tensor([0, 1, 3, 2]).cuda(), "
        "d.Oscillation(3, 2, 5), 0)\n"
        "except IndexError as error: assert 'got 3 at position 2' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "DYNLOSS_CHECK": "1"})


@pytest.mark.parametrize("classes", [3, 10, 40, 1100, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_in_the_place_of_the_logits(classes, dtype):
    oscillation = Oscillation(classes, 70, 100)
    target = labels(classes, 300).cuda()
    leaf = randn(300, classes, dtype=dtype).cuda().requires_grad_()
    for weight in (None, torch.rand(classes)):
        gradients = []
        for inplace in (False, True):
            criterion = DynamicCrossEntropyLoss(oscillation, weight=weight, inplace_gradient=inplace).cuda()
            leaf.grad = None
            criterion(leaf * 2, target).backward()
            gradients.append(leaf.grad)
        if dtype == torch.float16:  # rounded a second time when it is divided by the number of samples
            near(gradients[1], gradients[0], dtype)
        else:
            assert torch.equal(*gradients)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_in_the_place_of_logits_with_gaps(dtype, ignored):
    oscillation, rows = Oscillation(5, 70, 100), 70_000
    target = torch.full((rows,), -100) if ignored else labels(5, rows)
    wide = randn(rows, 8, dtype=dtype).cuda().requires_grad_()
    _, expected = loss_and_gradient(wide.detach()[:, :5].double().cpu(), target, oscillation, 0)
    output = wide * 1
    loss = DynamicCrossEntropyLoss(oscillation, inplace_gradient=True).cuda()(output[:, :5], target.cuda())
    (gradient,) = torch.autograd.grad(loss * rows, wide)
    near(gradient[:, :5], torch.zeros_like(expected) if ignored else expected * rows, dtype)
    assert not gradient[:, 5:].any()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_offsets_beyond_32_bits(classes):
    rows = 2**31 // classes + 1000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * classes + 16 * rows:
        pytest.skip("needs 17 GB of free device memory")
    logits = torch.empty(rows, classes, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.randint(classes, (rows,), device="cuda")
    oscillation = Oscillation(classes, 70, 100)
    picked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
    some = (logits[picked].double().cpu(), target[picked].cpu(), oscillation, 3)
    arguments = (logits, target, 3, None, *oscillation.on(logits.device), None, 2, False, -100, 0.0, True)
    _, gradient, weights, normalizer = torch.ops.dynloss.cross_entropy_with_gradient(*arguments)
    near(gradient[picked], reference.gradient(*some, reduction="sum"), torch.bfloat16)
    del gradient
    product = torch.ops.dynloss.cross_entropy_derivative(
        None, logits, torch.ones((), device="cuda"), logits, target, weights, normalizer, -100, 0.0
    )
    near(product[picked], reference.hvp(*some, some[0], reduction="sum"), torch.bfloat16)


# ---- streams, graphs, launches


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


def launched_by(call):
    """The names of what a call runs on the device, after one to warm up."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


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
