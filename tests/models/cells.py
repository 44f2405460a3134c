"""One cell of the table: a model and something that measures its curvature; right, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from curvature_problems import hessian_by_differences
from torch import Tensor

from dynloss_ext import (
    ConvergenceWarning,
    EigenTracker,
    GaussNewtonOperator,
    HessianOperator,
    eigsh,
    ntk_eigenvalues,
    spectral_density,
)
from models.zoo import CASES, Case, make


class Refused(Exception):
    """What was asked for is refused, by this message."""


def parameters(case: Case) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in case.model.named_parameters() if p.requires_grad]


def hessian(case: Case) -> HessianOperator:
    if case.batches:
        rows = torch.arange(len(case.inputs)).split(2)

        def loss_and_count(batch: Tensor) -> tuple[Tensor, int]:
            return case.criterion(case.outputs(batch), case.target[batch]) * len(batch), len(batch)

        return HessianOperator.from_batches(loss_and_count, parameters(case), rows)
    return HessianOperator(case.loss() if case.as_tensor else case.loss, parameters(case))


def gauss_newton(case: Case) -> GaussNewtonOperator:
    if case.as_tensor:
        outputs = case.outputs()
        return GaussNewtonOperator(case.criterion(outputs, case.target), outputs, parameters(case))

    def closure(rows: Tensor) -> tuple[Tensor, Tensor, int]:
        with case.context():
            outputs = case.outputs(rows)
            return case.criterion(outputs, case.target[rows]) * len(rows), outputs, len(rows)

    everything = torch.arange(len(case.inputs))
    return GaussNewtonOperator.from_batches(
        closure, parameters(case), everything.split(2 if case.batches else len(everything))
    )


class Reference:
    """The case in float64, evaluated plainly: no second derivative of torch's, and nothing of this package."""

    def __init__(self, name: str) -> None:
        case = self.case = make(name)
        self.model = case.plain(case.model.double())
        self.inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = [(b, b.clone()) for b in self.model.buffers()]

    def outputs(self) -> Tensor:
        with torch.no_grad():
            for buffer, values in self.buffers:
                buffer.copy_(values)
        with torch.random.fork_rng():
            if self.case.seed is not None:
                torch.manual_seed(self.case.seed)
            return self.model(self.inputs)

    def hessian(self, step: float | None = None, order: int = 2) -> Tensor:
        return hessian_by_differences(
            lambda: self.case.criterion(self.outputs(), self.case.target), self.params, step or self.case.step, order
        )

    def jacobian(self) -> Tensor:
        """(number of outputs, P)."""
        outputs = self.outputs().reshape(-1)
        rows = [torch.autograd.grad(z, self.params, retain_graph=True, materialize_grads=True) for z in outputs]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])

    def gauss_newton(self) -> Tensor:
        outputs = self.outputs().detach().requires_grad_()
        curvature = hessian_by_differences(lambda: self.case.criterion(outputs, self.case.target), [outputs])
        jacobian = self.jacobian()
        return jacobian.T @ curvature @ jacobian

    def ntk(self) -> Tensor:
        jacobian = self.jacobian().reshape(*self.outputs().shape, -1)
        return torch.einsum("icp,jcp->ij", jacobian, jacobian) / jacobian.shape[1]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def of_eigsh(case: Case, reference: Reference) -> float:
    H, expected = hessian(case), reference.hessian()
    result = eigsh(H, 2, tol=case.tolerance / 100)
    if result.status == "not symmetric":
        raise Refused(result.status)
    return max(relative(H.to_dense(), expected), relative(result.values, torch.linalg.eigvalsh(expected).flip(0)[:2]))


def of_tracker(case: Case, reference: Reference) -> float:
    """Several updates, the later ones from one old eigenvector: each right, or each refused."""
    trackers = [EigenTracker(k=k, tol=case.tolerance / 100) for k in (1, 2)]
    results = [tracker.update(hessian(case)) for tracker in trackers for _ in range(3)]
    statuses = [result.status for result in results]
    if "not symmetric" in statuses:
        assert set(statuses) == {"not symmetric"}
        raise Refused("not symmetric")
    expected = torch.linalg.eigvalsh(reference.hessian()).flip(0)
    return max(relative(result.values, expected[: len(result.values)]) for result in results)


def of_density(case: Case, reference: Reference) -> float:
    """With as many steps as parameters, the outermost nodes are the outermost eigenvalues."""
    H = hessian(case)
    nodes = spectral_density(H, num_steps=H.shape[0], num_probes=1).nodes
    values = torch.linalg.eigvalsh(reference.hessian())
    return relative(torch.stack([nodes.min(), nodes.max()]), values[[0, -1]])


def of_differences(case: Case, reference: Reference) -> tuple[float, float]:
    """The error of the matrix, and what the operator says that it is."""
    if case.batches:

        def loss_and_count(batch: Tensor) -> tuple[Tensor, int]:
            return case.criterion(case.outputs(batch), case.target[batch]) * len(batch), len(batch)

        H = HessianOperator.from_gradients(loss_and_count, parameters(case), torch.arange(len(case.inputs)).split(2))
    else:
        H = HessianOperator.from_gradients(case.loss, parameters(case))
    result = eigsh(H, 2, tol=case.tolerance)
    if result.status == "not symmetric":
        raise Refused(result.status)
    exact = case.tolerance == Case.tolerance
    if exact and "Hessian" not in case.refusals and "all" not in case.refusals:
        expected = hessian(case).to_dense()
    else:  # of a smooth one to twelve digits
        expected = reference.hessian(1e-3, order=6) if exact else reference.hessian()
    values, size = torch.linalg.eigvalsh(expected).flip(0)[:2], float(torch.linalg.matrix_norm(expected, 2))
    assert ((result.values - values).abs() <= result.residuals + case.tolerance * values.abs().max()).all()
    error = float((H.to_dense() - expected).norm(dim=0).max())
    assert not exact or error <= 4 * H.noise, f"error {error:.2g}, noise {H.noise:.2g}"
    return error / size, H.noise / size


def of_gauss_newton(case: Case, reference: Reference) -> float:
    return relative(gauss_newton(case).to_dense(), reference.gauss_newton())


def of_ntk(case: Case, reference: Reference) -> float:
    found = ntk_eigenvalues(case.model, case.inputs, 2)
    return relative(found, torch.linalg.eigvalsh(reference.ntk()).flip(0)[:2])


DIFFERENCES = "by differences"

# What is measured: the error, and of differences the noise.
MEASURES: dict[str, Callable[[Case, Reference], float | tuple[float, float]]] = {
    "Hessian": of_eigsh,
    DIFFERENCES: of_differences,
    "Gauss-Newton": of_gauss_newton,
    "tracker": of_tracker,
    "density": of_density,
    "NTK": of_ntk,
}


# Warnings, and the cases that they are right for; none: any. Others of this package's are errors.
EXPECTED: dict[str, tuple[str, ...]] = {
    "EigenTracker.update stopped by not symmetric|eigsh stopped by not symmetric": (
        "weight_norm",
        "weight_norm, the old one",
        "spectral_norm in train mode",
    ),
    "EigenTracker.update stopped by noise floor|eigsh stopped by noise floor": ("bfloat16 autocast",),
    "None of the inputs have requires_grad=True": ("checkpoint, reentrant",),
    "There is a performance drop because we have not yet implemented the batching rule": (),
}


def cell(name: str, measure: str) -> str:
    """``right``, with error and noise of differences, or the message by which it is refused.

    Raises:
        AssertionError: wrong, or refused where it should not be, or the other way round, or in other words.
        Warning: one of this package's that the case does not expect.
        ImportError: the model is of a package that is not there.
    """
    case = make(name)
    of_all = None if measure in ("NTK", DIFFERENCES) else case.refusals.get("all")
    expected = case.refusals.get(measure, of_all)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=ConvergenceWarning)
        warnings.filterwarnings("error", "loss: |no gradient of the loss")
        for message, names in EXPECTED.items():
            if name in (names or CASES):
                warnings.filterwarnings("ignore", message)
        try:
            found = MEASURES[measure](case, Reference(name))
        except (Refused, ValueError, RuntimeError, TypeError) as refusal:
            assert expected is not None, f"refused: {refusal}"
            assert expected in str(refusal), f"refused by another message: {refusal}"
            return f"refused: {refusal}"
    error, noise = found if isinstance(found, tuple) else (found, None)
    assert expected is None, f"not refused: relative error {error:.2g}"
    if noise is None:
        assert error <= case.tolerance, f"relative error {error:.2g}"
        return "right"
    assert error <= max(case.tolerance, 2 * noise), f"relative error {error:.2g}, noise {noise:.2g}"
    return f"{'right' if error <= case.tolerance else 'noise'} {error:.0e} ({noise:.0e})"
