"""The dynamical cross-entropy: one fused op for Γ(step), loss and gradient, differentiable to the third order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynloss_ext import _C
from dynloss_ext._checks import check_choice, check_step, check_tensor, plain_number
from dynloss_ext._configuration import Configuration, difference, pack, unpack
from dynloss_ext._vmap import class_dim
from dynloss_ext.oscillation import Oscillation

__all__ = ["DynamicCrossEntropyLoss", "dynamic_cross_entropy", "loss_and_gradient"]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NORMALIZATIONS = {"samples": False, "weights": True}
_ops = torch.ops.dynloss


def _checked_options(
    oscillation: Oscillation, reduction: str, normalization: str, ignore_index: int, label_smoothing: float
) -> tuple[str, str, int, float]:
    """The options as Python's own numbers."""
    if not isinstance(oscillation, Oscillation):
        raise TypeError(f"oscillation: expected an Oscillation, got {type(oscillation).__name__}")
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    check_choice("normalization", normalization, tuple(_NORMALIZATIONS))
    ignore_index, label_smoothing = plain_number(ignore_index), plain_number(label_smoothing)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignore_index}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: expected a number, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    return reduction, normalization, ignore_index, label_smoothing


def _checked_weight(weight: Tensor | None, oscillation: Oscillation) -> Tensor | None:
    """A float64 copy of weights of classes that are the module's own."""
    if weight is None:
        return None
    check_tensor("weight", weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point dtype, got {weight.dtype}")
    classes, members = oscillation.num_classes, oscillation.ensemble_size
    if weight.shape not in ((classes,), (members, classes)):
        expected = f"({classes},)" if members is None else f"({classes},) or ({members}, {classes})"
        raise ValueError(f"weight: expected shape {expected}, got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight: expected a constant, got a tensor that requires grad")
    return weight.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _checked_class_dim(logits: Tensor, oscillation: Oscillation) -> int:
    """The dimension of the classes in the logits, which have as many as the oscillation."""
    dim = class_dim(check_tensor("logits", logits).dim(), oscillation.ensemble_size is not None)
    if logits.dim() > dim and logits.shape[dim] != oscillation.num_classes:
        raise ValueError(
            f"logits: expected {oscillation.num_classes} classes, those of the oscillation, in dimension {dim}, "
            f"got shape {tuple(logits.shape)}"
        )
    return dim


def _arguments(
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    weight: Tensor | None,
    *options: Any,
) -> tuple[Any, ...]:
    """The arguments of the forward ops; what is not a tensor is checked here, tensors in csrc/arguments.cpp."""
    reduction, normalization, ignore_index, label_smoothing = _checked_options(oscillation, *options)
    _checked_class_dim(logits, oscillation)
    check_tensor("target", target)
    if weight is not None:
        check_tensor("weight", weight)
    clock, class_order, table = oscillation.on(logits.device)
    offset, step_tensor = 0, None
    step = plain_number(step)
    if isinstance(step, Tensor):
        step_tensor = step
    elif isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
        raise TypeError(f"step: expected an int or an int64 tensor, got {type(step).__name__}")
    else:
        if not torch.compiler.is_compiling():  # there a comparison would restrict the graph
            check_step("step", step)
        offset = step
    if oscillation.waveform == "function":
        if torch.compiler.is_compiling() or not isinstance(step, int):
            raise RuntimeError(
                "oscillation: from_function calls Python at every step, which works in eager mode with an int step "
                "only; use Oscillation.from_table"
            )
        # As the one row of a table at its first step: before that Γ = 1.
        table, offset = oscillation.evaluate_function(step).to(logits.device)[None], 0
    return (
        logits,
        target,
        offset,
        step_tensor,
        clock,
        class_order,
        table,
        weight,
        _REDUCTIONS[reduction],
        _NORMALIZATIONS[normalization],
        ignore_index,
        label_smoothing,
    )


# ---- targets of probabilities: a composite of torch's own ops, differentiable as they are


def _are_probabilities(target: object) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point()


def _class_weights(
    op: Any, zero: Tensor, oscillation: Oscillation, step: int | Tensor, weight: Tensor | None, *finished: bool
) -> Tensor:
    """Γ · weight, float64 (C,) or (E, 1, C): what an op hands out beside the loss of a row of zeros."""
    members = [] if oscillation.ensemble_size is None else [oscillation.ensemble_size]
    row = zero.expand(*members, 1, oscillation.num_classes)
    label = torch.zeros(1, dtype=torch.int64, device=zero.device)
    *_, gamma, _ = op(*_arguments(row, label, oscillation, step, weight, "sum", "samples", -100, 0.0), *finished)
    return gamma.unsqueeze(1) if members else gamma  # type: ignore[no-any-return]


def _check_probabilities(logits: Tensor, target: Tensor, oscillation: Oscillation, options: tuple[Any, ...]) -> None:
    _, normalization, ignore_index, _ = options
    members, shape = oscillation.ensemble_size, tuple(logits.shape)
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point dtype, got {logits.dtype}")
    if logits.dim() == 0 or (members is not None and (logits.dim() != 3 or logits.shape[0] != members)):
        expected = "(C,), (N, C) or (N, C, d1, ...)" if members is None else f"({members}, N, C)"
        raise ValueError(f"logits: expected shape {expected}, got {shape}")
    if target.shape != logits.shape and (members is None or target.shape != logits.shape[1:]):
        raise TypeError(
            f"target: expected class indices, or probabilities of the logits' shape {shape}, got {target.dtype} of "
            f"shape {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(f"target: expected device {logits.device}, got {target.device}")
    if normalization != "samples":
        raise ValueError(f"normalization: expected 'samples' with probabilities as target, got {normalization!r}")
    if ignore_index != -100:
        raise ValueError(f"ignore_index: expected -100 (none) with probabilities as target, got {ignore_index}")


def _of_probabilities(
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    weight: Tensor | None,
    *options: Any,
    constants: bool,
) -> tuple[Tensor, ...]:
    """The loss, or as ``constants`` the loss and its gradient."""
    reduction, _, _, smoothing = options = _checked_options(oscillation, *options)
    dim = _checked_class_dim(logits, oscillation)
    _check_probabilities(logits, target, oscillation, options)
    if constants:  # the op refuses what would differentiate them: this 0 is differentiated if the logits are
        zero = logits.flatten()[:0].sum()
        weights = _class_weights(_ops.cross_entropy_with_gradient, zero, oscillation, step, weight, True)
        logits, target = logits.detach(), target.detach()
    else:
        zero = torch.zeros((), device=logits.device)
        weights = _class_weights(_ops.cross_entropy, zero, oscillation, step, weight)
    log_p = logits.movedim(dim, -1).log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    q = target.movedim(dim if target.dim() == logits.dim() else -1, -1).to(log_p.dtype)
    q = (q * (1 - smoothing) + smoothing / oscillation.num_classes) * weights.to(log_p.dtype)
    rows = -(q * log_p).sum(-1)
    flat = rows.flatten(0 if oscillation.ensemble_size is None else 1)
    count = flat.shape[-1] if reduction == "mean" else 1
    summed = flat.sum(-1, dtype=torch.float64).to(rows.dtype) / count
    loss = rows.to(logits.dtype) if reduction == "none" else summed
    if not constants:
        return (loss,)
    gradient = (q.sum(-1, keepdim=True) * log_p.exp() - q) / count
    return loss, gradient.movedim(-1, dim).to(logits.dtype)


def dynamic_cross_entropy(
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalization: str = "samples",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy with the class weights of ``oscillation`` at ``step``.

    F(s) = (1/P) Σ_j Γ_{y_j}(s) · CE(logits_j, y_j), Eq. 1 of "Tilting the playing field" (ICML 2021). Γ is evaluated
    inside the op; without a need for gradients only the loss is computed, otherwise the gradient comes with it in
    the same pass. It can be differentiated three times, in reverse and forward mode, by ``torch.func`` and under
    ``torch.compile``; a fourth derivative raises.

    Args:
        logits: (N, C), (N, C, d1, ...) or (C,); (E, N, C) with an ensemble oscillation. float32, float64, float16 or
            bfloat16, any strides.
        target: Class indices, int64, int32 or uint8: logits' shape without its class dimension; (E, N), or (N,) for
            all members of an ensemble. Or class probabilities t (mixup, label distributions): floating-point, of the
            logits' shape, (N, C) for all members of an ensemble. Their loss is -Σ_c w_c Γ_c t_c log p_c a row, as in
            :func:`torch.nn.functional.cross_entropy`, made of torch's own ops: slower than the fused op, differentiable
            to any order and in the target too.
        oscillation: Γ; C classes.
        step: The optimisation step s: an int, or an int64 tensor () on the logits' device, or (E,) for an ensemble.
            A tensor is read where it lies: no synchronisation, and a replayed CUDA graph sees its current value.
        weight: Weights w of the classes, as in :func:`torch.nn.functional.cross_entropy`: class c has w_c Γ_c in place
            of Γ_c everywhere, where Γ adds up to C and w is taken as it is, negative numbers included. (C,), or (E, C)
            for an ensemble; of any dtype that logits may have, on their device; read where it lies, a constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Mean and sum of an ensemble give (E,).
        normalization: What a mean divides by: ``"samples"``, the number of targets that are not ignored (the paper),
            or ``"weights"``, their Σ w_y Γ_y (the rule of :func:`torch.nn.functional.cross_entropy`; not for
            probabilities, whose mean is over all samples there too).
        ignore_index: Rows with this target contribute nothing, not even a NaN; not for probabilities.
        label_smoothing: ε in [0, 1]: the target is (1-ε) one-hot + ε/C, or (1-ε) t + ε/C, and every class term has
            its own weight w_c Γ_c, as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        The loss: () or (E,) for mean and sum, in float32 at least; for ``"none"`` the logits' shape without the
        classes, in the dtype of the logits, or in float32 at least under autocast. Sums over rows are taken in
        float64 in a fixed order: the same bits on every run.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        IndexError: on CPU, a target outside [0, C). On CUDA its loss and gradient are NaN instead.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> target = torch.tensor([0, 2])
        >>> oscillation = Oscillation(3, amplitude=70, period=5000)
        >>> dynamic_cross_entropy(logits, target, oscillation, 0)  # Γ = 1: torch's own
        tensor(0.8955, grad_fn=<DynamicCrossEntropyBackward>)
        >>> loss = dynamic_cross_entropy(logits, target, oscillation, 2500)  # Γ = 2.92, 0.04, 0.04
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.3106,  0.1553,  0.1553],
                [ 0.0044,  0.0120, -0.0164]])
    """
    if reduction == "none" and isinstance(logits, Tensor) and torch.is_autocast_enabled(logits.device.type):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options = (reduction, normalization, ignore_index, label_smoothing)
    if _are_probabilities(target):
        return _of_probabilities(logits, target, oscillation, step, weight, *options, constants=False)[0]
    if not torch.compiler.is_compiling():
        plain = _C.cross_entropy(logits, target, getattr(oscillation, "_plain", None), step, weight, *options)
        if plain is not NotImplemented:
            return plain
    loss: Tensor = _ops.cross_entropy(*_arguments(logits, target, oscillation, step, weight, *options))[0]
    return loss


def loss_and_gradient(
    logits: Tensor,
    target: Tensor,
    oscillation: Oscillation,
    step: int | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalization: str = "samples",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in the logits in one pass, for loops that call ``logits.backward(gradient)``.

    Arguments as for :func:`dynamic_cross_entropy`. Nothing is recorded by autograd: both results are constants.

    Returns:
        ``(loss, gradient)``; the gradient of the sum of the losses, with the shape and dtype of the logits.

    Raises:
        As :func:`dynamic_cross_entropy`; RuntimeError where a ``torch.func`` transform or forward mode would
        differentiate through it.

    Example:
        >>> logits, target = torch.zeros(2, 2), torch.tensor([0, 1])
        >>> loss_and_gradient(logits, target, Oscillation(2, amplitude=3, period=10), step=5)
        (tensor(0.6931), tensor([[-0.3750,  0.3750],
                [ 0.1250, -0.1250]]))
    """
    options = (reduction, normalization, ignore_index, label_smoothing)
    if _are_probabilities(target):
        loss, gradient = _of_probabilities(logits, target, oscillation, step, weight, *options, constants=True)
        return loss, gradient
    if not torch.compiler.is_compiling():
        plain = _C.cross_entropy_with_gradient(
            logits, target, getattr(oscillation, "_plain", None), step, weight, *options
        )
        if plain is not NotImplemented:
            return plain
    arguments = _arguments(logits, target, oscillation, step, weight, *options)
    loss, gradient, _, _ = _ops.cross_entropy_with_gradient(*arguments, True)  # finished
    return loss, gradient


class DynamicCrossEntropyLoss(nn.Module):
    """:func:`dynamic_cross_entropy` as a module that counts the steps.

    ``criterion(logits, target)`` uses the weights of ``current_step``; call ``criterion.step()`` once per
    optimisation step. The step is a buffer (``current_step``, int64) and part of ``state_dict``, as is the
    configuration. The state of another one is an unexpected key, named with the difference: ``load_state_dict``
    raises RuntimeError, and with ``strict=False`` goes on from that step under the configuration of this module.
    ``eval()`` does not change Γ, so that a loss is the same number in both modes; ``plain_in_eval=True`` makes it
    the plain cross-entropy there, Γ = 1, and changes nothing else. ``weight`` is a buffer in float64, whatever dtype
    the module is cast to, and part of the configuration.

    Args:
        oscillation: Γ.
        weight, reduction, normalization, ignore_index, label_smoothing: As for :func:`dynamic_cross_entropy`.
        inplace_gradient: Where a gradient is needed, writes it over the logits, which saves a tensor of their size.
            The logits are of no use afterwards. For a plain backward pass in eager mode, with mean or sum, of logits
            that a model has computed; whatever else, such as a double backward, raises RuntimeError.
        plain_in_eval: Γ = 1 after ``eval()``. No part of the state.

    Example:
        >>> criterion = DynamicCrossEntropyLoss(Oscillation(10, amplitude=50, period=100))
        >>> loss = criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4))
        >>> loss.backward()
        >>> criterion.step()
    """

    current_step: Tensor
    weight: Tensor | None
    _plain: Oscillation | None = None

    def __init__(
        self,
        oscillation: Oscillation,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        normalization: str = "samples",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        inplace_gradient: bool = False,
        plain_in_eval: bool = False,
    ) -> None:
        super().__init__()
        options = _checked_options(oscillation, reduction, normalization, ignore_index, label_smoothing)
        for name, value in (("inplace_gradient", inplace_gradient), ("plain_in_eval", plain_in_eval)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        if inplace_gradient and reduction == "none":
            raise ValueError("inplace_gradient: expected reduction 'mean' or 'sum', got 'none'")
        self.oscillation = oscillation
        self.reduction, self.normalization, self.ignore_index, self.label_smoothing = options
        self.inplace_gradient, self.plain_in_eval = inplace_gradient, plain_in_eval
        if plain_in_eval:
            self._plain = Oscillation(oscillation.num_classes, torch.ones_like(oscillation.amplitude), 1)
        self.register_buffer("current_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weight", _checked_weight(weight, oscillation), persistent=False)

    def forward(self, logits: Tensor, target: Tensor, step: int | Tensor | None = None) -> Tensor:
        """The loss at ``step``, or at ``current_step``, which stays; arguments as for :func:`dynamic_cross_entropy`."""
        oscillation = self.oscillation if self.training or self._plain is None else self._plain
        if step is None:
            step = self.current_step
            if oscillation.waveform == "function" and not torch.compiler.is_compiling():
                step = int(self.current_step)
        if self.inplace_gradient:
            if _are_probabilities(target):
                raise ValueError("target: expected class indices with inplace_gradient=True, got probabilities")
            options = (self.reduction, self.normalization, self.ignore_index, self.label_smoothing)
            arguments = _arguments(logits, target, oscillation, step, self.weight, *options)
            if torch.is_grad_enabled() and logits.requires_grad:
                loss: Tensor = _ops.cross_entropy_into_logits(*arguments)[0]
                return loss
        return dynamic_cross_entropy(
            logits,
            target,
            oscillation,
            step,
            weight=self.weight,
            reduction=self.reduction,
            normalization=self.normalization,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicCrossEntropyLoss:
        """Takes the oscillation along to another device: compiled and captured code is not to copy it there.

        The weights are described by their values, as it is: a cast, or memory without values, is not for them.
        """
        weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None:
            self.weight = weight.to(self.current_step.device)
        for oscillation in (self.oscillation, self._plain):
            if oscillation is not None:
                oscillation.on(self.current_step.device)
        return self

    def step(self) -> None:
        """Goes on to the next optimisation step."""
        self.current_step.add_(1)

    def set_step(self, step: int) -> None:
        """Goes to an optimisation step, an int."""
        self.current_step.fill_(check_step("step", step))

    def _config(self) -> Configuration:
        return {
            **self.oscillation.config(),
            "reduction": self.reduction,
            "normalization": self.normalization,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "weight": None if self.weight is None else self.weight.cpu(),
        }

    def get_extra_state(self) -> Tensor:
        """The configuration for ``state_dict``: (n,) uint8, for formats that hold tensors alone."""
        return pack(self._config())

    def set_extra_state(self, state: object) -> None:
        """Takes nothing from a state but checks it, also one of version 0.1.0.

        Raises:
            ValueError: it belongs to another configuration, or to no loss.
        """
        if other := difference(self._config(), unpack(state)):
            raise ValueError(f"state_dict: {other}")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *reports: list[str]
    ) -> None:
        """Reports another configuration as an unexpected key: what a strict load refuses and another forgives."""
        key = f"{prefix}_extra_state"
        if key in state_dict and (other := difference(self._config(), unpack(state_dict[key]))):
            _, unexpected_keys, _ = reports
            unexpected_keys.append(f"{key}: {other}")
            state_dict = {**state_dict, key: self.get_extra_state()}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)

    def extra_repr(self) -> str:
        options = [f"{name}={getattr(self, name)!r}" for name in ("reduction", "normalization", "ignore_index")]
        weight = "None" if self.weight is None else f"tensor of shape {tuple(self.weight.shape)}"
        return ", ".join([f"{self.oscillation}", *options, f"label_smoothing={self.label_smoothing}, weight={weight}"])
