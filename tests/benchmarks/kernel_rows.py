"""What the CUDA kernels are measured at: shapes and variants, the bytes each must move, inputs, calls and checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from loss_contenders import AMPLITUDE, PERIOD, Case
from torch import Tensor

import dynloss_ext
from dynloss_ext import reference

STEP, IGNORED_EVERY, MEMBERS, SMOOTHING = 1234, 5, 4, 0.1

#: Options of the public functions by variant. A sum is one launch of one kernel, with nothing left to divide.
VARIANTS: dict[str, dict[str, object]] = {
    "sum": {"reduction": "sum"},
    "mean": {},
    "ignored": {},
    "smoothing": {"label_smoothing": SMOOTHING},
    "weights": {"normalization": "weights"},
    "ensemble": {},
    "hessian": {},
    "loss": {},
}

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

#: ‖out - exact‖ / ‖exact‖ of a gradient or product: a few roundings of the dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 4e-3}
LOSS_TOLERANCE = 1e-5

# ---- the rows


@dataclass(frozen=True)
class Row(Case):
    """A variant of the loss at logits (samples, classes), those of all members of an ensemble together."""

    variant: str = "sum"

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.variant}"

    @property
    def members(self) -> int:
        return MEMBERS if self.variant == "ensemble" else 1

    @property
    def moved(self) -> int:
        """The fewest bytes: what counts of every input read once, every output written once; labels are int64."""
        counted = self.samples
        if self.variant == "ignored":
            counted -= (self.samples + IGNORED_EVERY - 1) // IGNORED_EVERY
        tensors_read = 2 if self.variant == "hessian" else 1
        written = 0 if self.variant == "loss" else self.bytes
        return tensors_read * counted * self.classes * self.dtype.itemsize + written + 8 * self.samples

    def shrunk(self) -> Row:
        """A small one of the same kind, for a rehearsal."""
        return Row(min(self.samples, 40), min(self.classes, 50), self.dtype, self.variant)


CLASSES = (3, 10, 32, 33, 64, 100, 128, 1000, 1025, 2000, 4096, 32000, 128256)
LOGITS_BYTES = 256 << 20
#: (samples, classes) that the kernels were designed for.
DESIGN = ((512, 10), (65536, 10), (4096, 1000), (8192, 32000), (4096, 128256))
#: One shape for each of the kernels: a thread, a warp, a block per row.
REGIMES = (
    Case(65536 * 16, 10, torch.float32),
    Case(65536, 1000, torch.float32),
    Case(8192, 32000, torch.bfloat16),
)


def table_rows() -> list[Row]:
    """The most telling first."""
    dtypes = (torch.float32, torch.bfloat16)
    rows = [Row(*shape, dtype, variant) for variant in ("sum", "mean") for shape in DESIGN for dtype in dtypes]
    for classes in CLASSES:
        rows += [Row(LOGITS_BYTES // (classes * dtype.itemsize), classes, dtype) for dtype in dtypes]
    for variant in VARIANTS:
        rows += [Row(case.samples, case.classes, case.dtype, variant) for case in REGIMES]
    return list(dict.fromkeys(rows))


def parse_shape(text: str) -> Case:
    """ROWSxCLASSES:DTYPE."""
    shape, _, dtype = text.partition(":")
    samples, _, classes = shape.partition("x")
    if not (samples.isdecimal() and classes.isdecimal() and int(samples) and int(classes)) or dtype not in DTYPES:
        raise ValueError(f"--only: expected ROWSxCLASSES:DTYPE with a dtype of {sorted(DTYPES)}, got {text!r}")
    return Case(int(samples), int(classes), DTYPES[dtype])


def select(rows: list[Row], shapes: list[Case]) -> list[Row]:
    """The rows of these shapes; of a shape that none has, its sum."""
    if not shapes:
        return rows
    chosen = []
    for case in shapes:
        key = (case.samples, case.classes, case.dtype)
        chosen += [row for row in rows if (row.samples, row.classes, row.dtype) == key] or [Row(*key)]
    return list(dict.fromkeys(chosen))


# ---- inputs, calls, checks


@dataclass
class Result:
    """Of one call; None where the variant does not give it."""

    loss: Tensor | None
    derivative: Tensor | None


def several(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """`count` random tensors side by side in memory, each at a multiple of 512 bytes."""
    size = math.prod(shape)
    distance = (size + 511) // 512 * 512
    values = torch.empty(count, distance, device=device, dtype=dtype).normal_()
    return [values[i, :size].view(shape) for i in range(count)]


class Inputs:
    """`sets` problems of one row; call(i) computes problem i."""

    def __init__(self, row: Row, sets: int, device: str) -> None:
        torch.manual_seed(0)
        self.row = row
        self.options = VARIANTS[row.variant]
        lead = (row.members, row.samples // row.members) if row.members > 1 else (row.samples,)
        amplitude = torch.linspace(2, AMPLITUDE, row.members) if row.members > 1 else AMPLITUDE
        self.oscillation = dynloss_ext.Oscillation(row.classes, amplitude, PERIOD)
        self.logits = several(sets, (*lead, row.classes), row.dtype, device)
        self.target = list(torch.randint(row.classes, (sets, *lead), device=device))
        if row.variant == "ignored":
            for target in self.target:
                target[::IGNORED_EVERY] = -100
        self.v = several(sets, (*lead, row.classes), row.dtype, device) if row.variant == "hessian" else []
        self._schedule = self.oscillation.on(self.logits[0].device)
        self._one = torch.ones((), device=device)
        if row.variant == "hessian":
            _, self._weights, self._normalizer = torch.ops.dynloss.cross_entropy(*self._arguments(0))

    def _arguments(self, i: int) -> tuple[object, ...]:
        """Of the ops, for a sum."""
        return (self.logits[i], self.target[i], STEP, None, *self._schedule, None, 2, False, -100, 0.0)

    def call(self, i: int) -> Result:
        logits, target = self.logits[i], self.target[i]
        if self.row.variant == "sum":  # the op itself: whatever surrounds it, one launch
            return Result(*torch.ops.dynloss.cross_entropy_with_gradient(*self._arguments(i), True)[:2])
        if self.row.variant == "hessian":
            product = torch.ops.dynloss.cross_entropy_derivative(
                None, self.v[i], self._one, logits, target, self._weights, self._normalizer, -100, 0.0
            )
            return Result(None, product)
        if self.row.variant == "loss":
            return Result(dynloss_ext.dynamic_cross_entropy(logits, target, self.oscillation, STEP), None)
        return Result(*dynloss_ext.loss_and_gradient(logits, target, self.oscillation, STEP, **self.options))

    def calls(self) -> list[Callable[[], Result]]:
        return [lambda i=i: self.call(i) for i in range(len(self.logits))]

    # ---- float64

    def _divisor(self, i: int, gamma: Tensor) -> Tensor:
        """What a mean divides by: () or (members,), float64 on the CPU."""
        target = self.target[i].cpu()
        counted = target != -100
        if self.row.variant in ("sum", "hessian"):
            return torch.ones(target.shape[:-1], dtype=torch.float64)
        if self.row.variant != "weights":
            return counted.sum(-1).double()
        return torch.where(counted, gamma[target.clamp(min=0)], 0.0).sum(-1)

    def exact_loss(self, i: int) -> Tensor:
        """By PyTorch in float64, some rows at a time: () or (members,), on the CPU."""
        gammas = self.oscillation.weights(STEP)
        smoothing = SMOOTHING if self.row.variant == "smoothing" else 0.0
        ensemble = self.row.members > 1
        losses = []
        for e in range(self.row.members):
            gamma = gammas[e] if ensemble else gammas
            logits, target = (x[e] if ensemble else x for x in (self.logits[i], self.target[i]))
            total, rows = 0.0, max(1, (1 << 24) // self.row.classes)
            for z, y in zip(logits.split(rows), target.split(rows), strict=True):
                weight = gamma.to(z.device)
                total += F.cross_entropy(z.double(), y, weight, reduction="sum", label_smoothing=smoothing).item()
            losses.append(total)
        divisor = self._divisor(i, gammas)
        return torch.tensor(losses if ensemble else losses[0], dtype=torch.float64) / divisor

    def derivative_error(self, i: int, derivative: Tensor) -> float:
        """Of some rows against the definition in float64; NaN if an element was left unwritten, or is infinite."""
        if derivative.shape != self.logits[i].shape or not bool(derivative.isfinite().all()):
            return math.nan
        rows = self.logits[i].shape[-2]
        picked = torch.unique(torch.cat([torch.tensor([0, rows - 1]), torch.randint(rows, (62,))]))

        def sample(x: Tensor, dim: int) -> Tensor:
            return x.index_select(dim, picked.to(x.device)).cpu()

        z, out = sample(self.logits[i], -2).double(), sample(derivative, -2).double()
        target = sample(self.target[i], -1)
        options = {"reduction": "sum"}
        if self.row.variant == "smoothing":
            options["label_smoothing"] = SMOOTHING
        if self.row.variant == "hessian":
            v = sample(self.v[i], -2).double()
            exact = reference.hvp(z, target, self.oscillation, STEP, v, **options)
        else:
            exact = reference.gradient(z, target, self.oscillation, STEP, **options)
        exact = exact / self._divisor(i, self.oscillation.weights(STEP))[..., None, None]
        return ((out - exact).norm() / exact.norm()).item()

    def errors(self, results: list[Result]) -> dict[str, float | bool]:
        """The worst over the sets that are looked at, and whether all are small: NaN never is."""
        report: dict[str, float | bool] = {}
        ok = True
        looked_at = sorted({0, len(results) - 1})
        for name, tolerance in (("derivative", TOLERANCES[self.row.dtype]), ("loss", LOSS_TOLERANCE)):
            errors = []
            for i in looked_at:
                value = getattr(results[i], name)
                if value is None:
                    continue
                if name == "derivative":
                    errors.append(self.derivative_error(i, value))
                else:
                    exact = self.exact_loss(i)
                    errors.append(((value.double().cpu() - exact).norm() / exact.norm()).item())
            if errors:
                report[f"{name}_error"] = math.nan if any(map(math.isnan, errors)) else max(errors)
                ok &= all(error <= tolerance for error in errors)
        return report | {"ok": ok}
