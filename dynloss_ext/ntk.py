"""The neural tangent kernel on a few inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynloss_ext.eigen import check_count

__all__ = ["ntk_eigenvalues"]


def ntk_eigenvalues(model: nn.Module, inputs: Tensor, k: int = 1, *, outputs: str = "mean") -> Tensor:
    """The largest eigenvalues of the empirical neural tangent kernel J Jᵀ (Jacot, Gabriel, Hongler, NeurIPS 2018).

    J is the Jacobian of the model's outputs in its parameters that require grad. It is formed in full: N·K·P numbers
    for N inputs, K outputs and P parameters.

    Args:
        model: Maps (N, ...) to (N, K). Its mode, parameters and ``.grad`` are left alone.
        inputs: (N, ...).
        k: How many eigenvalues.
        outputs: ``"mean"``: of the (N, N) kernel averaged over the outputs, Σ_c J_c J_cᵀ / K, as in the authors'
            notebook of "Tilting the playing field"; ``"full"``: of the (N K, N K) matrix J Jᵀ.

    Returns:
        (k,) float64 on CPU, descending.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if outputs not in ("mean", "full"):
        raise ValueError(f"outputs must be 'mean' or 'full', got {outputs!r}")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model has no parameter that requires grad")
    with torch.enable_grad():
        values = model(inputs)
    if values.dim() != 2 or values.shape[0] != inputs.shape[0]:
        raise ValueError(f"model must map (N, ...) to (N, K), got {tuple(inputs.shape)} -> {tuple(values.shape)}")
    samples, classes = values.shape
    check_count("k", k, 1, samples if outputs == "mean" else values.numel(), "the size of the kernel")
    # Row (c, i) of J is the gradient of output c of sample i.
    seeds = torch.eye(values.numel(), dtype=values.dtype, device=values.device).view(-1, classes, samples).mT
    blocks = torch.autograd.grad(values, params, seeds, is_grads_batched=True, allow_unused=True)
    kernel = torch.zeros(values.numel(), values.numel(), dtype=torch.float64, device=values.device)
    for block in blocks:
        if block is not None:
            jacobian = block.reshape(values.numel(), -1).double()
            kernel += jacobian @ jacobian.T
    if outputs == "mean":
        kernel = kernel.view(classes, samples, classes, samples).diagonal(dim1=0, dim2=2).mean(-1)
    eigenvalues: Tensor = torch.linalg.eigvalsh(kernel).flip(0)[:k].cpu()
    return eigenvalues
