"""Times training steps and Hessian products of the spiral network, one and a thousand members, beside all that does it.

    python tests/benchmarks/compare_ensembles.py --json FILE
    python tests/benchmarks/compare_ensembles.py --members 64 --rounds 3   # short
    python tests/benchmarks/compare_ensembles.py --device cuda --json FILE

All contenders run by turns of two calls in one process, the minimum counts: microseconds per member and step or
product. "fused" is `PerceptronEnsemble`; "autograd" the loop of the general loss, one network at a time, as that of
`spiral_mlp.py --engine autograd`; "baddbmm" all members as one batched network with our loss and torch's autograd;
"jax" a jitted scan, of one member or vmapped over them (extra `bench`). Each does the same full-batch gradient descent
on the same data, recorded once per call. The peak is that of fused multiply-adds measured here, of one thread; a step's
arithmetic is what the fused kernels need of each hidden unit at each point: 18 operations, where the matrix products of
the forward pass and of the backward pass to the weights and to the hidden layer would be 26. Last the cost of a step
against the numbers of members, hidden units and points, three decades of each. On a GPU steps alone are timed, of one
and of all members, without JAX.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine, one_line, write_json
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_examples"))

from common.spiral import SpiralMLP, spiral_data
from dynloss_ext import HessianOperator, Oscillation, PerceptronEnsemble, dynamic_cross_entropy, loss_and_gradient

AMPLITUDE, PERIOD, RATE = 70.0, 5000.0, 1.0
SIZES = {
    "M": (1, 3, 10, 30, 100, 300, 1000),
    "H": (1, 3, 10, 30, 100, 300, 1000),
    "N": (12, 30, 120, 300, 1200, 3000, 12000),
}
CLASSES, FEATURES = 3, 2

Work = Callable[[], object]


def arithmetic(samples: int, hidden: int, classes: int = CLASSES, features: int = FEATURES) -> int:
    """Floating-point operations of one step: what is linear in hidden units times points."""
    outputs = classes - 1  # the last one follows from the others
    forward, moments = 2 * (features + outputs), outputs * (1 + 2 * features)
    return samples * hidden * (forward + moments)


def ensemble(
    members: int, hidden: int, dtype: torch.dtype, samples: int = 300, device: str = "cpu"
) -> PerceptronEnsemble:
    inputs, target = spiral_data(samples // CLASSES)
    oscillation = Oscillation(CLASSES, torch.full((members,), AMPLITUDE), PERIOD)
    options: dict[str, Any] = {"hidden": hidden, "lr": RATE, "seeds": range(members), "dtype": dtype, "device": device}
    return PerceptronEnsemble(inputs, target, oscillation, **options)


class Autograd:
    """One network at a time, as the general engine trains it."""

    def __init__(self, hidden: int, dtype: torch.dtype, samples: int = 300, device: str = "cpu") -> None:
        inputs, target = spiral_data(samples // CLASSES)
        self.inputs, self.target = inputs.t().to(device, dtype).contiguous().t(), target.to(device)
        self.model = SpiralMLP.initialised("glorot-normal", FEATURES, hidden, CLASSES, 0).to(device, dtype)
        self.params: list[Tensor] = list(self.model.parameters())
        self.oscillation, self.step = Oscillation(CLASSES, AMPLITUDE, PERIOD), 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            logits = self.model(self.inputs)
            _, gradient = loss_and_gradient(logits, self.target, self.oscillation, self.step)
            gradients = torch.autograd.grad(logits, self.params, gradient)
            with torch.no_grad():
                torch._foreach_add_(self.params, gradients, alpha=-RATE)
            self.step += 1

    def hessian(self) -> HessianOperator:
        loss = dynamic_cross_entropy(self.model(self.inputs), self.target, self.oscillation, self.step)
        return HessianOperator(loss, self.params)


class Batched:
    """All members by torch.baddbmm, our loss for all, autograd."""

    def __init__(self, members: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> None:
        inputs, target = spiral_data()
        self.inputs, self.target = inputs.to(device, dtype).expand(members, -1, -1), target.to(device)
        made = ensemble(members, hidden, dtype, device=device)
        self.w1, self.b1, self.w2, self.b2 = (p.clone().requires_grad_() for p in made.parameters.values())
        self.oscillation, self.step = made.oscillation, 0

    def steps(self, count: int) -> None:
        params = [self.w1, self.b1, self.w2, self.b2]
        for _ in range(count):
            hidden = torch.baddbmm(self.b1.unsqueeze(1), self.inputs, self.w1).relu_()
            logits = torch.baddbmm(self.b2.unsqueeze(1), hidden, self.w2)
            _, gradient = loss_and_gradient(logits, self.target, self.oscillation, self.step)
            gradients = torch.autograd.grad(logits, params, gradient)
            with torch.no_grad():
                torch._foreach_add_(params, gradients, alpha=-RATE)
            self.step += 1


def jax_steps(members: int, hidden: int, dtype: torch.dtype, count: int) -> Work:
    """`count` steps of all members as one jitted scan; vmapped unless there is one."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    inputs, target = spiral_data()
    x, y = jnp.asarray(inputs.to(dtype).numpy()), jnp.asarray(target.numpy())
    made = ensemble(members, hidden, dtype)
    start = tuple(jnp.asarray(p.numpy()) for p in made.parameters.values())

    def gamma(step: Any) -> Any:
        turn, t = step // PERIOD, step % PERIOD
        g = jnp.where(
            t < PERIOD / 2, 1 + 2 * (AMPLITUDE - 1) * t / PERIOD, 2 * AMPLITUDE - 1 - 2 * (AMPLITUDE - 1) * t / PERIOD
        )
        raw = jnp.where(jnp.arange(CLASSES) == turn % CLASSES, g, 1.0)
        return (CLASSES * raw / raw.sum()).astype(x.dtype)

    def loss(params: Any, weights: Any) -> Any:
        w1, b1, w2, b2 = params
        logits = jax.nn.relu(x @ w1 + b1) @ w2 + b2
        rows = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
        return (weights[y] * rows).mean()

    def run(params: Any) -> Any:
        def one(carry: Any, step: Any) -> Any:
            gradient = jax.grad(loss)(carry, gamma(step))
            return tuple(p - RATE * g for p, g in zip(carry, gradient, strict=True)), None

        return jax.lax.scan(one, params, jnp.arange(count))[0]

    function = jax.jit(jax.vmap(run) if members > 1 else run)
    state = start if members > 1 else tuple(p[0] for p in start)
    return lambda: jax.block_until_ready(function(state))


PEAK = """
#include <chrono>
#include <cstdio>
#ifdef __AVX512F__
constexpr int bytes = 64;
#else
constexpr int bytes = 32;  // of wider vectors there would be more than registers
#endif
typedef REAL Vec __attribute__((vector_size(bytes)));
int main() {
  const long count = 20000000;
  const Vec a = Vec{} + (REAL)0.999, b = Vec{} + (REAL)1e-3;
  // They begin differently: equal ones would be computed once.
  Vec y0 = b, y1 = y0 + b, y2 = y1 + b, y3 = y2 + b, y4 = y3 + b, y5 = y4 + b, y6 = y5 + b, y7 = y6 + b, y8 = y7 + b,
      y9 = y8 + b;
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < count; ++i) {
      y0 = y0 * a + b, y1 = y1 * a + b, y2 = y2 * a + b, y3 = y3 * a + b, y4 = y4 * a + b;
      y5 = y5 * a + b, y6 = y6 * a + b, y7 = y7 * a + b, y8 = y8 * a + b, y9 = y9 * a + b;
    }
    const Vec sum = y0 + y1 + y2 + y3 + y4 + y5 + y6 + y7 + y8 + y9;
    asm volatile("" : : "m"(sum));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    const double rate = 20.0 * (bytes / sizeof(REAL)) * count / seconds.count();
    best = rate > best ? rate : best;
  }
  std::printf("%g\\n", best);
}
"""


def peak(dtype: torch.dtype) -> float:
    """Fused multiply-adds of one thread, in floating-point operations per second; NaN without a compiler."""
    real = "double" if dtype == torch.float64 else "float"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "peak.cpp"), Path(folder, "peak")
        source.write_text(PEAK)
        options = ["-O2", "-march=native", "-mprefer-vector-width=512", f"-DREAL={real}"]
        try:
            subprocess.run(["g++", *options, str(source), "-o", str(program)], check=True, capture_output=True)
            return float(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()[0])
        except (OSError, subprocess.CalledProcessError):
            return math.nan


def timed(contenders: dict[str, tuple[Work, int]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """The least microseconds per unit of each, by turns; a contender is a call and the units in it."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    least = dict.fromkeys(contenders, math.inf)
    for work, _ in contenders.values():
        work()
    wait()
    for _ in range(rounds):
        for name, (work, units) in contenders.items():
            for _ in range(2):  # the first of a turn finds the caches as the one before has left them
                began = time.perf_counter()
                work()
                wait()
                least[name] = min(least[name], (time.perf_counter() - began) / units * 1e6)
    return least


def show(title: str, times: dict[str, float], **more: Any) -> dict[str, Any]:
    print(title)
    for name, value in times.items():
        ratio = "" if name == "fused" else f"  {value / times['fused']:6.1f} times ours"
        print(f"  {name:10s} {value:10.2f} µs{ratio}")
    for name, value in more.items():
        print(f"  {name} {value:.3g}")
    sys.stdout.flush()
    return {"title": title, "microseconds": times, **more}


def one_member(hidden: int, dtype: torch.dtype, rounds: int, peak_rate: float) -> list[dict[str, Any]]:
    """A step, and a product, of one network on one thread."""
    torch.set_num_threads(1)
    fused, autograd = ensemble(1, hidden, dtype), Autograd(hidden, dtype)
    count = 200
    steps: dict[str, tuple[Work, int]] = {
        "fused": (lambda: fused.train(count, record_every=count), count),
        "autograd": (lambda: autograd.steps(count), count),
    }
    try:
        steps["jax"] = (jax_steps(1, hidden, dtype, count), count)
    except ImportError as error:
        print(f"without jax: {one_line(error)}")
    name = str(dtype).removeprefix("torch.")
    times = timed(steps, rounds)
    rate = arithmetic(300, hidden) / times["fused"] * 1e6
    results = [show(f"step of 2-{hidden}-3, 300 points, {name}, one thread", times, of_peak=rate / peak_rate)]
    fused, autograd = ensemble(1, hidden, dtype), Autograd(hidden, dtype)
    v = torch.randn(fused.num_parameters, dtype=dtype)
    ours, theirs = fused.hessian(0)._op, autograd.hessian()._op

    def products(op: Any) -> Work:
        return lambda: [op.apply(v) for _ in range(50)]

    times = timed({"fused": (products(ours), 50), "autograd": (products(theirs), 50)}, rounds)
    results.append(show(f"Hessian product of 2-{hidden}-3, 300 points, {name}, one thread", times))
    return results


def many_members(members: int, hidden: int, dtype: torch.dtype, rounds: int, threads: int) -> dict[str, Any]:
    """Steps of a thousand networks on all threads, per member."""
    torch.set_num_threads(threads)
    fused, autograd, batched = (
        ensemble(members, hidden, dtype),
        Autograd(hidden, dtype),
        Batched(members, hidden, dtype),
    )
    count = 20
    contenders: dict[str, tuple[Work, int]] = {
        "fused": (lambda: fused.train(count, record_every=count), count * members),
        "autograd": (lambda: autograd.steps(200), 200),
        "baddbmm": (lambda: batched.steps(2), 2 * members),
    }
    try:
        contenders["jax"] = (jax_steps(1, hidden, dtype, 200), 200)
        contenders["jax vmap"] = (jax_steps(members, hidden, dtype, 2), 2 * members)
    except ImportError:
        pass
    times = timed(contenders, rounds)
    name = str(dtype).removeprefix("torch.")
    title = f"{members} members of 2-{hidden}-3, 300 points, {name}, {threads} threads, per member and step"
    return show(title, times, members_times_steps_per_second=1e6 / times["fused"])


def on_device(device: str, members: int, rounds: int) -> list[dict[str, Any]]:
    """Steps of one network, and of all, there."""
    results = []
    for dtype in (torch.float64, torch.float32):
        for hidden in (100, 10):
            one, fused = (ensemble(count, hidden, dtype, device=device) for count in (1, members))
            autograd, batched = Autograd(hidden, dtype, device=device), Batched(members, hidden, dtype, device)
            contenders: dict[str, tuple[Work, int]] = {
                "fused": (_training(fused, 50), 50 * members),
                "fused, alone": (_training(one, 500), 500),
                "autograd": (lambda loop=autograd: loop.steps(50), 50),  # type: ignore[misc]
                "baddbmm": (lambda loop=batched: loop.steps(5), 5 * members),  # type: ignore[misc]
            }
            name = str(dtype).removeprefix("torch.")
            title = f"{members} members of 2-{hidden}-3, 300 points, {name}, {device}, per member and step"
            results.append(show(title, timed(contenders, rounds, device)))
    return results


def scaling(rounds: int) -> dict[str, Any]:
    """Cost of a step of one member against N and H, and of all against M: microseconds."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for name, sizes in SIZES.items():
        contenders: dict[str, tuple[Work, int]] = {}
        for size in sizes:
            made = ensemble(
                size if name == "M" else 1, size if name == "H" else 100, torch.float64, size if name == "N" else 300
            )
            count = max(2, round(20_000 / (made.num_members * made.hidden * made._target.shape[-1] / 3000)) // 10)
            contenders[str(size)] = (_training(made, count), count)
        result[name] = {int(size): value for size, value in timed(contenders, rounds).items()}
        print(f"step against {name}: " + ", ".join(f"{k}: {v:.1f} µs" for k, v in result[name].items()))
    return result


def _training(made: PerceptronEnsemble, count: int) -> Work:
    return lambda: made.train(count, record_every=count)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    results: dict[str, Any] = {"machine": machine(options.device) | {"threads": options.threads}}
    if options.device == "cpu":
        results |= on_this_cpu(options.members, options.rounds, options.threads)
    else:
        results["results"] = on_device(options.device, options.members, options.rounds)
    if options.json:
        write_json(options.json, results)
    return results


def on_this_cpu(members: int, rounds: int, threads: int) -> dict[str, Any]:
    results: dict[str, Any] = {"peak": {}, "results": []}
    for dtype in (torch.float64, torch.float32):
        rate = peak(dtype)
        results["peak"][str(dtype).removeprefix("torch.")] = rate
        print(f"peak of one thread, {dtype}: {rate / 1e9:.1f} GF/s")
        for hidden in (100, 10):
            results["results"] += one_member(hidden, dtype, rounds, rate)
            results["results"].append(many_members(members, hidden, dtype, rounds, threads))
    return results | {"scaling": scaling(rounds)}


if __name__ == "__main__":
    main()
