"""Perceptrons of one hidden layer, many at once: trained and differentiated twice by compiled code, not by autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynloss_ext import _C
from dynloss_ext._checks import check_choice, check_count, check_member, check_number, check_seed, check_tensor
from dynloss_ext._ensemble import (
    EnsembleEigenvalues,
    TrainingRecords,
    check_state,
    checked_seeds,
    no_product,
    number_of_members,
    only_finite,
    per_member,
    start_rows,
)
from dynloss_ext._operators import CurvatureOperator
from dynloss_ext.eigen import check_basis
from dynloss_ext.oscillation import Oscillation

__all__ = ["Perceptron", "PerceptronEnsemble", "perceptron_values"]

INITIALISATIONS = ("glorot-normal", "lecun-normal")

_ACTIVATIONS = {"relu": 0, "tanh": 1}
_NAMES = ("w1", "b1", "w2", "b2")
# Multiplications and additions of one call of the training op: a fraction of a second between two looks for a Ctrl-C.
_WORK_PER_CALL = 2e9
_ops = torch.ops.dynloss


class Perceptron(nn.Module):
    """A network of one hidden layer: logits = act(x @ w1 + b1) @ w2 + b2.

    Args:
        w1, b1, w2, b2: initial values, of shapes (D, H), (H,), (H, C) and (C,); copies become the parameters.
        activation: ``"relu"`` or ``"tanh"``.
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str = "relu") -> None:
        super().__init__()
        self.activation = check_choice("activation", activation, tuple(_ACTIVATIONS))
        self.w1, self.b1, self.w2, self.b2 = (nn.Parameter(x.detach().clone()) for x in (w1, b1, w2, b2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of inputs (N, D)."""
        hidden = torch.addmm(self.b1, x, self.w1)
        hidden = hidden.relu() if self.activation == "relu" else hidden.tanh()
        return torch.addmm(self.b2, hidden, self.w2)

    def extra_repr(self) -> str:
        (inputs, hidden), classes = self.w1.shape, len(self.b2)
        return f"inputs={inputs}, hidden={hidden}, classes={classes}, activation={self.activation!r}"


def perceptron_values(
    scheme: str, inputs: int, hidden: int, classes: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random initial values w1 (D, H), b1 (H,), w2 (H, C), b2 (C,) of a perceptron, float64.

    Args:
        scheme: ``"glorot-normal"``: weights of variance 2/(fan_in + fan_out), biases N(0, 1e-2);
            ``"lecun-normal"``: weights of variance 1/fan_in, biases 0. As in JAX, the normal distribution of the
            weights is cut at two standard deviations and widened to keep the variance.
        inputs, hidden, classes: D, H and C.
        seed: of the draw.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> [tuple(value.shape) for value in perceptron_values("glorot-normal", 2, 100, 3, seed=0)]
        [(2, 100), (100,), (100, 3), (3,)]
    """
    glorot = check_choice("scheme", scheme, INITIALISATIONS) == "glorot-normal"
    for name, count in (("inputs", inputs), ("hidden", hidden), ("classes", classes)):
        check_count(name, count, 1)
    generator = torch.Generator(device="cpu").manual_seed(check_seed(seed) % 2**63)
    values = []
    for fan_in, fan_out in ((inputs, hidden), (hidden, classes)):
        variance = 2 / (fan_in + fan_out) if glorot else 1 / fan_in
        deviation = variance**0.5 / 0.87962566103423978  # the standard deviation of a normal cut at ±2
        weight = torch.empty(fan_in, fan_out, dtype=torch.float64, device="cpu")
        nn.init.trunc_normal_(weight, 0, deviation, -2 * deviation, 2 * deviation, generator=generator)
        bias = torch.randn(fan_out, dtype=torch.float64, device="cpu", generator=generator) * (1e-2 if glorot else 0)
        values += [weight, bias]
    w1, b1, w2, b2 = values
    return w1, b1, w2, b2


class _State(NamedTuple):
    """Tells the parameters and data of one moment from those of another."""

    step: int
    versions: tuple[int, int, int]


class _MemberHessian:
    """What is behind the operator of a member: see `_operators.Source`."""

    params = None  # one row of the tensors of all members

    def __init__(self, ensemble: PerceptronEnsemble, op: _C.SymmetricOperator) -> None:
        self._ensemble, self._op, self.size = ensemble, op, ensemble.num_parameters
        self._state = ensemble._state()

    def operator(self) -> _C.SymmetricOperator:
        """What the driver calls, if the parameters are still those of the time when it was made."""
        if self._ensemble._state() != self._state:
            raise RuntimeError(
                f"hessian: expected the ensemble as it was at step {self._state.step}, got one that has been trained "
                "or changed since: make another operator"
            )
        return self._op

    def fail(self, error: Exception) -> None:
        """Nobody waits for a product."""

    def suspects(self) -> list[str]:
        """No layer is differentiated by autograd here."""
        return []

    def products(self) -> AbstractContextManager[object]:
        """They call no module."""
        return nullcontext()


class PerceptronEnsemble:
    """M networks of one hidden layer, trained side by side by full-batch gradient descent on the dynamical loss.

    A step of each is one pass of compiled code over its samples: forward, loss, gradient and update, without autograd;
    products with the Hessian are exact (Pearlmutter, Neural Computation 6, 1994). Members know nothing of each other:
    each gives the same bits as in an ensemble of its own, for every number of threads (`torch.set_num_threads`).

    M is the number of oscillations, learning rates, momenta, seeds, data sets or initial values, which must agree
    where there are several; single ones are shared by all members.

    Args:
        inputs: (N, D), or (M, N, D): finite numbers.
        target: (N,), or (M, N): classes, int64.
        oscillation: Γ, the same for all or an ensemble of M.
        hidden: hidden units H.
        activation: ``"relu"`` or ``"tanh"``.
        lr: learning rate, a number > 0 or M of them.
        momentum: as in `torch.optim.SGD`, from 0 (none) to below 1; a number or M of them.
        seeds: of the initial values, one a member; default 0, 1, ..., M - 1.
        init: ``"glorot-normal"`` or ``"lecun-normal"`` (`perceptron_values`), or the values themselves: a dict of w1,
            b1, w2 and b2 of shapes (D, H), (H,), (H, C), (C,), or with a leading M.
        dtype: torch.float64 or torch.float32, of the parameters and all arithmetic; sums over samples are float64.
        device: of the parameters and all arithmetic. On CUDA a block trains a member, for all steps of a call in one
            launch.

    Raises:
        TypeError, ValueError: naming the argument. IndexError: a target that is no class.

    Attributes:
        parameters: {"w1": (M, D, H), "b1": (M, H), "w2": (M, H, C), "b2": (M, C)}: the live tensors.
        step: the number of updates so far; all losses, gradients and products are at the weights Γ(step).
        finite: (M,) bool: a member whose next parameters would not be finite keeps the last finite ones and is trained
            no more; its records, eigenvalues and products are NaN from then on.

    Example:
        >>> inputs, target = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
        >>> amplitudes = torch.tensor([1.0, 70.0])
        >>> ensemble = PerceptronEnsemble(inputs, target, Oscillation(3, amplitudes, period=50), hidden=10, lr=1.0)
        >>> records = ensemble.train(200, record_every=100)
        >>> records.step, records.accuracy.shape
        (tensor([  0, 100]), torch.Size([2, 2]))
        >>> ensemble.eigenvalues(k=1).converged.all()
        tensor(True)
    """

    def __init__(
        self,
        inputs: Tensor,
        target: Tensor,
        oscillation: Oscillation,
        *,
        hidden: int,
        activation: str = "relu",
        lr: float | Tensor | Sequence[float],
        momentum: float | Tensor | Sequence[float] = 0.0,
        seeds: Sequence[int] | None = None,
        init: str | Mapping[str, Tensor] = "glorot-normal",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(oscillation, Oscillation):
            raise TypeError(f"oscillation: expected an Oscillation, got {type(oscillation).__name__}")
        if oscillation.waveform == "function":
            raise ValueError("oscillation: expected one without a Python function, got from_function: use from_table")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        device = torch.empty(0, device=device).device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, where the kernels are, got {device}")
        self.hidden = check_count("hidden", hidden, 1)
        self.activation = check_choice("activation", activation, tuple(_ACTIVATIONS))
        self.oscillation = oscillation
        self._inputs, self._target = _checked_data(inputs, target, oscillation.num_classes, dtype, device)
        rates = per_member("lr", lr, open_low=True)
        momenta = per_member("momentum", momentum, high=1)
        seeds = None if seeds is None else checked_seeds(seeds)
        values = _checked_values(init, self._shapes()) if isinstance(init, Mapping) else None
        self.num_members = number_of_members(
            inputs=self._inputs.shape[0] if self._inputs.dim() == 3 else None,
            target=self._target.shape[0] if self._target.dim() == 2 else None,
            oscillation=oscillation.ensemble_size,
            lr=len(rates) if rates.dim() else None,
            momentum=len(momenta) if momenta.dim() else None,
            seeds=None if seeds is None else len(seeds),
            init=None if values is None else next((len(x) for x, own in values.values() if own), None),
        )
        self._rates = rates.expand(self.num_members).to(device).contiguous()
        self._momenta = momenta.expand(self.num_members).to(device).contiguous()
        sizes = [shape.numel() for shape in self._shapes().values()]
        self.num_parameters = sum(sizes)
        self._flat = torch.empty(self.num_members, self.num_parameters, dtype=dtype, device=device)
        parts = zip(self._shapes().items(), torch.split(self._flat, sizes, dim=1), strict=True)
        self.parameters = {name: part.view(self.num_members, *shape) for (name, shape), part in parts}
        self._velocity = torch.zeros_like(self._flat) if bool((self._momenta != 0).any()) else None
        self.finite = torch.ones(self.num_members, dtype=torch.bool, device=device)
        self.step = 0
        if values is not None:
            for name, (value, _) in values.items():
                self.parameters[name].copy_(value)
        else:
            self._draw(check_choice("init", init, INITIALISATIONS), range(self.num_members) if seeds is None else seeds)

    def _draw(self, scheme: str, seeds: Sequence[int]) -> None:
        sizes = (self._inputs.shape[-1], self.hidden, self.oscillation.num_classes)
        for m, seed in enumerate(seeds):
            for name, value in zip(_NAMES, perceptron_values(scheme, *sizes, seed), strict=True):
                self.parameters[name][m] = value

    def _shapes(self) -> dict[str, torch.Size]:
        inputs, hidden, classes = self._inputs.shape[-1], self.hidden, self.oscillation.num_classes
        return dict(
            zip(_NAMES, map(torch.Size, ((inputs, hidden), (hidden,), (hidden, classes), (classes,))), strict=True)
        )

    def _problem(self) -> tuple[Any, ...]:
        """What every op is told after the parameters."""
        schedule = self.oscillation.on(self._flat.device)
        return self._inputs, self._target, self.hidden, _ACTIVATIONS[self.activation], self.step, *schedule

    def _state(self) -> _State:
        return _State(self.step, (self._flat._version, self._inputs._version, self._target._version))

    # ---- training

    def train(self, num_steps: int, *, record_every: int = 1) -> TrainingRecords:
        """``num_steps`` updates of every member that is finite; how they are split over calls changes no bit.

        Args:
            num_steps: 0 or more.
            record_every: rows are taken after each update u with u % record_every == 0.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        last = self.step + check_count("num_steps", num_steps, 0)
        record_every = check_count("record_every", record_every, 1)
        work = 6.0 * self.num_members * self.num_parameters * self._target.shape[-1]
        block = max(1, int(_WORK_PER_CALL / work))
        first = -(-self.step // record_every) * record_every
        rows = []
        momenta = None if self._velocity is None else self._momenta
        while self.step < last:
            steps = min(block, last - self.step)
            descent = (self._velocity, self.finite, self._rates, momenta, steps, record_every)
            with torch.no_grad():
                rows.append(_ops.perceptron_train_(self._flat, *self._problem(), *descent).cpu())
            self.step += steps
        if len(rows) != 1:  # one is the rule where every step counts
            rows = [torch.cat([torch.empty(0, self.num_members, 3, dtype=torch.float64, device="cpu"), *rows])]
        weighted, plain, accuracy = rows[0].unbind(-1)
        return TrainingRecords(
            torch.arange(first, max(first, last), record_every, device="cpu"), weighted, plain, accuracy
        )

    # ---- curvature

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The weighted loss (M,), float64, and its gradient (M, P), in the order w1, b1, w2, b2."""
        loss, gradient = _ops.perceptron_gradient(self._flat, *self._problem())
        return only_finite(loss, self.finite), only_finite(gradient, self.finite)

    def hvp(self, v: Tensor) -> Tensor:
        """The products (M, P) of every member's Hessian with its row of v (M, P).

        Raises:
            TypeError, ValueError: v has another shape, dtype or device.
        """
        product = _ops.perceptron_hvp(self._flat, *self._problem(), check_tensor("v", v).detach())
        return only_finite(product, self.finite)

    def hessian(self, member: int) -> CurvatureOperator:
        """The Hessian of one member, for `eigsh`, `EigenTracker`, `trace` and `spectral_density`, at this step.

        Raises:
            IndexError: no such member. RuntimeError, by a later product: the ensemble was trained or changed.
        """
        m = check_member(member, self.num_members)
        op: _C.SymmetricOperator
        if self.finite[m]:
            op = _C.PerceptronOperator(_C.Perceptrons(self._flat, *self._problem()), m)
        else:
            op = no_product(self._flat[m])
        return CurvatureOperator(_MemberHessian(self, op), self._flat)

    def eigenvalues(
        self,
        k: int = 1,
        *,
        tol: float = 1e-3,
        max_hvp: int = 1000,
        max_basis: int | None = None,
        audit: bool = True,
        seed: int = 0,
        start: EnsembleEigenvalues | None = None,
        vectors: bool = False,
    ) -> EnsembleEigenvalues:
        """The k largest eigenvalues of every member's Hessian at this step: `eigsh` without Python between products.

        Args:
            k, tol, max_hvp, max_basis, seed: as in `eigsh`.
            audit: look for eigenvectors beyond the found ones before convergence is claimed.
            start: an earlier result with vectors, from which the search starts: a few products where little changed.
            vectors: keep the eigenvectors.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        k = check_count("k", k, 1, self.num_parameters, "the number of parameters")
        max_basis = check_basis(max_basis, k, self.num_parameters)
        rows = None if start is None else start_rows(start, self._flat, max_basis)
        values, residuals, converged, num_hvp, found = _C.perceptron_eigenvalues(
            _C.Perceptrons(self._flat, *self._problem()),
            wanted=self.finite.tolist(),
            k=k,
            tol=check_number("tol", tol, 0, 1),
            start=rows,
            max_hvp=check_count("max_hvp", max_hvp, k),
            max_basis=max_basis,
            seed=check_seed(seed) % 2**63,
            audit=bool(audit),
        )
        return EnsembleEigenvalues(values, residuals, converged, num_hvp, found.mT if vectors else None)

    # ---- members and states

    def member(self, index: int) -> Perceptron:
        """A copy of one member, for everything else that torch does with a module."""
        m = check_member(index, self.num_members)
        return Perceptron(*(self.parameters[name][m] for name in _NAMES), activation=self.activation)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an interrupted training needs to go on bit for bit; loadable with ``weights_only``."""
        return {
            "configuration": self._configuration(),
            "step": self.step,
            "parameters": self._flat.clone(),
            "velocity": None if self._velocity is None else self._velocity.clone(),
            "finite": self.finite.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of an ensemble of the same configuration on the same data, which are not kept.

        Raises:
            TypeError, ValueError: it is no such state, or of another configuration.
        """
        check_state(state, {"configuration", "step", "parameters", "velocity", "finite"}, self._configuration())
        self._flat.copy_(state["parameters"])
        if self._velocity is not None:
            self._velocity.copy_(state["velocity"])
        self.finite.copy_(state["finite"])
        self.step = int(state["step"])

    def _configuration(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden,
            "activation": self.activation,
            "dtype": str(self._flat.dtype).removeprefix("torch."),
            "members": self.num_members,
            "inputs": list(self._inputs.shape),
            "lr": self._rates.clone(),
            "momentum": self._momenta.clone(),
            **self.oscillation.config(),
        }

    def __repr__(self) -> str:
        shape = f"{self._inputs.shape[-1]}-{self.hidden}-{self.oscillation.num_classes}"
        return (
            f"{type(self).__name__}(members={self.num_members}, shape={shape}, activation={self.activation!r}, "
            f"dtype={self._flat.dtype}, step={self.step}, finite={int(self.finite.sum())})"
        )


def _checked_data(
    inputs: Tensor, target: Tensor, classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    check_tensor("inputs", inputs)
    check_tensor("target", target)
    if inputs.dim() not in (2, 3) or inputs.numel() == 0 or not inputs.is_floating_point():
        raise ValueError(
            "inputs: expected floating-point numbers of shape (N, D) or (M, N, D), no dimension 0, got "
            f"{inputs.dtype} of shape {tuple(inputs.shape)}"
        )
    if target.dim() not in (1, 2) or target.shape[-1] != inputs.shape[-2] or target.dtype != torch.int64:
        raise ValueError(
            f"target: expected int64 of shape ({inputs.shape[-2]},) or (M, {inputs.shape[-2]}), got {target.dtype} of "
            f"shape {tuple(target.shape)}"
        )
    if bool(((target < 0) | (target >= classes)).any()):
        raise IndexError(
            f"target: expected classes from 0 to {classes - 1}, got {target.min().item()} to {target.max().item()}"
        )
    inputs = inputs.detach().to(device, dtype)
    if not bool(inputs.isfinite().all()):
        raise ValueError("inputs: expected finite numbers, got others")
    return inputs.clone(), target.detach().to(device).clone()


def _checked_values(init: Mapping[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, tuple[Tensor, bool]]:
    """The values by name, and whether they are of each member by itself."""
    if init.keys() != shapes.keys():
        raise ValueError(f"init: expected a dict of {', '.join(shapes)}, got {', '.join(map(str, init))}")
    values = {}
    for name, shape in shapes.items():
        value = check_tensor(f"init[{name!r}]", init[name]).detach()
        if value.shape not in (shape, value.shape[:1] + shape) or not value.is_floating_point():
            raise ValueError(
                f"init[{name!r}]: expected floating-point numbers of shape {tuple(shape)} or (M, "
                f"{', '.join(map(str, shape))}), got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"init[{name!r}]: expected finite numbers, got others")
        values[name] = (value, value.shape != shape)
    return values
