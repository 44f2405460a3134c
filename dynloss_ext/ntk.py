"""Eigenvalues of the empirical neural tangent kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from dynloss_ext._checks import check_choice, check_count, check_tensor, is_sharded
from dynloss_ext._double_backward import double_backward
from dynloss_ext._evaluation import random_state_kept, relative_rounding

__all__ = ["ntk_eigenvalues"]


def ntk_eigenvalues(model: nn.Module, inputs: Tensor, k: int = 1, *, outputs: str = "mean") -> Tensor:
    """The k largest eigenvalues of the neural tangent kernel on a few inputs.

    With J_ic the gradient of output c at input i in all parameters that require grad (Jacot et al. 2018,
    arXiv:1806.07572):

    * ``outputs="mean"``: K_ij = (1/C) Σ_c J_ic · J_jc, of shape (N, N), as in the paper's notebook;
    * ``outputs="full"``: J Jᵀ of shape (N C, N C).

    The Jacobian is held in memory, N · C · P numbers in the dtype of the model, and besides the part of it that belongs
    to the largest parameter in float64. It is computed for all samples at once, or, where :func:`torch.func.vmap`
    refuses the model (recurrent layers, state that is updated in place), by N · C backward passes.

    Args:
        model: maps (N, ...) to (N, C), each sample by itself; its parameters, gradients, buffers and mode stay as they
            are, as does torch's random state.
        inputs: (N, ...).
        k: how many, at most N ("mean") or N C ("full").
        outputs: "mean" or "full".

    Returns:
        (k,) float64 eigenvalues, descending, on the device of the model's outputs.

    Raises:
        TypeError, ValueError: naming the argument; among others, a model that is random (dropout in training mode) or
            whose BatchNorm takes its statistics from the batch.
        RuntimeError: a gradient is not finite.

    Example:
        >>> line = nn.Linear(2, 1)
        >>> ntk_eigenvalues(line, torch.tensor([[3.0, 0.0], [0.0, 1.0]]), k=2)  # of [[10, 1], [1, 2]]
        tensor([10.1231,  1.8769], dtype=torch.float64)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if check_tensor("inputs", inputs).dim() == 0 or len(inputs) == 0:
        raise ValueError(f"inputs: expected at least one sample, (N, ...), got shape {tuple(inputs.shape)}")
    check_choice("outputs", outputs, ("mean", "full"))
    params = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if not params:
        raise ValueError("model: expected a parameter that requires grad, got none")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected one that can be called with other parameters, got a torch.jit.ScriptModule")
    for name, value in params.items():
        if is_sharded(value):
            raise ValueError(f"{name}: expected a tensor that is whole in this process, got a DTensor")
    _refuse_coupled_samples(model)
    with random_state_kept(inputs.device), double_backward():
        with torch.no_grad():
            together = check_tensor("output of model", _outputs(model, params, inputs))
        shape = together.shape
        if len(shape) != 2 or shape[0] != len(inputs):
            raise ValueError(f"output of model: expected shape ({len(inputs)}, C), got {tuple(shape)}")
        size = shape[0] if outputs == "mean" else shape.numel()
        k = check_count("k", k, 1, size, "the size of the kernel")
        jacobian, alone = _jacobian(model, params, inputs, together)
    apart = (alone - together).abs().max() / together.abs().max().clamp_min(torch.finfo(together.dtype).tiny)
    if apart > relative_rounding(together.dtype):
        raise ValueError(
            f"model: {_APART}, got outputs for one sample alone that differ from those for it among others by"
            f" {float(apart):.2g} of the largest"
        )
    kernel = torch.zeros(size, size, dtype=torch.float64, device=together.device)
    for name in list(jacobian):
        rows = jacobian.pop(name).flatten(2).flatten(*((1, 2) if outputs == "mean" else (0, 1))).double()
        kernel.addmm_(rows, rows.t())
    if not bool(kernel.isfinite().all()):
        raise RuntimeError("model: expected finite gradients, got one that is not, or overflows in the kernel")
    values: Tensor = torch.linalg.eigvalsh(kernel / shape[1] if outputs == "mean" else kernel)
    return values.flip(0)[:k]


def _outputs(model: nn.Module, params: dict[str, Tensor], batch: Tensor) -> Any:
    """With copies of the buffers: a model that counts its calls, say, must find them as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, (params, buffers), (batch,))


def _jacobian(
    model: nn.Module, params: dict[str, Tensor], inputs: Tensor, together: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """(N, C, *shape) for every parameter, and the outputs (N, C), of each sample by itself."""

    def outputs_of_one(values: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
        result = _outputs(model, values, sample.unsqueeze(0)).squeeze(0)
        return result, result

    try:
        jacobian, alone = vmap(jacrev(outputs_of_one, has_aux=True), in_dims=(None, 0))(params, inputs.detach())
    except RuntimeError as error:
        if "randomness" in str(error):
            message = "model: expected no randomness, got one that draws numbers, such as for dropout"
            raise ValueError(message) from error
        return _jacobian_by_rows(model, params, inputs, together)
    return jacobian, alone


def _jacobian_by_rows(
    model: nn.Module, params: dict[str, Tensor], inputs: Tensor, together: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The same by one backward pass per sample and output, for models that vmap refuses."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    jacobian = {name: value.new_empty(*together.shape, *value.shape) for name, value in params.items()}
    alone = torch.empty_like(together)
    # cuDNN's recurrent layers have no backward pass in eval mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        for i, sample in enumerate(inputs.detach()):
            outputs = _outputs(model, leaves, sample.unsqueeze(0)).squeeze(0)
            alone[i] = outputs.detach()
            for c, output in enumerate(outputs):
                rows = torch.autograd.grad(output, list(leaves.values()), retain_graph=True, materialize_grads=True)
                for name, row in zip(leaves, rows, strict=True):
                    jacobian[name][i, c] = row
    return jacobian, alone


_APART = "expected one that treats each sample by itself"


def _refuse_coupled_samples(model: nn.Module) -> None:
    """Refuses layers that draw random numbers, change their state or mix the samples of a batch."""
    batch_norm, instance_norm = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
    for name, module in model.named_modules():
        layer = f"{name or 'it'} is a {type(module).__name__}"
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        random |= isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1
        stateful = isinstance(module, batch_norm) or (isinstance(module, instance_norm) and module.track_running_stats)
        if module.training and (random or stateful):
            raise ValueError(f"model: {_APART}, got one where {layer} in training mode: call model.eval()")
        if isinstance(module, batch_norm) and module.running_mean is None:
            raise ValueError(
                f"model: {_APART}, got one where {layer} without running statistics: it takes them from the batch in"
                " any mode"
            )
