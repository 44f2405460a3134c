"""The whole spectrum in outline: spectral density and trace, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext.eigen import Operator, Options, _resolve, check_count

__all__ = ["Estimate", "SpectralDensity", "spectral_density", "trace"]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of eigenvalues, smoothed by a Gaussian; all float64 on CPU.

    Attributes:
        grid: (G,) eigenvalues at which the density is given.
        density: (G,) eigenvalues per unit of the grid, as a share of all: it integrates to 1.
        stderr: (G,) its standard error over the probes; NaN for a single probe.
        nodes: (num_probes, m) Ritz values of each probe, ascending; where a probe's Krylov space ended early, the
            rest has weight 0.
        weights: (num_probes, m) their quadrature weights, each row summing to 1.
        bandwidth: standard deviation of the Gaussian.
        num_hvp: products used.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    nodes: Tensor
    weights: Tensor
    bandwidth: float
    num_hvp: int


def _rademacher(size: tuple[int, ...], options: Options, generator: torch.Generator) -> Tensor:
    return torch.randint(2, size, generator=generator).mul_(2).sub_(1).to(options.device, options.dtype)


def _quadrature(diagonal: list[float], off_diagonal: list[float], length: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (length,) of a tridiagonal matrix, padded with weight 0."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        side = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix = matrix + torch.diag(side, 1) + torch.diag(side, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    missing = length - len(nodes)
    return torch.cat([nodes, nodes[-1:].expand(missing)]), torch.cat([vectors[0] ** 2, nodes.new_zeros(missing)])


def _standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first dimension."""
    return samples.std(0) / math.sqrt(samples.shape[0])


def spectral_density(
    H: Operator,
    *,
    num_steps: int = 80,
    num_probes: int = 10,
    bandwidth: float | None = None,
    grid_size: int = 1024,
    seed: int = 0,
    n: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature.

    For each random vector of ±1, `num_steps` of Lanczos with full reorthogonalisation give a Gauss quadrature of its
    spectral measure, whose expectation is the density; the nodes are broadened by a Gaussian (Ghorbani, Krishnan,
    Xiao, arXiv 1901.10159, Algorithm 1 and Eq. 6).

    Args:
        H: A :class:`HessianOperator`, or any callable v -> H v with ``n``, ``dtype`` and ``device`` given.
        num_steps: Lanczos steps per probe; memory is num_steps vectors of length P.
        num_probes: Random vectors; the standard error falls with their square root.
        bandwidth: Standard deviation of the Gaussian; default: a hundredth of the range of the nodes.
        grid_size: Points of the grid, which reaches five bandwidths beyond the outermost nodes.
        seed: Of the probes. The global random state is left alone.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: a product is not finite.
    """
    op, size, options = _resolve(H, n, dtype, device, None)
    check_count("num_steps", num_steps, 1, None, "")
    check_count("num_probes", num_probes, 1, None, "")
    check_count("grid_size", grid_size, 2, None, "")
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth must be finite and > 0, got {bandwidth}")
    generator = torch.Generator().manual_seed(seed)
    length = min(num_steps, size)
    num_hvp = 0
    quadratures = []
    for _ in range(num_probes):
        diagonal, off_diagonal = _C.tridiagonalize(op, _rademacher((size,), options, generator), length)
        num_hvp += len(diagonal)
        quadratures.append(_quadrature(diagonal, off_diagonal, length))
    nodes, weights = (torch.stack(part) for part in zip(*quadratures, strict=True))
    low, high = float(nodes.min()), float(nodes.max())
    if bandwidth is None:
        bandwidth = (high - low) / 100 or max(abs(high), 1.0) / 100
    grid = torch.linspace(low - 5 * bandwidth, high + 5 * bandwidth, grid_size, dtype=torch.float64)
    distance = (grid[:, None, None] - nodes) / bandwidth
    gaussians = torch.exp(-0.5 * distance**2) / (bandwidth * math.sqrt(2 * math.pi))
    per_probe = (gaussians * weights).sum(-1).T
    return SpectralDensity(
        grid=grid,
        density=per_probe.mean(0),
        stderr=_standard_error(per_probe) if num_probes > 1 else torch.full_like(grid, math.nan),
        nodes=nodes,
        weights=weights,
        bandwidth=bandwidth,
        num_hvp=num_hvp,
    )


def trace(
    H: Operator,
    *,
    method: str = "hutch++",
    num_probes: int = 30,
    seed: int = 0,
    n: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Estimate:
    """Trace by random vectors of ±1.

    ``"hutchinson"`` averages zᵀHz. ``"hutch++"`` (Meyer, Musco, Musco, Woodruff, SOSA 2021, Algorithm 1) takes the
    trace on the range of H applied to a third of the probes exactly, spends a third on that, and averages over the
    rest only what is orthogonal to it: far less variance where few eigenvalues are large.

    Args:
        H: As for :func:`spectral_density`.
        method: ``"hutch++"`` or ``"hutchinson"``.
        num_probes: Products with H in all; at least 2, and 6 for Hutch++.
        seed: Of the probes. The global random state is left alone.

    Returns:
        The estimate and its standard error, for Hutch++ that of the residual probes; 0 where the range is everything.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: a product is not finite.
    """
    if method not in ("hutch++", "hutchinson"):
        raise ValueError(f"method must be 'hutch++' or 'hutchinson', got {method!r}")
    op, size, options = _resolve(H, n, dtype, device, None)
    check_count("num_probes", num_probes, 6 if method == "hutch++" else 2, None, "")
    generator = torch.Generator().manual_seed(seed)

    def product(block: Tensor) -> Tensor:
        result = torch.stack([op.apply(column.contiguous()) for column in block.unbind(1)], 1)
        if not bool(result.isfinite().all()):
            raise RuntimeError("a product with the operator is not finite")
        return result

    exact = 0.0
    basis = torch.zeros(size, 0, dtype=options.dtype, device=options.device)
    num_residual = num_probes
    if method == "hutch++":
        third = min(num_probes // 3, size)
        basis = torch.linalg.qr(product(_rademacher((size, third), options, generator)))[0]
        exact = float((basis * product(basis)).sum(dtype=torch.float64))
        num_residual = num_probes - 2 * third
        if third == size:
            return Estimate(exact, 0.0)
    probes = _rademacher((size, num_residual), options, generator)
    probes = probes - basis @ (basis.T @ probes)
    samples = (probes * product(probes)).sum(0, dtype=torch.float64)
    return Estimate(exact + float(samples.mean()), float(_standard_error(samples)))
