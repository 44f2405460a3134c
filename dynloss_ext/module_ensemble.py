"""Networks of any class, many at once: each member trained as if it were alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dynloss_ext._checks import check_count, check_member, check_params, check_seed, check_tensor
from dynloss_ext._configuration import difference
from dynloss_ext._double_backward import double_backward
from dynloss_ext._ensemble import (
    EnsembleEigenvalues,
    TrainingRecords,
    check_state,
    no_product,
    number_of_members,
    of_members,
    only_finite,
    per_member,
    start_rows,
)
from dynloss_ext._evaluation import random_state_kept
from dynloss_ext._operators import CurvatureOperator
from dynloss_ext.eigen import _check_settings, _solve
from dynloss_ext.hessian import HessianOperator, _Recorded
from dynloss_ext.loss import _checked_options, dynamic_cross_entropy
from dynloss_ext.oscillation import Oscillation

__all__ = ["ModuleEnsemble"]

Inputs = Tensor | tuple[Tensor, ...]
Tensors = dict[str, Tensor]


class ModuleEnsemble:
    """M networks of one class, any `nn.Module`, trained side by side by gradient descent on the dynamical loss.

    One forward under `torch.func.vmap` serves all members, and one fused op gives the loss of each under its own Γ.
    Members know nothing of each other: each gets the numbers of a training of its own by `torch.optim.SGD`, to
    rounding (random layers draw other numbers).

    M is the number of modules, oscillations, learning rates, momenta or weight decays, which must agree where there
    are several; single ones are shared by all members.

    Methods take a batch: ``target`` (N,), classes, or (N, C), probabilities, and ``inputs``, the tensor or the tuple of
    tensors of which the forward makes logits (N, C). It is the same for all members, or each has its own: then all
    these tensors have a leading M.

    Args:
        modules: the initial values, one network a member or one for all; copies are made. They have one structure: the
            classes, settings, modes (train or eval) and tensors of their layers agree; the forward of the first serves
            all. Parameters that require grad are trained: float32 or float64, on one device.
        oscillation: Γ, the same for all or an ensemble of M; the logits have its classes.
        lr: learning rate, a number > 0 or M of them.
        momentum: as in `torch.optim.SGD`, from 0 (none) to below 1; a number or M of them.
        weight_decay: as there, >= 0; a number or M of them.
        nesterov: as there, for all.
        normalization, ignore_index, label_smoothing: of the loss, as in `dynamic_cross_entropy`.
        vmap: False calls members one after another, for a forward that vmap refuses (recurrent layers, control flow by
            values). That is also faster where a member alone keeps the processor busy with convolutions.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError, by the first forward: vmap refuses it.

    Attributes:
        parameters: {name: (M, ...)}: the live tensors, named as by ``named_parameters()``.
        buffers: {name: (M, ...)}: likewise, such as the running statistics of BatchNorm.
        module: the network whose forward all members go through, with their values in place of its own:
            ``ensemble.module.eval()`` changes the mode of all.
        num_members, num_parameters: M, and P, the trained numbers of a member.
        step: the number of updates so far; all losses, gradients and products are at the weights Γ(step).
        finite: (M,) bool: a member whose next parameters would not be finite keeps the last finite ones, their buffers
            and velocity, and is trained no more; its records, eigenvalues and products are NaN from then on.

    Example:
        >>> networks = [nn.Linear(2, 3) for _ in range(4)]
        >>> ensemble = ModuleEnsemble(networks, Oscillation(3, amplitude=70, period=100), lr=[0.1, 0.2, 0.3, 0.4])
        >>> ensemble.train(torch.randn(30, 2), torch.arange(30) % 3, 50).loss.shape
        torch.Size([50, 4])
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module],
        oscillation: Oscillation,
        *,
        lr: float | Tensor | Sequence[float],
        momentum: float | Tensor | Sequence[float] = 0.0,
        weight_decay: float | Tensor | Sequence[float] = 0.0,
        nesterov: bool = False,
        normalization: str = "samples",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        vmap: bool = True,
    ) -> None:
        _, *options = _checked_options(oscillation, "mean", normalization, ignore_index, label_smoothing)
        names = "normalization", "ignore_index", "label_smoothing"
        self._options: dict[str, Any] = dict(zip(names, options, strict=True))
        for name, value in (("nesterov", nesterov), ("vmap", vmap)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        networks = _checked_modules(modules)
        self._settings = {
            "lr": per_member("lr", lr, open_low=True),
            "momentum": per_member("momentum", momentum, high=1),
            "weight_decay": per_member("weight_decay", weight_decay),
        }
        self.num_members = number_of_members(
            modules=None if networks[0] is modules else len(networks),
            oscillation=oscillation.ensemble_size,
            **{name: len(x) if x.dim() else None for name, x in self._settings.items()},
        )
        self._settings = {name: x.expand(self.num_members).clone() for name, x in self._settings.items()}
        if nesterov and not bool(self._settings["momentum"].all()):
            raise ValueError("nesterov: expected False where there is no momentum, got True")
        self._nesterov, self._vmap = nesterov, vmap
        self.oscillation = oscillation
        self._gamma = oscillation.expand(self.num_members)
        self._plain = Oscillation(oscillation.num_classes, torch.ones(self.num_members, device="cpu"), 1)

        self.module = copy.deepcopy(networks[0])
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        like = check_params(trained.items(), "modules")[0]
        self._shapes = {name: p.shape for name, p in trained.items()}
        self.num_parameters = sum(p.numel() for p in trained.values())
        stacked = {
            name: self._stacked([network.get_parameter(name) for network in networks])
            for name, _ in self.module.named_parameters()
        }
        self.buffers: Tensors = {
            name: self._stacked([network.get_buffer(name) for network in networks])
            for name, _ in self.module.named_buffers()
        }
        # The trained numbers of all members lie in one tensor: an update, and the look for what is not finite, are a
        # few operations for all layers. It is written in place, so that operators notice.
        self._flat = torch.cat([stacked[name].view(self.num_members, -1) for name in trained], dim=1)
        self._constants = {name: x for name, x in stacked.items() if name not in trained}
        self.parameters: Tensors = stacked | self._views(self._flat)
        self._velocity = torch.zeros_like(self._flat) if self._settings["momentum"].any() else None
        self._rates, self._momenta, self._decays = (x.to(self._flat).unsqueeze(1) for x in self._settings.values())
        self.finite = torch.ones(self.num_members, dtype=torch.bool, device=like.device)
        self.step = 0

    def _stacked(self, values: Sequence[Tensor]) -> Tensor:
        """(M, ...): a copy of one a member, or of one for all."""
        stacked = torch.stack([value.detach() for value in values])
        return stacked.expand(self.num_members, *stacked.shape[1:]).clone(memory_format=torch.contiguous_format)

    def _views(self, flat: Tensor) -> Tensors:
        """The trained parameters, (..., *shape) each, in (..., P)."""
        parts = torch.split(flat, [shape.numel() for shape in self._shapes.values()], dim=-1)
        return {
            name: part.view(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    # ---- forward

    def _batch(self, inputs: Inputs, target: Tensor) -> tuple[tuple[Tensor, ...], bool]:
        """The arguments of the forward, and whether they are of each member by itself."""
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        for x in arguments:
            check_tensor("inputs", x)
        check_tensor("target", target)
        each, members = target.dim() - target.is_floating_point(), self.num_members
        if each not in (1, 2) or (each == 2 and target.shape[0] != members):
            raise ValueError(
                f"target: expected classes (N,) or ({members}, N), or probabilities (N, C) or ({members}, N, C), got "
                f"{target.dtype} of shape {tuple(target.shape)}"
            )
        for x in arguments if each == 2 else ():
            if x.dim() == 0 or x.shape[0] != members:
                raise ValueError(
                    f"inputs: expected {members} in front, as target has a row for each member, got shape "
                    f"{tuple(x.shape)}: inputs.expand({members}, ...) are the same for all"
                )
        return arguments, each == 2

    def _call(
        self, row: Tensor, constants: Tensors, buffers: Tensors, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensors]:
        """The logits (N, C) of one member of parameters (P,), and its buffers, which are written to, as they become."""
        values = self._views(row) | constants | buffers
        logits = functional_call(self.module, values, arguments)
        if not isinstance(logits, Tensor):
            raise TypeError(f"modules: expected logits (N, C) from the forward, got {type(logits).__name__}")
        return logits, {name: values[name] for name in buffers}

    def _call_member(self, m: int, row: Tensor, arguments: tuple[Tensor, ...], own: bool) -> tuple[Tensor, Tensors]:
        """The same for member m, whose buffers stay."""
        constants = {name: x[m] for name, x in self._constants.items()}
        buffers = {name: x[m].clone() for name, x in self.buffers.items()}
        return self._call(row, constants, buffers, tuple(x[m] for x in arguments) if own else arguments)

    def _forward(self, flat: Tensor, arguments: tuple[Tensor, ...], own: bool) -> tuple[Tensor, Tensors]:
        """The logits (M, N, C) of all members of parameters (M, P), and the buffers (M, ...) as they become."""
        if not self._vmap:
            results = [self._call_member(m, row, arguments, own) for m, row in enumerate(flat.unbind())]
            logits = torch.stack([member for member, _ in results])
            return logits, {name: torch.stack([buffers[name] for _, buffers in results]) for name in self.buffers}
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        call = torch.func.vmap(self._call, in_dims=(0, 0, 0, 0 if own else None), randomness="different")
        try:
            result: tuple[Tensor, Tensors] = call(flat, self._constants, buffers, arguments)
            return result
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"modules: expected a forward that torch.func.vmap can batch, got {str(error).splitlines()[0]!r}: "
                "vmap=False calls members one after another"
            ) from error

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """F (M,) at the weights of this step."""
        return dynamic_cross_entropy(logits, target, self._gamma, self.step, **self._options)

    # ---- training

    def train(self, inputs: Inputs, target: Tensor, num_steps: int = 1, *, record_every: int = 1) -> TrainingRecords:
        """``num_steps`` updates of every member that is finite, all on these samples.

        How they are split over calls changes nothing. A row is of the same samples, in the modules' mode; the last one
        costs a forward of its own, which leaves no trace in buffers and torch's random state.

        Args:
            inputs, target: one batch, the same for all members or (M, ...), see `ModuleEnsemble`.
            num_steps: 0 or more.
            record_every: rows are taken after each update u with u % record_every == 0.

        Raises:
            TypeError, ValueError: naming the argument. RuntimeError: vmap refuses the forward.
        """
        num_steps, record_every = check_count("num_steps", num_steps, 0), check_count("record_every", record_every, 1)
        return self._records(self._train(inputs, target, num_steps, record_every))

    def train_on(self, batches: Iterable[tuple[Inputs, Tensor]], *, record_every: int = 1) -> TrainingRecords:
        """An update on each of some batches, as a `torch.utils.data.DataLoader` gives them.

        Args:
            batches: pairs of inputs and target, each as in `train`. A row is of the batch of its update.
            record_every: as there; every row costs a forward of its own.
        """
        record_every = check_count("record_every", record_every, 1)
        return self._records(row for batch in batches for row in self._train(*batch, 1, record_every))

    def _train(self, inputs: Inputs, target: Tensor, num_steps: int, record_every: int) -> list[tuple[int, Tensor]]:
        """The updates with their rows (M, 3)."""
        arguments, own = self._batch(inputs, target)
        rows: list[tuple[int, Tensor]] = []

        def record(logits: Tensor) -> None:
            """Of the last update."""
            if (self.step - 1) % record_every == 0:
                rows.append((self.step - 1, self._row(logits.detach(), target)))

        for update in range(num_steps):
            with torch.enable_grad():
                weights = self._flat.detach().requires_grad_()
                logits, buffers = self._forward(weights, arguments, own)
                (gradient,) = torch.autograd.grad(self._loss(logits, target).sum(), weights)
            if update:  # the forward that an update begins with tells of the last one
                record(logits)
            self._descend(gradient, buffers)
            self.step += 1
        if num_steps and (self.step - 1) % record_every == 0:
            with torch.no_grad(), random_state_kept(self._flat.device):
                record(self._forward(self._flat, arguments, own)[0])
        return rows

    @torch.no_grad()
    def _descend(self, gradient: Tensor, buffers: Tensors) -> None:
        """An update as in `torch.optim.SGD`, of the members whose next parameters are finite."""
        direction = gradient + self._decays * self._flat
        velocity = direction if self._velocity is None else self._momenta * self._velocity + direction
        direction = direction + self._momenta * velocity if self._nesterov else velocity
        moved = self._flat - self._rates * direction
        self.finite &= moved.isfinite().all(1)
        pairs = [(self._flat, moved), *((self.buffers[name], buffer) for name, buffer in buffers.items())]
        if self._velocity is not None:
            pairs.append((self._velocity, velocity))
        for old, new in pairs:
            old.copy_(torch.where(of_members(self.finite, old), new, old))

    @torch.no_grad()
    def _row(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weighted loss, plain loss and accuracy, (M, 3) float64, at the weights of this step."""
        plain = dynamic_cross_entropy(logits, target, self._plain, 0, **self._options)
        label = target.argmax(-1) if target.is_floating_point() else target
        counted = label.ne(self._options["ignore_index"]).expand(logits.shape[:-1])
        correct = (logits.argmax(-1) == label) & counted
        parts = self._loss(logits, target), plain, correct.sum(1, dtype=torch.float64) / counted.sum(1)
        return only_finite(torch.stack([part.double() for part in parts], dim=1), self.finite)

    def _records(self, rows: Iterable[tuple[int, Tensor]]) -> TrainingRecords:
        steps, values = [], [torch.empty(0, self.num_members, 3, dtype=torch.float64, device=self._flat.device)]
        for step, row in rows:
            steps.append(step)
            values.append(row.unsqueeze(0))
        weighted, plain, accuracy = torch.cat(values).cpu().unbind(-1)
        return TrainingRecords(torch.tensor(steps, dtype=torch.int64, device="cpu"), weighted, plain, accuracy)

    # ---- curvature

    def gradient(self, inputs: Inputs, target: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss (M,), float64, and its gradient (M, P), in the order of ``parameters``."""
        loss, gradient, _ = self._gradient(inputs, target, create_graph=False)
        return only_finite(loss.detach().double(), self.finite), only_finite(gradient, self.finite)

    def hvp(self, v: Tensor, inputs: Inputs, target: Tensor) -> Tensor:
        """The products (M, P) of every member's Hessian with its row of v (M, P).

        Raises:
            TypeError, ValueError: v has another shape, dtype or device. RuntimeError: torch cannot differentiate the
                forward twice.
        """
        flat, v = self._flat, check_tensor("v", v).detach()
        if (v.shape, v.dtype, v.device) != (flat.shape, flat.dtype, flat.device):
            raise ValueError(
                f"v: expected a tensor like the parameters, {flat.dtype} of shape {tuple(flat.shape)} on {flat.device},"
                f" got {v.dtype} of shape {tuple(v.shape)} on {v.device}"
            )
        with double_backward():
            _, gradient, weights = self._gradient(inputs, target, create_graph=True)
            (product,) = torch.autograd.grad(gradient, weights, v)
        return only_finite(product, self.finite)

    def _gradient(self, inputs: Inputs, target: Tensor, *, create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, gradients, and what they are differentiated by; buffers and torch's random state stay."""
        arguments, own = self._batch(inputs, target)
        with torch.enable_grad(), random_state_kept(self._flat.device):
            weights = self._flat.detach().requires_grad_()
            loss = self._loss(self._forward(weights, arguments, own)[0], target)
            (gradient,) = torch.autograd.grad(loss.sum(), weights, create_graph=create_graph)
        return loss, gradient, weights

    def hessian(self, member: int, inputs: Inputs, target: Tensor) -> CurvatureOperator:
        """The Hessian of one member, for `eigsh`, `EigenTracker`, `trace` and `spectral_density`, at this step.

        Args:
            member: from 0 to M - 1, or from the end.
            inputs, target: those of all members, as in `train`.

        Raises:
            IndexError: no such member. ValueError: its loss is random, as with dropout in train mode. RuntimeError,
                also by a later product: torch cannot differentiate the forward twice; the ensemble was trained.
        """
        m = check_member(member, self.num_members)
        arguments, own = self._batch(inputs, target)
        row = self._flat[m].detach().requires_grad_()
        if not self.finite[m]:
            return CurvatureOperator(_Recorded(no_product(row), (), check_params([row])), row)
        label, gamma, step = target[m] if own else target, self._gamma.member(m), self.step

        def loss() -> Tensor:
            logits, _ = self._call_member(m, row, arguments, own)
            return dynamic_cross_entropy(logits, label, gamma, step, **self._options)

        return HessianOperator(loss, [(f"member {m}", row)])

    def eigenvalues(
        self,
        k: int,
        inputs: Inputs,
        target: Tensor,
        *,
        tol: float = 1e-3,
        max_hvp: int = 1000,
        max_basis: int | None = None,
        audit: bool = True,
        seed: int = 0,
        start: EnsembleEigenvalues | None = None,
        vectors: bool = False,
    ) -> EnsembleEigenvalues:
        """The k largest eigenvalues of every member's Hessian at this step: `eigsh` for one member after another.

        Args:
            inputs, target: as in `train`.
            k, tol, max_hvp, max_basis, seed: as in `eigsh`.
            audit: look for eigenvectors beyond the found ones before convergence is claimed.
            start: an earlier result with vectors, from which the search starts: a few products where little changed.
            vectors: keep the eigenvectors.

        Raises:
            As `hessian`; TypeError, ValueError: naming the argument.
        """
        settings = _check_settings(k, "LA", tol, max_hvp, max_basis, self.num_parameters)
        rows = None if start is None else start_rows(start, self._flat, settings["max_basis"])
        seed = check_seed(seed) % 2**63
        results = []
        for m in range(self.num_members):
            operator = self.hessian(m, inputs, target)
            v0 = None if rows is None else rows[m]
            results.append(_solve(operator, operator._op, **settings, v0=v0, seed=seed, audit=bool(audit))[0])
        return EnsembleEigenvalues(
            torch.stack([result.values for result in results]),
            torch.stack([result.residuals for result in results]),
            torch.stack([result.converged for result in results]),
            torch.tensor([result.num_hvp for result in results], device="cpu"),
            torch.stack([result.vectors for result in results]) if vectors else None,
        )

    # ---- members and states

    def member(self, index: int) -> nn.Module:
        """A copy of one member, for everything else that torch does with a module."""
        m = check_member(index, self.num_members)
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            for name, x in (*module.named_parameters(), *module.named_buffers()):
                x.copy_((self.parameters if name in self.parameters else self.buffers)[name][m])
        return module

    def state_dict(self) -> dict[str, Any]:
        """Everything that an interrupted training needs to go on, but torch's random state; for ``weights_only``."""
        return {
            "configuration": self._configuration(),
            "step": self.step,
            "parameters": self._flat.clone(),
            "constants": {name: x.clone() for name, x in self._constants.items()},
            "buffers": {name: x.clone() for name, x in self.buffers.items()},
            "velocity": None if self._velocity is None else self._velocity.clone(),
            "finite": self.finite.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of an ensemble of the same configuration.

        Raises:
            TypeError, ValueError: it is no such state, or of another configuration.
        """
        names = {"configuration", "step", "parameters", "constants", "buffers", "velocity", "finite"}
        check_state(state, names, self._configuration())
        with torch.no_grad():
            for own, other in ((self._constants, state["constants"]), (self.buffers, state["buffers"])):
                for name, x in own.items():
                    x.copy_(other[name])
            self._flat.copy_(state["parameters"])
            if self._velocity is not None:
                self._velocity.copy_(state["velocity"])
            self.finite.copy_(state["finite"])
        self.step = int(state["step"])

    def _configuration(self) -> dict[str, Any]:
        return {
            "members": self.num_members,
            **{f"parameters[{name!r}]": _described(x) for name, x in self.parameters.items()},
            **{f"buffers[{name!r}]": _described(x) for name, x in self.buffers.items()},
            **{name: x.clone() for name, x in self._settings.items()},
            "nesterov": self._nesterov,
            **self._options,
            **self.oscillation.config(),
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(members={self.num_members}, module={type(self.module).__name__}, "
            f"parameters={self.num_parameters}, dtype={self._flat.dtype}, step={self.step}, "
            f"finite={int(self.finite.sum())})"
        )


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"


def _checked_modules(modules: Any) -> list[nn.Module]:
    """The networks, or the one for all, if they are of one structure."""
    networks = list(modules) if isinstance(modules, (Sequence, nn.ModuleList)) else [modules]
    if not networks:
        raise ValueError("modules: expected a network or one a member, got none")
    for network in networks:
        if not isinstance(network, nn.Module):
            raise TypeError(f"modules: expected an nn.Module or a sequence of them, got {type(network).__name__}")
        if any(nn.parameter.is_lazy(x) for x in (*network.parameters(), *network.buffers())):
            raise ValueError("modules: expected initialised parameters, got lazy ones: call the network once")
    first = _structure(networks[0])
    for m, network in enumerate(networks[1:], start=1):
        other = difference(first, _structure(network))
        if other:
            raise ValueError(f"modules[{m}]: expected the structure of modules[0], got another: {other}")
    return networks


def _structure(network: nn.Module) -> dict[str, Any]:
    """What the members of an ensemble have in common: layers and tensors by name."""
    layers: dict[str, Any] = {}
    for name, layer in network.named_modules():
        name = name or "the network"
        layers[name] = f"{type(layer).__name__}({layer.extra_repr()})"
        layers[f"mode of {name}"] = "train" if layer.training else "eval"
    tensors = {
        name: f"{_described(x)} on {x.device}, requires_grad={x.requires_grad}"
        for name, x in (*network.named_parameters(), *network.named_buffers())
    }
    return layers | tensors
