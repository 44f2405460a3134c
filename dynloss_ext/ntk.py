"""Eigenvalues of the empirical neural tangent kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from dynloss_ext._arguments import check_count

__all__ = ["ntk_eigenvalues"]


def ntk_eigenvalues(model: nn.Module, inputs: Tensor, k: int = 1, *, outputs: str = "mean") -> Tensor:
    """The k largest eigenvalues of the neural tangent kernel on a few inputs.

    With J_ic the gradient of output c at input i in all parameters that require grad (Jacot et al. 2018,
    arXiv:1806.07572):

    * ``outputs="mean"``: K_ij = (1/C) Σ_c J_ic · J_jc, of shape (N, N), as in the paper's notebook;
    * ``outputs="full"``: J Jᵀ of shape (N C, N C).

    The Jacobian is held in memory: N · C · P numbers.

    Args:
        model: maps (N, ...) to (N, C), each sample by itself; its parameters, `.grad`s and mode stay as they are.
        inputs: (N, ...).
        k: how many, at most N ("mean") or N C ("full").
        outputs: "mean" or "full".

    Returns:
        (k,) float64 eigenvalues, descending, on the device of the model's outputs.

    Raises:
        TypeError, ValueError: naming the argument; among others, a model that is random (dropout in training mode) or
            whose BatchNorm takes its statistics from the batch.
        RuntimeError: a gradient is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch.Tensor, got {type(inputs).__name__}")
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError(f"inputs must hold at least one sample, (N, ...), got shape {tuple(inputs.shape)}")
    if outputs not in ("mean", "full"):
        raise ValueError(f"outputs must be 'mean' or 'full', got {outputs!r}")
    params = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires grad, got none")
    _refuse_coupled_samples(model)
    with torch.no_grad():
        batch = model(inputs)
    if not isinstance(batch, Tensor):
        raise TypeError(f"model must return a torch.Tensor, got {type(batch).__name__}")
    shape = batch.shape
    if len(shape) != 2 or shape[0] != len(inputs):
        raise ValueError(f"model must return shape ({len(inputs)}, C), got {tuple(shape)}")
    size = shape[0] if outputs == "mean" else shape.numel()
    k = check_count("k", k, 1, size, "the size of the kernel")

    def outputs_of_one(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(model, values, (sample.unsqueeze(0),))
        return result.squeeze(0)

    try:
        jacobians = vmap(jacrev(outputs_of_one), in_dims=(None, 0))(params, inputs.detach())
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        raise ValueError("model must not be random, but it draws random numbers, such as for dropout") from error
    jacobian = torch.cat([part.flatten(2) for part in jacobians.values()], dim=2)  # (N, C, P)
    if not bool(jacobian.isfinite().all()):
        raise RuntimeError("a gradient of the outputs is not finite")
    if outputs == "mean":
        rows = jacobian.flatten(1).double() / shape[1] ** 0.5
    else:
        rows = jacobian.flatten(0, 1).double()
    values: Tensor = torch.linalg.eigvalsh(rows @ rows.t())
    return values.flip(0)[:k]


def _refuse_coupled_samples(model: nn.Module) -> None:
    """Refuses layers that draw random numbers, change their state or mix the samples of a batch."""
    batch_norm, instance_norm = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
    for name, module in model.named_modules():
        layer = f"{name or 'it'} is a {type(module).__name__}"
        random = isinstance(module, nn.modules.dropout._DropoutNd)
        stateful = isinstance(module, batch_norm) or (isinstance(module, instance_norm) and module.track_running_stats)
        if module.training and (random or stateful):
            raise ValueError(f"model must treat each sample by itself, but {layer} in training mode: call model.eval()")
        if isinstance(module, batch_norm) and module.running_mean is None:
            raise ValueError(
                f"model must treat each sample by itself, but {layer} without running statistics: it takes them from"
                " the batch in any mode"
            )
