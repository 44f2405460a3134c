"""Eigenvalues of the empirical neural tangent kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

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
        ValueError: k out of range, unknown `outputs`, no parameter that requires grad, outputs that are not
            (N, C), or a model in training mode whose BatchNorm or dropout makes an output depend on more than its
            own input.
    """
    if outputs not in ("mean", "full"):
        raise ValueError(f"outputs: got {outputs!r}, expected 'mean' or 'full'")
    if not isinstance(inputs, Tensor) or inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError("inputs: expected a tensor of at least one sample, (N, ...)")
    params = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if not params:
        raise ValueError("model: none of its parameters requires grad")
    _refuse_coupled_samples(model)
    with torch.no_grad():
        shape = model(inputs).shape
    if len(shape) != 2 or shape[0] != len(inputs):
        raise ValueError(f"model: outputs have shape {tuple(shape)}, expected ({len(inputs)}, C)")
    size = shape[0] if outputs == "mean" else shape.numel()
    if not 1 <= k <= size:
        raise ValueError(f"k: got {k}, expected 1 to {size}")

    def outputs_of_one(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(model, values, (sample.unsqueeze(0),))
        return result.squeeze(0)

    jacobians = vmap(jacrev(outputs_of_one), in_dims=(None, 0))(params, inputs.detach())
    jacobian = torch.cat([part.flatten(2) for part in jacobians.values()], dim=2)  # (N, C, P)
    if outputs == "mean":
        rows = jacobian.flatten(1) / shape[1] ** 0.5
    else:
        rows = jacobian.flatten(0, 1)
    values: Tensor = torch.linalg.eigvalsh(rows.double() @ rows.double().t())
    return values.flip(0)[:k]


def _refuse_coupled_samples(model: nn.Module) -> None:
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and module.training:
            kind = type(module).__name__
            raise ValueError(f"model: {name or 'it'} is a {kind} in training mode; call model.eval() first")
