"""The whole spectrum in outline: spectral density, trace and diagonal, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynloss_ext import _C
from dynloss_ext._checks import check_choice, check_count, check_number, check_seed
from dynloss_ext._operators import products_with
from dynloss_ext._shards import agreed, largest_entries
from dynloss_ext._symmetric import Operator, check_symmetric, resolve

__all__ = ["DiagonalEstimate", "Estimate", "SpectralDensity", "diagonal", "spectral_density", "trace"]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class DiagonalEstimate:
    """The entries of a diagonal and their standard errors.

    Attributes:
        values: (P,), in the operator's dtype and on its device; ``H.unflatten`` gives them the parameters' shapes. Of
            sharded parameters this process's shard of them, as the vectors of `eigsh` are.
        stderr: (P,), likewise.
    """

    values: Tensor
    stderr: Tensor


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of eigenvalues, smoothed by a Gaussian; all float64 on CPU.

    Attributes:
        grid: (G,) eigenvalues at which the density is given.
        density: (G,) eigenvalues per unit of the grid, as a share of all: it integrates to 1, and so do the values
            on the grid where its spacing is at most about the bandwidth.
        stderr: (G,) its standard error over the probes; NaN for a single probe. It knows nothing of the bias of few
            steps, which may exceed it: with more of them the density must not change.
        nodes: (num_probes, m) Ritz values of each probe, ascending; where a probe's Krylov space ended early, the
            rest has weight 0.
        weights: (num_probes, m) their quadrature weights, each row summing to 1.
        bandwidth: standard deviation of the Gaussian.
        num_hvp: products used, but for up to 4 of a probe that tell noise from an H that is not symmetric.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    nodes: Tensor
    weights: Tensor
    bandwidth: float
    num_hvp: int


def _generator(seed: int) -> torch.Generator:
    """On the CPU whatever the device, so that a seed stands for the same probes everywhere."""
    return torch.Generator(device="cpu").manual_seed(seed)


def _default_bandwidth(low: float, high: float, dtype: torch.dtype) -> float:
    """A hundredth of the range of the nodes; of their size, where they differ by rounding alone."""
    size, spread = max(abs(low), abs(high)), high - low
    return (spread if spread > 1e3 * torch.finfo(dtype).eps * size else size or 1.0) / 100


def _broadened(nodes: Tensor, weights: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """(G,): the sum of a probe's weights, each spread by a Gaussian around its node."""
    distance = (grid[:, None] - nodes) / bandwidth
    return torch.exp(-0.5 * distance**2) @ weights / (bandwidth * math.sqrt(2 * math.pi))


def _standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first dimension; scaled, since the squares of what is finite may overflow."""
    scale = samples.abs().amax().clamp_min(torch.finfo(samples.dtype).tiny)
    return (samples / scale).std(0) * (scale / math.sqrt(samples.shape[0]))


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
        H: A :class:`HessianOperator`, or any callable v -> H v with ``n``, ``dtype`` and ``device`` given. Of sharded
            parameters, for which see `eigsh`, vectors are in shards; the result is that of the model in one piece.
        num_steps: Lanczos steps per probe; memory is num_steps + 1 vectors of length P, and afterwards
            (num_probes + 2 num_steps) grid_size numbers.
        num_probes: Random vectors; the standard error falls with their square root.
        bandwidth: Standard deviation of the Gaussian; default: a hundredth of the range of the nodes,
            or of their size where they are all equal to rounding.
        grid_size: Points of the grid, which reaches five bandwidths beyond the outermost nodes.
        seed: Of the probes. The global random state is left alone.

    Raises:
        TypeError, ValueError: naming the argument; H is not symmetric beyond the noise of its products, as in `eigsh`.
        RuntimeError: a product is not finite, or a parameter has changed since the operator was made.

    Example:
        >>> spectrum = torch.cat([torch.zeros(90), torch.full((10,), 5.0)])
        >>> found = spectral_density(lambda v: spectrum * v, n=100, num_probes=4)
        >>> positive = found.grid > 2.5
        >>> share = torch.trapezoid(found.density[positive], found.grid[positive])
        >>> print(f"{share:.2f} of the eigenvalues lie above 2.5")
        0.10 of the eigenvalues lie above 2.5
    """
    op, options, shards = resolve(H, n, dtype, device, None)

    def check() -> tuple[tuple[int, int, int, float | None, int], object]:
        counts = (
            check_count("num_steps", num_steps, 1),
            check_count("num_probes", num_probes, 1),
            check_count("grid_size", grid_size, 2),
        )
        width = None if bandwidth is None else check_number("bandwidth", bandwidth, 0, open_low=True)
        settings = (*counts, width, check_seed(seed))
        return settings, settings

    num_steps, num_probes, grid_size, bandwidth, seed = agreed(shards, "spectral_density", check)
    length = min(num_steps, op.dimension)
    with products_with(H):
        probes = _C.gauss_quadrature(op, steps=length, probes=num_probes, generator=_generator(seed))
    check_symmetric(H, max(asymmetry for _, _, asymmetry in probes))
    # Where the Krylov space of a probe ends early, its last node fills up the row, with weight 0.
    rows = [(x + x[-1:] * (length - len(x)), w + [0.0] * (length - len(w))) for x, w, _ in probes]
    nodes, weights = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1)
    low, high = float(nodes.min()), float(nodes.max())
    if bandwidth is None:
        bandwidth = _default_bandwidth(low, high, options.dtype)
    grid = torch.linspace(low - 5 * bandwidth, high + 5 * bandwidth, grid_size, dtype=torch.float64, device="cpu")
    per_probe = torch.stack([_broadened(*probe, grid, bandwidth) for probe in zip(nodes, weights, strict=True)])
    return SpectralDensity(
        grid=grid,
        density=per_probe.mean(0),
        stderr=_standard_error(per_probe) if num_probes > 1 else torch.full_like(grid, math.nan),
        nodes=nodes,
        weights=weights,
        bandwidth=bandwidth,
        num_hvp=sum(len(nodes) for nodes, _, _ in probes),
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
    rest only what is orthogonal to it: far less variance where few eigenvalues are large. Memory is num_probes // 3
    vectors of length P for Hutch++ and none for Hutchinson, besides a few that come and go.

    Args:
        H: As for :func:`spectral_density`.
        method: ``"hutch++"`` or ``"hutchinson"``.
        num_probes: Products with H in all, besides a few that tell noise from an H that is not symmetric; at least 2,
            and 6 for Hutch++.
        seed: Of the probes. The global random state is left alone.

    Returns:
        The estimate and its standard error, for Hutch++ that of the residual probes, which is itself uncertain where
        these are few (a third of num_probes); 0 where the range is everything.

    Raises:
        TypeError, ValueError: naming the argument; H is not symmetric beyond the noise of its products, as in `eigsh`.
        RuntimeError: a product is not finite, or a parameter has changed since the operator was made.

    Example:
        >>> spectrum = torch.arange(1.0, 101.0, dtype=torch.float64)
        >>> trace(lambda v: spectrum * v, method="hutchinson", n=100, dtype=torch.float64)  # a diagonal has no variance
        Estimate(value=5050.0, stderr=0.0)
    """
    op, _, shards = resolve(H, n, dtype, device, None)

    def check() -> tuple[tuple[int, int], object]:
        check_choice("method", method, ("hutch++", "hutchinson"))
        settings = check_count("num_probes", num_probes, 6 if method == "hutch++" else 2), check_seed(seed)
        return settings, (method, settings)

    num_probes, seed = agreed(shards, "trace", check)
    third = min(num_probes // 3, op.dimension) if method == "hutch++" else 0
    samples = num_probes - 2 * third
    with products_with(H):
        on_range, beside, asymmetry = _C.sample_trace(op, range=third, samples=samples, generator=_generator(seed))
    check_symmetric(H, asymmetry)
    if not beside:
        return Estimate(on_range, 0.0)
    per_probe = torch.tensor(beside, dtype=torch.float64, device="cpu")
    return Estimate(on_range + float(per_probe.mean()), float(_standard_error(per_probe)))


def diagonal(
    H: Operator,
    *,
    num_samples: int = 100,
    seed: int = 0,
    n: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> DiagonalEstimate:
    """Diagonal by random vectors of ±1: the mean of z ⊙ H z (Bekas, Kokiopoulou, Saad, Appl. Numer. Math. 57, 2007).

    One sample of entry i has the variance Σ_{j≠i} H_ij²: what lies beside the diagonal is the noise, and a diagonal
    matrix has none. Memory is six vectors of length P, besides what a product needs.

    Args:
        H: As for :func:`spectral_density`. That it is symmetric is not looked for.
        num_samples: Products with H, at least 2; the standard error falls with their square root.
        seed: Of the vectors. The global random state is left alone.

    Returns:
        The estimate and the standard error of each entry, which is itself uncertain where the samples are few. Sums
        are in the dtype of H, by Welford's recurrence.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: a product is not finite, or a parameter has changed since the operator was made.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> diagonal(HessianOperator((x**3).sum(), [x]), num_samples=2)
        DiagonalEstimate(values=tensor([ 6., 12., 18.]), stderr=tensor([0., 0., 0.]))
    """
    op, options, shards = resolve(H, n, dtype, device, None)

    def check() -> tuple[tuple[int, int], object]:
        settings = check_count("num_samples", num_samples, 2), check_seed(seed)
        return settings, settings

    num_samples, seed = agreed(shards, "diagonal", check)
    generator = _generator(seed)
    mean = torch.zeros(op.size, dtype=options.dtype, device=options.device)
    squares = torch.zeros_like(mean)
    op.check_values()
    with torch.no_grad(), products_with(H):
        for count in range(1, num_samples + 1):
            z = op.random_signs(generator)
            sample = z.mul_(op.apply(z))
            if count == 1:  # a unit in which no square overflows or vanishes
                unit = largest_entries(sample[None], shards)[0]
                unit = torch.where(unit > 0, unit, torch.ones_like(unit))
            deviation = sample.div_(unit).sub_(mean)
            mean.add_(deviation, alpha=1 / count)
            squares.addcmul_(deviation, deviation, value=1 - 1 / count)
    values = mean.mul_(unit)
    finite = bool(torch.isfinite(values).all())
    if not finite if shards is None else shards.any(not finite):
        raise RuntimeError("H: expected finite products, got one that is not finite")
    return DiagonalEstimate(values, squares.div_(num_samples * (num_samples - 1)).sqrt_().mul_(unit))
